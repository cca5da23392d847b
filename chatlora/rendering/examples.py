"""What rendering makes of a conversation, and what is left of it where it is too long."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chatlora.config import OverLength
from chatlora.errors import DataError, SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering.limits import characters_in
from chatlora.rendering.remarks import Remark
from chatlora.rendering.turns import Turn

IGNORE_INDEX = -100

TOO_LONG = "longer than max_length"
NO_REPLY_FITS = "longer than max_length: no reply fits"
NO_TARGET_LEFT = "longer than max_length: no target is left after the cut"
NOTHING_LEFT = {"fit": NO_REPLY_FITS, "cut": NO_TARGET_LEFT, "drop": TOO_LONG}
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

    too_long: the `max_length` that each reply takes which is lost or cut. altered: of the turns kept, how many the
    template changed without losing anything, by kind. remarks: one a message, of each kind that fits it.
    """

    examples: tuple[Example, ...]
    turns: int
    lost_turns: int
    lost_targets: int
    too_long: tuple[int, ...]
    altered: Mapping[str, int]
    remarks: tuple[Remark, ...]


class NothingFits(SetAside):
    """A row of which `max_length` leaves nothing. too_long: the one that each reply takes; None: nobody measured it."""

    def __init__(self, reason: str, detail: str, too_long: tuple[int | None, ...]) -> None:
        super().__init__(reason, detail)
        self.too_long = too_long


@dataclass(frozen=True, slots=True)
class RenderedForEvaluation:
    """Samples (it iterates as these), (turn, reason) of those set aside, how many references were cut; the rest as in
    Rendered."""

    examples: tuple[EvalExample, ...]
    set_aside: tuple[tuple[int, str], ...]
    cut_references: int
    altered: Mapping[str, int]
    remarks: tuple[Remark, ...]

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

    def sample(self, number: int, most: int | None) -> EvalExample:
        """Of one turn, the assistant's `number`th: its prompt, and of its reply at most `most` ids (None: all)."""
        [(start, _)] = self.spans
        return EvalExample(self.ids[:start], self.ids[start:][:most], number)

    def num_targets(self) -> int:
        return sum(end - start for start, end in self.spans)


def fitted(
    drafts: Sequence[Draft], max_length: int, over_length: OverLength, place: str | None
) -> tuple[list[Draft], tuple[int, ...]]:
    """A row's drafts within `max_length`, and the one that each reply takes which is lost or cut.

    Raises NothingFits where no target is left.
    """
    longest = max(len(draft.ids) for draft in drafts)
    if over_length == "error" and longest > max_length:
        raise too_long(place, longest, "data.max_length", max_length)
    needed = [longest if over_length == "drop" else end for draft in drafts for _, end in draft.spans]
    missed = tuple(length for length in needed if length > max_length)
    kept = [] if over_length == "drop" and missed else [_shortened(draft, max_length, over_length) for draft in drafts]
    if not any(draft.spans for draft in kept):
        raise NothingFits(NOTHING_LEFT[over_length], f"{longest} tokens, max_length is {max_length}", missed)
    return kept, missed


def prompts_within(
    drafts: Sequence[Draft],
    order: Sequence[int],
    max_prompt_length: int | None,
    over_length: OverLength,
    place: str | None,
) -> tuple[list[Draft], tuple[tuple[int, str], ...]]:
    """The drafts of one turn each whose prompt is short enough, and (turn, reason) of the others.

    order: the messages that are the assistant's.
    """
    kept, set_aside = [], []
    for draft in drafts:
        [(start, _)], [turn] = draft.spans, draft.turns
        if max_prompt_length is None or start <= max_prompt_length:
            kept.append(draft)
        elif over_length == "error":
            raise too_long(place, start, "evaluation.max_prompt_length", max_prompt_length)
        else:
            reason = f"{PROMPT_TOO_LONG} ({start} tokens, the limit is {max_prompt_length})"
            set_aside.append((order.index(turn.index), reason))
    return kept, tuple(set_aside)


def _shortened(draft: Draft, max_length: int, over_length: OverLength) -> Draft:
    """The draft within `max_length`; without spans where nothing is left to learn."""
    if len(draft.ids) <= max_length:
        return draft
    if over_length == "cut":
        cut = [(start, min(end, max_length)) for start, end in draft.spans if start < max_length]
        return Draft(draft.ids[:max_length], cut, draft.turns[: len(cut)])
    whole = [(start, end) for start, end in draft.spans if end <= max_length]
    return Draft(draft.ids[: whole[-1][1]] if whole else [], whole, draft.turns[: len(whole)])


def refuse_hopeless(
    conversation: Conversation, replies: Sequence[int], max_length: int, over_length: OverLength
) -> None:
    """Told without rendering: a row of megabytes, whose first reply cannot end in `max_length`.

    replies: the messages that are targets.
    """
    characters = characters_in([message.content for message in conversation.messages[: replies[0] + 1]])
    if characters <= CHARACTERS_PER_TOKEN * max_length:
        return
    if over_length == "error":
        raise too_long(conversation.place, characters // CHARACTERS_PER_TOKEN, "data.max_length", max_length)
    detail = f"{characters:,} characters, max_length is {max_length} tokens"
    raise NothingFits(NOTHING_LEFT[over_length], detail, (None,) * len(replies))


def too_long(place: str | None, length: int, setting: str, limit: int) -> DataError:
    return DataError(
        f"{place or 'a conversation'}: {length} tokens, and `{setting}` is {limit}; raise it, "
        "or set `data.over_length` to fit, cut or drop"
    )
