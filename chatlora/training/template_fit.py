"""Whether the model knows the chat template: what it thinks of the template's own tokens, before a step is paid for.

A model that was trained with a template expects what stands between two messages almost surely, in any language and
whatever they say. Under another template each of these tokens costs it nats, in every row, and training learns them
first. Measured with SmolLM2-135M-Instruct on English and Chinese rows: 0.0 to 0.4 nats a token with ChatML, its own,
and 1.0 to 4.4 with five others. Stop tokens depend on the replies too: 0.4 to 5.5, and 0.6 to 11.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from chatlora.config import Config
from chatlora.data.dataset import PreparedData, Say
from chatlora.distributed.runtime import Runtime
from chatlora.distributed.zero3 import layer_by_layer
from chatlora.inspection.tokens import token_texts
from chatlora.reading.conversation import Conversation
from chatlora.rendering.examples import IGNORE_INDEX, Example
from chatlora.terminal import harmless

MOST_ROWS, MOST_TOKENS, LONGEST = 8, 1_024, 512  # LONGEST: tokens of one row, all of whose logits exist at a time
GAPS = 2  # of a row, the first ones: further on the model has learned the template from the row itself
SHORTEST = 4  # characters of a message: less may be found where it is not meant
EXPECTED = {"between": 0.65, "end": 10.0, "stop": 10.0}  # nats a token on average; more is told
FAR_ABOVE = 5.0  # nats of a token that is named
REMEDY = (
    "the model was hardly trained with this chat template. If it is a chat model, take its own template "
    "(model.chat_template: null, and the tokenizer of that very model) or one of its family (embedded:NAME); if it is "
    "a base model, the first steps go into learning the template, and tokens that it never saw may need "
    "lora.target_modules that reach the embeddings"
)


@dataclass(frozen=True)
class Measured:
    """A row's ids, and of each token what it is: see `kinds_of`."""

    ids: list[int]
    kinds: list[str]


@dataclass(frozen=True)
class TemplateFit:
    """By kind of token, its mean loss in nats and how many were measured; mean loss by text of those far above."""

    means: Mapping[str, tuple[float, int]]
    surprising: Mapping[str, float]
    why_not: str = "no row's messages stand in it as they are"

    @property
    def is_foreign(self) -> bool:
        return any(mean > EXPECTED[kind] for kind, (mean, _) in self.means.items())

    def lines(self) -> list[str]:
        if not self.means:
            return [f"fit of the chat template: not measured, {self.why_not}"]
        words = {"between": "between messages", "end": "where a message ends", "stop": "where a reply stops"}
        told = [f"{mean:.2f} nats {words[kind]} ({count:,} tokens)" for kind, (mean, count) in self.means.items()]
        lines = [f"fit of the chat template, loss of a token before step 1: {', '.join(told)}"]
        if self.is_foreign:
            spelled = {harmless(token).replace("\n", "\\n"): loss for token, loss in self.surprising.items()}
            named = ", ".join(f"'{token}' {loss:.1f}" for token, loss in spelled.items())
            lines.append(f"WARNING: {REMEDY}{f'. Least expected, in nats: {named}' if named else ''}")
        return lines

    def record(self) -> dict[str, Any]:
        means = {kind: {"loss": round(mean, 4), "tokens": count} for kind, (mean, count) in self.means.items()}
        return {**means, "surprising": {token: round(loss, 2) for token, loss in self.surprising.items()}}


def template_fit(
    model: nn.Module, tokenizer: Any, data: PreparedData, config: Config, runtime: Runtime, say: Say
) -> TemplateFit:
    """Of a model that no engine has wrapped yet, and said; nothing of the model, and no draw, is changed. Collective.

    Every rank makes the passes, of rank 0's rows: under DeepSpeed's stage 3 a pass takes them all.
    """
    if next(model.parameters()).device.type != runtime.device.type:  # FSDP moves it when it divides it
        return TemplateFit({}, {}, "the model is not on its device yet")
    found = [vars(row) for row in rows_to_measure(tokenizer, data, config.data.system)] if runtime.is_main else []
    rows = [Measured(**row) for row in json.loads(runtime.broadcast_text(json.dumps(found)))]
    modes = [(module, module.training) for module in model.modules()]  # an adapter's may differ from its base's
    model.eval()
    with layer_by_layer(model):
        of_rows = [token_losses(model, row.ids, runtime.device) for row in rows]
    for module, mode in modes:
        module.training = mode
    fit = fit_of(tokenizer, rows, of_rows)
    for line in fit.lines():
        say(line)
    return fit


def fit_of(tokenizer: Any, rows: Sequence[Measured], losses: Sequence[Sequence[float]]) -> TemplateFit:
    """losses: of each row's tokens but the first."""
    by_kind, by_token = defaultdict[str, list[float]](list), defaultdict[int, list[float]](list)
    for row, of_row in zip(rows, losses, strict=True):
        for token, kind, loss in zip(row.ids[1:], row.kinds[1:], of_row, strict=True):
            if kind:
                by_kind[kind].append(loss)
                by_token[token].append(loss)
    means = {kind: (_mean(by_kind[kind]), len(by_kind[kind])) for kind in EXPECTED if by_kind[kind]}
    worst = sorted(((_mean(of_token), token) for token, of_token in by_token.items()), reverse=True)
    surprising = {tokenizer.decode([token]): loss for loss, token in worst[:5] if loss > FAR_ABOVE}
    return TemplateFit(means, surprising)


@torch.no_grad()
def token_losses(model: nn.Module, ids: Sequence[int], device: torch.device) -> list[float]:
    """In nats, of every token but the first, which nothing predicts."""
    given = torch.tensor([list(ids)], device=device)
    logits = model(input_ids=given, use_cache=False).logits[0, :-1].float()
    losses: list[float] = functional.cross_entropy(logits, given[0, 1:], reduction="none").tolist()
    return losses


# ---- what is measured


def rows_to_measure(tokenizer: Any, data: PreparedData, system: str | None) -> list[Measured]:
    """The first rows of each source, no more of them and of their tokens than the limits say."""
    rows: list[Measured] = []
    room = MOST_TOKENS
    for example, conversation in _first_rows(data, system):
        kinds = kinds_of(tokenizer, example, conversation)[: min(room, LONGEST)]
        while kinds and not kinds[-1]:
            kinds.pop()
        if len(kinds) > 1:
            rows.append(Measured(example.input_ids[: len(kinds)], kinds))
            room -= len(kinds)
    return rows


def _first_rows(data: PreparedData, system: str | None) -> Iterator[tuple[Example, Conversation]]:
    train = data.train
    of_each = max(1, MOST_ROWS // len(data.inputs))
    for number, source in enumerate(data.inputs):
        positions = np.flatnonzero(train.store.sources[train.indices] == number)[:of_each]
        wanted = dict(zip(train.places(positions), train.fetch(positions), strict=True))  # the last example of a row
        for conversation in source.conversations(system, []) if wanted else ():
            example = wanted.pop(conversation.place or "", None)
            if example is not None:
                yield example, conversation
            if not wanted:
                break


def kinds_of(tokenizer: Any, example: Example, conversation: Conversation) -> list[str]:
    """`stop` for the last token of each reply, `end` for that behind another message, `between` for the template's
    further tokens up to the next message; empty for all that messages say, before the first and after a few."""
    texts = token_texts(tokenizer, example.input_ids)
    targets = [label != IGNORE_INDEX for label in example.labels]
    kinds = ["stop" if here and not after else "" for here, after in pairwise([*targets, False])]
    starts = list(accumulate(map(len, texts), initial=0))
    for begin, end in islice(_gaps("".join(texts), conversation), GAPS):
        first, last = (int(np.searchsorted(starts, edge)) for edge in (begin, end))
        # A token with a part of a message in it is the message's.
        inside = [index for index in range(first, last) if starts[index] + max(1, len(texts[index])) <= end]
        for index in inside:
            if not targets[index]:
                kinds[index] = "end" if index == first else "between"
    return kinds


def _gaps(text: str, conversation: Conversation) -> Iterator[tuple[int, int]]:
    """Where one message has ended and the next has not begun; no further than every message is found as it is."""
    cursor: int | None = None
    for message in conversation.messages:
        content = message.content.strip()
        start = text.find(content, cursor or 0)
        if message.tool_calls or message.reasoning or len(content) < SHORTEST or start < 0:
            return
        if cursor is not None:
            yield cursor, start
        cursor = start + len(content)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
