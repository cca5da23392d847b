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
Places = Callable[[Sequence[int] | np.ndarray], list[str]]


class Likenesses:
    """N rows. whole, answer, group, first_prompt, last_prompt: uint64 [N].

    prompts: uint64 [P], those of one row after the other; prompt_rows: which row each belongs to, int64 [P].
    """

    def __init__(self, table: Any, places: Places) -> None:
        self._table, self._places = table, places
        self.whole, self.answer, self.group = (self._column(name) for name in ("whole", "answer", "group"))
        lists = table.column("prompts").combine_chunks()
        ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
        self.prompts = lists.flatten().to_numpy()
        self.prompt_rows = np.repeat(np.arange(len(self)), np.diff(ends, prepend=0))
        self.last_prompt = self.prompts[ends - 1]
        self.first_prompt = (
            self.prompts[np.concatenate([[0], ends[:-1]]).astype(np.int64)] if len(self) else self.prompts
        )

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @classmethod
    def of(cls, rows: Iterable[tuple[Likeness, str]]) -> "Likenesses":
        likenesses, places = [], []
        for likeness, place in rows:
            likenesses.append(asdict(likeness))
            places.append(place)
        return cls(pa.Table.from_pylist(likenesses, LIKENESS), lambda rows: [places[row] for row in rows])

    def among(self, rows: np.ndarray) -> "Likenesses":
        """Those of some rows: bool [N]."""
        numbers = np.flatnonzero(rows)
        return Likenesses(self._table.filter(pa.array(rows)), lambda chosen: self._places(numbers[np.asarray(chosen)]))

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        return self._places(rows)

    def sketches(self) -> np.ndarray:
        """uint16 [N, NUM_MINIMA]."""
        chunks = [_bytes_of(chunk).view(np.uint16) for chunk in self._table.column("sketch").chunks if len(chunk)]
        return np.concatenate([np.zeros(0, np.uint16), *chunks]).reshape(-1, NUM_MINIMA)

    def _column(self, name: str) -> np.ndarray:
        return np.asarray(self._table.column(name).to_numpy())


def _bytes_of(chunk: Any) -> np.ndarray:
    """uint8: what the cells of a binary column hold, one after the other; not copied."""
    _, offsets, values = chunk.buffers()
    begin, end = np.frombuffer(offsets, np.int32)[[chunk.offset, chunk.offset + len(chunk)]]
    return np.frombuffer(values, np.uint8)[begin:end]
