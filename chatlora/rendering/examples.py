"""What rendering makes of a conversation, and what is left of it where it is too long."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from chatlora.config import OverLength
from chatlora.errors import DataError, SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering.limits import characters_in
from chatlora.rendering.turns import Turn

IGNORE_INDEX = -100

TOO_LONG = "longer than max_length"
NO_REPLY_FITS = "longer than max_length: no reply fits"
NO_TARGET_LEFT = "longer than max_length: no target is left after the cut"
CHARACTERS_PER_TOKEN = 1_000  # more than any token has
PROMPT_TOO_LONG = "the prompt is longer than max_prompt_length"


@dataclass(frozen=True, slots=True)
class Example:
    """`labels[i]` is `input_ids[i]` where the model must generate token i, else IGNORE_INDEX. Not shifted."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class EvalExample:
    """A prompt, the ids of the reference reply with its stop token, and which assistant turn it is, from 0."""

    input_ids: list[int]
    output_ids: list[int]
    turn: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's examples; supervised turns kept, and turns and targets lost to `over_length`.

    altered: of the turns kept, how many the template changed without losing anything, by kind.
    """

    examples: tuple[Example, ...]
    turns: int
    lost_turns: int
    lost_targets: int
    altered: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RenderedForEvaluation:
    """Samples (it iterates as these), (turn, reason) of those set aside, how many references were cut, and altered."""

    examples: tuple[EvalExample, ...]
    set_aside: tuple[tuple[int, str], ...]
    cut_references: int
    altered: Mapping[str, int]

    def __iter__(self) -> Iterator[EvalExample]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, slots=True)
class Draft:
    """An example before lengths are looked at: one span (start, end) a turn."""

    ids: list[int]
    spans: list[tuple[int, int]]
    turns: list[Turn]

    def example(self) -> Example:
        labels = [IGNORE_INDEX] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return Example(self.ids, labels)

    def num_targets(self) -> int:
        return sum(end - start for start, end in self.spans)


def shortened(draft: Draft, max_length: int, over_length: OverLength, place: str | None) -> Draft:
    """The draft within `max_length`; without spans where nothing is left to learn."""
    if len(draft.ids) <= max_length:
        return draft
    if over_length == "error":
        raise too_long(place, len(draft.ids), "data.max_length", max_length)
    if over_length == "drop":
        raise SetAside(TOO_LONG, f"{len(draft.ids)} tokens, max_length is {max_length}")
    if over_length == "cut":
        cut = [(start, min(end, max_length)) for start, end in draft.spans if start < max_length]
        return Draft(draft.ids[:max_length], cut, draft.turns[: len(cut)])
    whole = [(start, end) for start, end in draft.spans if end <= max_length]
    return Draft(draft.ids[: whole[-1][1]] if whole else [], whole, draft.turns[: len(whole)])


def refuse_hopeless(conversation: Conversation, first: int, max_length: int, over_length: OverLength) -> None:
    """Told without rendering: a row of megabytes, whose first reply (to message `first`) cannot end in `max_length`."""
    characters = characters_in([message.content for message in conversation.messages[: first + 1]])
    if characters <= CHARACTERS_PER_TOKEN * max_length:
        return
    if over_length == "error":
        raise too_long(conversation.place, characters // CHARACTERS_PER_TOKEN, "data.max_length", max_length)
    reason = {"fit": NO_REPLY_FITS, "cut": NO_TARGET_LEFT, "drop": TOO_LONG}[over_length]
    raise SetAside(reason, f"{characters:,} characters, max_length is {max_length} tokens")


def too_long(place: str | None, length: int, setting: str, limit: int) -> DataError:
    return DataError(
        f"{place or 'a conversation'}: {length} tokens, and `{setting}` is {limit}; raise it, "
        "or set `data.over_length` to fit, cut or drop"
    )
