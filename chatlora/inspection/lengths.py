"""How long the rows are, and what each `data.max_length` would cost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from chatlora.config import OverLength
from chatlora.inspection.pieces import spans
from chatlora.rendering.examples import Example

SHORTEST, MOST_LIMITS = 512, 6  # of the values of max_length that are looked at
MOST_BINS = 12


@dataclass(frozen=True)
class Lengths:
    """places: of N rows; rows: int64 [N], tokens of each row, that of its longest example; replies: int64 [M, 3], of
    every reply its row, start and end. Of rows that nothing shortened."""

    places: Sequence[str]
    rows: np.ndarray
    replies: np.ndarray

    def lost(self, max_length: int, over_length: OverLength) -> tuple[int, int]:
        """(rows, targets) that this `max_length` would cost: rows that lose something, targets lost."""
        row, start, end = self.replies.T
        if over_length == "cut":
            lost = end - np.clip(max_length, start, end)
        elif over_length == "drop":
            lost = (end - start) * (self.rows[row] > max_length)
        else:
            lost = (end - start) * (end > max_length)
        return int(np.unique(row[lost > 0]).size), int(lost.sum())

    @property
    def num_targets(self) -> int:
        return int((self.replies[:, 2] - self.replies[:, 1]).sum())

    def limits(self, chosen: int) -> list[int]:
        """The values of `max_length` worth a look: powers of two up to the first that costs nothing, and `chosen`."""
        longest = int(self.rows.max(initial=1))
        lowest = min(SHORTEST, chosen)
        enough = max(SHORTEST if chosen >= SHORTEST else 1, 1 << (longest - 1).bit_length())
        powers = [enough >> shift for shift in range(MOST_LIMITS) if enough >> shift >= lowest]
        return sorted({*powers, chosen})

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, rows): bins that widen with the length, as fine as `MOST_BINS` allow."""
        if not self.rows.size:
            return []
        for parts in (8, 4, 2, 1):  # of each power of two
            edges = [0, *(part << power for power in range(32) for part in range(parts, 2 * parts))]
            below = sum(edge < self.rows.min() for edge in edges) - 1
            kept = edges[below : sum(edge < self.rows.max() for edge in edges) + 1]
            if len(kept) <= MOST_BINS + 1:
                break
        counts, _ = np.histogram(self.rows, [edge + 0.5 for edge in kept])
        return [(low + 1, high, int(count)) for low, high, count in zip(kept, kept[1:], counts, strict=False)]


def lengths_of(rows: Iterable[tuple[str, Sequence[Example]]]) -> Lengths:
    """rows: the place of each and its examples, whole."""
    places, longest, replies = [], [], []
    for number, (place, examples) in enumerate(rows):
        places.append(place)
        longest.append(max(len(example.input_ids) for example in examples))
        for example in examples:
            replies += [(number, start, end) for start, end, wanted in spans(example.labels) if wanted]
    return Lengths(places, np.asarray(longest, np.int64), np.asarray(replies, np.int64).reshape(-1, 3))
