"""A model that answers: the prompt as evaluate.py has it, text as it comes, and why it ended."""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from chatlora.chat.asked import Asked, Sampling
from chatlora.distributed.memory import not_loaded, out_of_memory_told
from chatlora.distributed.runtime import Runtime
from chatlora.errors import ChatError, LaunchError, SetAside
from chatlora.evaluation.command_line import ADAPTER, BASE, MODEL
from chatlora.evaluation.generation import (
    Answers,
    Model,
    context_length,
    greedy_settings_for,
    only_these_settings,
    until_stop,
)
from chatlora.evaluation.setup import as_trained, loaded
from chatlora.model.folder import find_adapter
from chatlora.model.loading import load_tokenizer, renderer_for
from chatlora.reading.conversation import Conversation, Message, reply
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.thoughts import opening_of

DOES_NOT_FIT = "a prompt of {:,} tokens and its answer do not fit: /reset forgets, --max_new_tokens shortens answers"
Watch = Callable[[str], bool]  # told all text so far, says whether it is enough


class Answer(NamedTuple):
    """text: what was generated, as predictions.jsonl has it. opening: a thought that the prompt had begun for it."""

    by: str
    text: str
    stop_reason: Literal["stop", "length", "interrupted"]
    opening: str = ""

    @property
    def message(self) -> Message:
        """The assistant's. What did not end by itself is no target: its stop token would be one too."""
        said = reply(self.opening + self.text)
        return said if self.stop_reason == "stop" else replace(said, loss=False)


@dataclass(frozen=True)
class Answering:
    """names: who can answer: model, or base and adapter. limit: tokens of prompt and answer; None: not known."""

    model: Model
    names: tuple[str, ...]
    renderer: Renderer
    texts: Answers
    settings: GenerationConfig
    limit: int | None

    @property
    def longest(self) -> int:
        return int(self.settings.max_new_tokens)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Raises ChatError where the template cannot render it, or drops a message of it."""
        try:
            return self.renderer.prompt_ids(conversation, checked=True)
        except SetAside as reason:
            raise ChatError(str(reason)) from None

    def answer(self, prompt: Sequence[int], room: int, by: str, watch: Watch | None = None) -> Answer:
        """room: how many tokens it may have. Raises OutOfMemoryError where that does not fit."""
        opening = opening_of(self.texts.raw(prompt))
        settings = deepcopy(self.settings)
        settings.max_new_tokens = room
        ids = torch.tensor([list(prompt)], device=self.model.device)
        watching = None if watch is None else _Watching(self.texts, len(prompt), opening, watch)
        with ExitStack() as within:
            within.enter_context(only_these_settings(self.model))
            within.enter_context(out_of_memory_told(DOES_NOT_FIT.format(len(prompt))))
            if by == BASE:
                within.enter_context(self.model.disable_adapter())
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=watching and [watching],
            )
        generated, has_stopped = until_stop(output[0, len(prompt) :].tolist(), self.texts.stop_ids)
        reason: Any = "stop" if has_stopped else "interrupted" if watching is not None and watching.enough else "length"
        return Answer(by, self.texts.text(generated), reason, opening)


class _Watching:
    """What `generate` asks after each token: whether that is enough."""

    def __init__(self, texts: Answers, num_prompt: int, opening: str, watch: Watch) -> None:
        self.texts, self.num_prompt, self.opening, self.watch = texts, num_prompt, opening, watch
        self.enough = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """input_ids: [1, T]. Half a character is held back until it is whole."""
        text = self.texts.text(input_ids[0, self.num_prompt :].tolist())
        self.enough = self.watch(self.opening + text.rstrip("\ufffd"))
        return torch.tensor([self.enough], device=input_ids.device)


def open_chat(asked: Asked, runtime: Runtime, say: Callable[[str], None]) -> Answering:
    """Everything loaded, as evaluate.py loads it."""
    if runtime.num_processes > 1:
        raise LaunchError(f"one process talks, but there are {runtime.num_processes}: start `chatlora chat` alone")
    adapter = None if asked.adapter is None else find_adapter(asked.adapter)
    config = asked.config if asked.of_run else as_trained(asked.config, adapter)
    tokenizer = load_tokenizer(config.model, adapter)
    # No rows tell whether there is reasoning: the template is told what the run or the user says, and nothing more.
    renderer = renderer_for(tokenizer, config.model, config.data, any_reasoning=True)
    with out_of_memory_told(not_loaded(config.model.name_or_path, runtime)):
        model = runtime.for_generation(loaded(config, adapter, runtime))
    if asked.sampling.temperature:
        seed = random.randrange(2**31) if asked.sampling.seed is None else asked.sampling.seed
        torch.manual_seed(seed)
        say(f"tokens are drawn; --seed {seed} draws the same ones again")
    settings = _settings(model, tokenizer, renderer, config.evaluation.max_new_tokens, asked.sampling)
    names = (MODEL,) if adapter is None else (BASE, ADAPTER)
    return Answering(model, names, renderer, Answers(tokenizer, settings.eos_token_id), settings, context_length(model))


def _settings(
    model: Model, tokenizer: PreTrainedTokenizerBase, renderer: Renderer, longest: int, sampling: Sampling
) -> GenerationConfig:
    settings = greedy_settings_for(model, tokenizer, renderer.stop_ids, longest)
    if sampling.temperature:
        settings.do_sample, settings.top_k = True, 0  # without 0 transformers draws among 50
        settings.temperature, settings.top_p = sampling.temperature, sampling.top_p
    return settings
