"""Samples -> left-padded batches -> predictions.

B: prompts of a batch, P: tokens of its longest prompt, N: tokens generated for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from chatlora.data.collate import pad_left
from chatlora.data.evaluation_set import EvalSample
from chatlora.evaluation.predictions import Prediction, append_predictions

Model: TypeAlias = PreTrainedModel | PeftModel

MAX_ROWS = {"cpu": 64, "cuda": 256}  # beyond, products on CPU are as fast as they get (fp32 and bf16, SmolLM2)
CPU_CACHE_BYTES = 2 * 2**30
CUDA_CACHE_SHARE = 0.5  # of the memory that is free once the model is there


def greedy_settings(max_new_tokens: int, stop_ids: Sequence[int], pad_token_id: int) -> GenerationConfig:
    """The most likely token each time, until one of `stop_ids` or the longest answer allowed."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )


def greedy_settings_for(
    model: Model, tokenizer: PreTrainedTokenizerBase, template_stop_ids: Sequence[int], max_new_tokens: int
) -> GenerationConfig:
    """Those of this model: all that ends a turn, and an id to pad with, which a tokenizer need not name."""
    stop_ids = all_stop_ids(model, tokenizer, template_stop_ids)
    pad_token_id = min(stop_ids) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return greedy_settings(max_new_tokens, stop_ids, pad_token_id)


@contextmanager
def only_these_settings(model: Model) -> Iterator[None]:
    """Within, `generate` takes every setting from the GenerationConfig it is given.

    Whatever that leaves open, transformers fills in from the model's own generation_config, which may sample, punish
    repetition or forbid tokens. Scores would then depend on a file that nobody looked at.
    """
    base = transformers_model(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def transformers_model(model: Model) -> PreTrainedModel:
    """The model itself, or the one that PEFT has put an adapter into."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def all_stop_ids(model: Model, tokenizer: PreTrainedTokenizerBase, template_stop_ids: Sequence[int]) -> list[int]:
    """Everything that ends a turn: what the template ends one with, and the eos of tokenizer and generation_config.

    One of them alone is often not enough: GLM's role tokens stand in generation_config only, a base model's tokenizer
    does not know the template's end of turn. A turn that does not end costs the longest answer and spoils the score.
    """
    own = transformers_model(model).generation_config.eos_token_id
    own_ids = [own] if isinstance(own, int) else own or []
    tokenizer_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*template_stop_ids, *own_ids, *tokenizer_ids})


def context_length(model: Model) -> int | None:
    """How many tokens the model was made for, prompt and answer together; None where its config does not say."""
    limit = model.config.get_text_config(decoder=True).to_dict().get("max_position_embeddings")
    return None if limit is None else int(limit)


# ---- batches


@dataclass(frozen=True, slots=True)
class Budget:
    """What one batch may hold: `tokens` in the key/value cache (prompts and answers, padding included), and `rows`."""

    tokens: int
    rows: int


def batch_budget(model: Model, device: torch.device) -> Budget:
    """As much as the memory for the key/value cache takes: half of what is free on a GPU, 2 GiB on CPU."""
    text = model.config.get_text_config(decoder=True).to_dict()
    num_heads = text["num_attention_heads"]
    head_size = text.get("head_dim") or text["hidden_size"] // num_heads
    num_values = 2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or num_heads) * head_size
    free = CPU_CACHE_BYTES
    if device.type == "cuda":
        free = int(CUDA_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    return Budget(tokens=max(1, free // (num_values * model.dtype.itemsize)), rows=MAX_ROWS.get(device.type, 32))


def expected_length(sample: EvalSample, max_new_tokens: int) -> int:
    """Tokens of the longest reference: what a model that has learned the task will generate."""
    return min(max_new_tokens, max(len(reference) for reference in sample.references))


def group(samples: Sequence[EvalSample], budget: Budget, max_new_tokens: int) -> list[list[EvalSample]]:
    """Batches of like length, the longest first, each within the budget even if every answer grows to its limit.

    A batch runs until its longest answer ends, so samples are sorted by the expected answer, then by the prompt.
    """
    batches: list[list[EvalSample]] = []
    longest_prompt = 0
    for sample in sorted(
        samples, key=lambda sample: (-expected_length(sample, max_new_tokens), -len(sample.input_ids))
    ):
        longest_prompt = max(longest_prompt, len(sample.input_ids))
        rows = len(batches[-1]) + 1 if batches else 0
        if not batches or rows > budget.rows or rows * (longest_prompt + max_new_tokens) > budget.tokens:
            batches.append([])
            longest_prompt = len(sample.input_ids)
        batches[-1].append(sample)
    return batches


def cost(batch: Sequence[EvalSample], max_new_tokens: int) -> int:
    """Tokens that a batch makes the model process, padding included: what shares and progress are measured in."""
    longest_prompt = max(len(sample.input_ids) for sample in batch)
    return len(batch) * (longest_prompt + max(expected_length(sample, max_new_tokens) for sample in batch))


def collate(batch: Sequence[EvalSample], pad_token_id: int) -> dict[str, Any]:
    """input_ids, attention_mask: [B, P]; beside them `samples` and `output_ids`, which no model may see.

    A batch without samples is a prompt of one token: its process takes part in the others' forward passes.
    """
    inputs = pad_left([sample.input_ids for sample in batch] or [[pad_token_id]], pad_token_id)
    return {
        **inputs,
        "samples": list(batch),
        "output_ids": [sample.references for sample in batch],
    }


# ---- results


class Answers:
    """Generated ids as people read them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.control_ids = control_ids(tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """Without the token at the end that stopped it, and without those that steer and are no text."""
        # By id: the same spelling typed as text is made of other ids, and stays. A stop token may be an ordinary one
        # (a newline, for some base models): only the one at the end stops anything.
        ends = bool(ids) and ids[-1] in self.stop_ids
        return self.raw([token for token in ids[: len(ids) - ends] if token not in self.control_ids])

    def raw(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Results:
    """Turns generated ids into predictions and has them on disk before the next batch."""

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        on_batch: Callable[[Sequence[EvalSample], int], None] = lambda samples, num_tokens: None,
    ) -> None:
        """on_batch: told of each batch's samples and number of new tokens once its predictions are on disk."""
        self.path = path
        self.on_batch = on_batch
        self.answers = Answers(tokenizer, stop_ids)

    def append(
        self, samples: Sequence[EvalSample], generated: torch.Tensor, references: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """generated: [B, N], the new ids, anything after a row's first stop token being padding."""
        if not samples:
            return
        answers = [until_stop(row, self.answers.stop_ids) for row in generated.tolist()]
        predictions = [self._prediction(*row) for row in zip(samples, answers, references, strict=True)]
        append_predictions(self.path, predictions)
        self.on_batch(samples, sum(len(ids) for ids, _ in answers))

    def _prediction(
        self, sample: EvalSample, answer: tuple[Sequence[int], bool], references: Sequence[Sequence[int]]
    ) -> Prediction:
        ids, stopped = answer
        texts = [self.answers.text(reference) for reference in references]
        return Prediction(
            id=sample.id,
            turn=sample.turn,
            prompt=self.answers.raw(sample.input_ids),
            prediction=self.answers.text(ids),
            prediction_raw=self.answers.raw(ids),
            reference=texts if len(texts) > 1 else texts[0],
            stop_reason="stop" if stopped else "length",
        )


def until_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> tuple[list[int], bool]:
    """The ids up to and with the first stop token, and whether there was one."""
    for index, token in enumerate(ids):
        if token in stop_ids:
            return list(ids[: index + 1]), True
    return list(ids), False


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that steer and are no text. Added ones that a reply is made of (`<tool_call>`, `<think>`) do not count."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return frozenset(added | set(tokenizer.all_special_ids))
