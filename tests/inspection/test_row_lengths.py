"""What a `max_length` would cost is what it costs."""

import random

import pytest

from chatlora.config import OverLength
from chatlora.inspection.lengths import Lengths, lengths_of
from chatlora.rendering.examples import Draft, NothingFits, fitted

LOOKS: tuple[OverLength, ...] = ("fit", "cut", "drop")


def drafts(draw: random.Random) -> list[Draft]:
    """A row of one to three examples, each of one to four replies."""
    row = []
    for _ in range(draw.randint(1, 3)):
        spans, position = [], 0
        for _ in range(draw.randint(1, 4)):
            start = position + draw.randint(1, 20)
            position = start + draw.randint(1, 20)
            spans.append((start, position))
        row.append(Draft(list(range(position + draw.randint(0, 3))), spans, []))
    return row


def really_lost(rows: list[list[Draft]], max_length: int, over_length: OverLength) -> tuple[int, int]:
    """By the code that trains."""
    losers = targets = 0
    for row in rows:
        wanted = sum(draft.num_targets() for draft in row)
        try:
            kept, _ = fitted(row, max_length, over_length, None)
        except NothingFits:
            kept = []
        lost = wanted - sum(draft.num_targets() for draft in kept)
        losers, targets = losers + (lost > 0), targets + lost
    return losers, targets


@pytest.mark.parametrize("over_length", LOOKS)
def test_what_would_be_lost_is_what_rendering_loses(over_length: OverLength) -> None:
    draw = random.Random(0)
    rows = [drafts(draw) for _ in range(60)]
    lengths = lengths_of(("", [draft.example() for draft in row]) for row in rows)
    assert lengths.num_targets == sum(draft.num_targets() for row in rows for draft in row)
    for max_length in range(2, 180):
        assert lengths.lost(max_length, over_length) == really_lost(rows, max_length, over_length), max_length


def test_the_other_looks_at_length_are_told_apart() -> None:
    """The comparison above would see one taken for another."""
    draw = random.Random(0)
    rows = [drafts(draw) for _ in range(60)]
    lengths = lengths_of(("", [draft.example() for draft in row]) for row in rows)
    assert len({lengths.lost(40, over_length) for over_length in LOOKS}) == 3


def of_lengths(*tokens: int) -> Lengths:
    return lengths_of(("", [Draft(list(range(each)), [(1, each)], []).example()]) for each in tokens)


@pytest.mark.parametrize("tokens", [(1,), (5, 5), (80, 96, 113), (2, 100_000), tuple(range(1, 3_000, 7))])
def test_the_histogram_has_every_row_once(tokens: tuple[int, ...]) -> None:
    bins = of_lengths(*tokens).histogram()
    assert sum(rows for _, _, rows in bins) == len(tokens)
    assert all(low <= high for low, high, _ in bins)
    for low, high, rows in bins:
        assert rows == sum(low <= each <= high for each in tokens)
    assert bins[0][2]
    assert bins[-1][2]


@pytest.mark.parametrize(("longest", "chosen", "limits"), [(113, 512, [512]), (113, 80, [80, 128])])
def test_limits_end_where_nothing_is_lost(longest: int, chosen: int, limits: list[int]) -> None:
    assert of_lengths(10, longest).limits(chosen) == limits


def test_limits_are_powers_of_two_and_the_one_chosen() -> None:
    assert of_lengths(3_000).limits(1_000) == [512, 1_000, 1_024, 2_048, 4_096]
