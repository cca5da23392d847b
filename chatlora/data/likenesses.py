"""The likenesses of many rows, as columns: what is drawn and what is compared is found in them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from chatlora.reading.likeness import NUM_MINIMA, Likeness

LIKENESS = pa.schema(
    [
        ("whole", pa.uint64()),
        ("answer", pa.uint64()),
        ("prompts", pa.list_(pa.uint64())),
        ("sketch", pa.binary()),
        ("group", pa.uint64()),
    ]
)
COMPARED = [name for name in LIKENESS.names if name != "sketch"]
Places = Callable[[Sequence[int] | np.ndarray], list[str]]


class Likenesses:
    """N rows. whole, answer, group, first_prompt, last_prompt: uint64 [N].

    prompts: uint64 [P], those of one row after the other; prompt_rows: which row each belongs to, int64 [P]. The
    sketches, ten times as large as the rest, stay where they are until they are asked for.
    """

    def __init__(self, table: Any, sketches: Sequence[Any], places: Places, numbers: np.ndarray | None = None) -> None:
        """table: of the columns COMPARED. sketches: pieces of the column of sketches, which has one of each of the rows
        that `numbers`, int64 [N], counts; empty cells are none."""
        self._table, self._sketches, self._places = table, sketches, places
        self._numbers = np.arange(len(self)) if numbers is None else numbers
        self.whole, self.answer, self.group = (self._column(name) for name in ("whole", "answer", "group"))
        lists = table.column("prompts").combine_chunks()
        ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
        begins = np.concatenate([[0], ends])[:-1].astype(np.int64)
        self.prompts = lists.flatten().to_numpy()
        self.prompt_rows = np.repeat(np.arange(len(self)), ends - begins)
        self.first_prompt, self.last_prompt = self.prompts[begins], self.prompts[ends - 1]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @classmethod
    def of(cls, rows: Iterable[tuple[Likeness, str]]) -> "Likenesses":
        likenesses, places = [], []
        for likeness, place in rows:
            likenesses.append(asdict(likeness))
            places.append(place)
        table = pa.Table.from_pylist(likenesses, LIKENESS)
        return cls(table.select(COMPARED), table.column("sketch").chunks, lambda rows: [places[row] for row in rows])

    def among(self, rows: np.ndarray) -> "Likenesses":
        """Those of some rows: bool [N]."""
        numbers = np.flatnonzero(rows)
        places: Places = lambda chosen: self._places(numbers[np.asarray(chosen)])  # noqa: E731
        return Likenesses(self._table.filter(pa.array(rows)), self._sketches, places, self._numbers[numbers])

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        return self._places(rows)

    def write_sketches(self, to: np.ndarray) -> None:
        """to: uint16 [N, NUM_MINIMA]."""
        before = 0
        for piece in self._sketches:
            found = _bytes_of(piece).view(np.uint16).reshape(-1, NUM_MINIMA)
            begin, end = np.searchsorted(self._numbers, [before, before + len(found)])
            to[begin:end] = found[self._numbers[begin:end] - before]
            before += len(found)

    def _column(self, name: str) -> np.ndarray:
        return np.asarray(self._table.column(name).to_numpy())


def sketches_of(sets: Sequence[Likenesses]) -> np.ndarray:
    """uint16 [N, NUM_MINIMA], of all rows of all sets."""
    ends = np.cumsum([0, *(len(rows) for rows in sets)])
    found = np.empty((int(ends[-1]), NUM_MINIMA), np.uint16)
    for rows, begin, end in zip(sets, ends[:-1], ends[1:], strict=True):
        rows.write_sketches(found[begin:end])
    return found


def _bytes_of(piece: Any) -> np.ndarray:
    """uint8: what the cells of a binary column hold, one after the other; not copied."""
    _, offsets, values = piece.buffers()
    begin, end = np.frombuffer(offsets, np.int32)[[piece.offset, piece.offset + len(piece)]] if len(piece) else (0, 0)
    return np.frombuffer(values, np.uint8)[begin:end] if end > begin else np.zeros(0, np.uint8)
