"""The usual ways in which a mask is wrong: each a change of an example's labels that the proof must refuse."""

from chatlora.rendering.renderer import IGNORE_INDEX, Example
from tests.exactness import spans


def off_by_one(example: Example) -> list[int]:
    return [*example.labels[1:], IGNORE_INDEX]


def shifted(example: Example) -> list[int]:
    """Targets begin one token late and end one token late."""
    return supervise(example, [(start + 1, min(end + 1, len(example.labels))) for start, end in spans(example)])


def header_supervised(example: Example) -> list[int]:
    """What stands before the first reply is learned up to and including the reply."""
    (start, end), *others = spans(example)
    return supervise(example, [(max(0, start - 5), end), *others])


def generation_prompt_supervised(example: Example) -> list[int]:
    *others, (start, end) = spans(example)
    return supervise(example, [*others, (start - 1, end)])


def stop_token_lost(example: Example) -> list[int]:
    *others, (start, end) = spans(example)
    return supervise(example, [*others, (start, end - 1)])


def first_stop_token_lost(example: Example) -> list[int]:
    (start, end), *others = spans(example)
    return supervise(example, [(start, end - 1), *others])


def first_token_lost(example: Example) -> list[int]:
    (start, end), *others = spans(example)
    return supervise(example, [(start + 1, end), *others])


def turn_lost(example: Example) -> list[int]:
    return supervise(example, spans(example)[1:])


def everything_supervised(example: Example) -> list[int]:
    return list(example.input_ids)


def supervise(example: Example, spans: list[tuple[int, int]]) -> list[int]:
    labels = [IGNORE_INDEX] * len(example.labels)
    for start, end in spans:
        labels[start:end] = example.input_ids[start:end]
    return labels


BROKEN = (
    off_by_one,
    shifted,
    header_supervised,
    generation_prompt_supervised,
    stop_token_lost,
    first_stop_token_lost,
    first_token_lost,
    turn_lost,
    everything_supervised,
)
