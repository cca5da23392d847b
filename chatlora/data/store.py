"""Examples on disk: one Arrow file, memory-mapped, in a folder that is built once and checked whenever it is opened.

A folder's name says what it was made from, so it never goes stale. A lock lets one process of a machine build while
the others wait, and a folder that is broken is built again.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from chatlora.cache import mark_used, written_cache
from chatlora.data.likenesses import COMPARED, LIKENESS, Likenesses
from chatlora.disk import sha256_of, sweep, written_beside
from chatlora.reading.likeness import Likeness
from chatlora.rendering.examples import IGNORE_INDEX, Example

ROWS_PER_BATCH = 256  # examples in one record batch: what a lookup divides by
EXAMPLES = "examples.arrow"
RECORD = "record.json"  # written last: the hash of the Arrow file, and what the builder wants remembered
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("place", pa.string()),
        ("source", pa.int32()),
        ("turns", pa.int32()),
        ("length", pa.int32()),
        ("num_targets", pa.int32()),
        *LIKENESS,
    ]
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One example with where it comes from: `source` counts the sources from 0.

    `turns` are those of its whole row on the row's first example, and 0 on the others; `likeness` is there alone too.
    """

    example: Example
    place: str
    source: int
    turns: int
    likeness: Likeness | None = None


class ExampleStore:
    """The examples of one folder, in file order. N: their number.

    lengths, num_targets, sources, turns: int32 [N]. record: what the builder returned.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.record = record
        reader = pa.ipc.open_file(pa.memory_map(str(folder / EXAMPLES)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self.lengths = self._column("length")
        self.num_targets = self._column("num_targets")
        self.sources = self._column("source")
        self.turns = self._column("turns")

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id in any example, -1 where there is none."""
        largest = (pc.max(batch.column("input_ids").flatten()).as_py() for batch in self._batches)
        return max((id for id in largest if id is not None), default=-1)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        return [Example(self._ids(index, "input_ids"), self._ids(index, "labels")) for index in map(int, indices)]

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        return [str(self._cell(index, "place").as_py()) for index in map(int, indices)]

    def likenesses(self) -> Likenesses:
        """Those of the rows, in file order."""
        table = pa.Table.from_batches([batch.select(LIKENESS.names) for batch in self._batches], LIKENESS)
        rows = table.select(COMPARED).filter(pa.array(self.turns > 0))
        return Likenesses(rows, table.column("sketch").chunks, self.row_places)

    def examples_of(self, rows: np.ndarray) -> np.ndarray:
        """int64: the positions of the examples of some rows, bool by row."""
        return np.flatnonzero(rows[np.cumsum(self.turns > 0) - 1]) if len(self) else np.zeros(0, np.int64)

    def row_places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Where the rows of these numbers stand, from 0."""
        return self.places(np.flatnonzero(self.turns > 0)[np.asarray(rows, np.int64)])

    def _ids(self, index: int, column: str) -> list[int]:
        ids: list[int] = self._cell(index, column).values.to_numpy().tolist()
        return ids

    def _cell(self, index: int, column: str) -> Any:
        batch, row = divmod(index, ROWS_PER_BATCH)
        return self._batches[batch].column(column)[row]

    def _column(self, name: str) -> np.ndarray:
        parts = [batch.column(name).to_numpy() for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def built_once(folder: Path, build: Callable[[Path], dict[str, Any]]) -> ExampleStore:
    """The store in `folder`; where there is none that is whole, `build(partial_folder)` makes it under a lock."""
    store = _opened(folder)
    if store is not None:
        return store
    with written_cache(folder.parent), FileLock(f"{folder}.lock"):
        store = _opened(folder)  # another process may have built it while this one waited
        if store is not None:
            return store
        sweep(folder.parent, folder.name)
        shutil.rmtree(folder, ignore_errors=True)  # a broken one
        with written_beside(folder) as partial:
            partial.mkdir()
            record = {**build(partial), "sha256": sha256_of(partial / EXAMPLES)}
            (partial / RECORD).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        store = _opened(folder)
        assert store is not None, f"{folder} is broken although it was just written"
        return store


def write_examples(folder: Path, stored: Iterable[Stored]) -> None:
    with pa.OSFile(str(folder / EXAMPLES), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in _batched(stored):
            writer.write_batch(batch)


def _batched(stored: Iterable[Stored]) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, Any]] = []
    for item in stored:
        rows.append(_as_columns(item))
        if len(rows) == ROWS_PER_BATCH:
            yield pa.RecordBatch.from_pylist(rows, SCHEMA)
            rows.clear()
    if rows:
        yield pa.RecordBatch.from_pylist(rows, SCHEMA)


def _as_columns(item: Stored) -> dict[str, Any]:
    labels = item.example.labels
    return {
        "input_ids": item.example.input_ids,
        "labels": labels,
        "place": item.place,
        "source": item.source,
        "turns": item.turns,
        "length": len(item.example.input_ids),
        "num_targets": count_targets(labels),
        **({} if item.likeness is None else asdict(item.likeness)),
    }


def count_targets(labels: Sequence[int]) -> int:
    """Targets that a model is asked for: nothing in its own conversation predicts the first token."""
    return len(labels) - 1 - labels[1:].count(IGNORE_INDEX)


def _opened(folder: Path) -> ExampleStore | None:
    """The store, if it is there and every byte of it is as it was written."""
    mark_used(folder / RECORD)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["sha256"] != sha256_of(folder / EXAMPLES):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ExampleStore(folder, record)
