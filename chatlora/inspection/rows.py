"""Which rows a person looks at: one that is named, the longest, those that are most likely not what was meant."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chatlora.data.store import ExampleStore
from chatlora.errors import DataError
from chatlora.inspection.lengths import Lengths
from chatlora.rendering.examples import Example

SHOWN = 3  # rows of a choice
_NUMBER = re.compile(r"(\d+)\]?$")


@dataclass(frozen=True)
class Rows:
    """The rows of a store that became examples. N: their number.

    first: int64 [N + 1], the position of each row's first example, and the end.
    """

    store: ExampleStore

    @cached_property
    def first(self) -> np.ndarray:
        return np.append(np.flatnonzero(self.store.turns > 0), len(self.store))

    def __len__(self) -> int:
        return len(self.first) - 1

    def examples(self, row: int) -> list[Example]:
        return self.store.fetch(range(self.first[row], self.first[row + 1]))

    def place(self, row: int) -> str:
        return self.store.places([self.first[row]])[0]

    @cached_property
    def places(self) -> list[str]:
        return self.store.places(self.first[:-1])

    @cached_property
    def targets_per_turn(self) -> np.ndarray:
        targets = np.add.reduceat(self.store.num_targets, self.first[:-1]) if len(self) else np.zeros(0)
        return np.asarray(targets / self.store.turns[self.first[:-1]])


class Chosen(NamedTuple):
    """A row to show. row: its number in Rows, None where nothing of it is trained; why: it is shown."""

    place: str
    row: int | None
    why: str


def spread(rows: Rows) -> list[Chosen]:
    """A few, from all over the rows."""
    numbers = sorted({len(rows) * part // SHOWN for part in range(SHOWN)}) if len(rows) else []
    return [Chosen(rows.place(number), number, "") for number in numbers]


def longest(rows: Rows, lengths: Lengths) -> list[Chosen]:
    """By what they are before `max_length`: also those of which it leaves a part, or nothing."""
    number_of = {place: number for number, place in enumerate(rows.places)}
    order = np.argsort(-lengths.rows, kind="stable")[:SHOWN]
    return [
        Chosen(place, number_of.get(place), f"one of the longest: {lengths.rows[at]:,} tokens whole")
        for at, place in ((int(at), lengths.places[at]) for at in order)
    ]


def named(wanted: str, rows: Rows, others: Mapping[str, str]) -> list[Chosen]:
    """`17`: line or row 17 of each source; `FILE:17`, or any place as the ledger writes it. others: what the ledger
    says of rows by place, set aside ones among them. Raises DataError where there is no such row."""
    is_it = _of_number(wanted) if wanted.isdecimal() else _of_place(wanted)
    found = [Chosen(place, number, others.get(place, "")) for number, place in enumerate(rows.places) if is_it(place)]
    known = {each.place for each in found}
    found += [Chosen(place, None, why) for place, why in others.items() if place not in known and is_it(place)]
    if not found:
        last = f"the last is {rows.places[-1]}" if len(rows) else "there are none"
        raise DataError(f"--row {wanted}: no row stands there; {last}")
    return found


def _of_number(wanted: str) -> Callable[[str], bool]:
    return lambda place: (found := _NUMBER.search(place)) is not None and int(found[1]) == int(wanted)


def _of_place(wanted: str) -> Callable[[str], bool]:
    return lambda place: place == wanted or place.endswith(f"/{wanted}") or place == f"{Path(wanted).absolute()}"


def risky(rows: Rows, others: Mapping[str, str]) -> list[Chosen]:
    """Those that the ledger names, one for each reason, then those that look least like what was meant."""
    number_of = {place: number for number, place in enumerate(rows.places)}
    by_reason: dict[str, Chosen] = {}
    for place, why in others.items():
        by_reason.setdefault(why.split(":")[0], Chosen(place, number_of.get(place), why))
    return [*by_reason.values(), *_suspicious(rows)]


def _suspicious(rows: Rows) -> Iterator[Chosen]:
    looks: Sequence[tuple[str, Iterable[int]]] = (
        ("the shortest replies", np.argsort(rows.targets_per_turn, kind="stable")),
        ("the longest replies", np.argsort(-rows.targets_per_turn, kind="stable")),
    )
    seen: set[int] = set()
    for why, numbers in looks:
        number = next((int(each) for each in numbers if int(each) not in seen), None)
        if number is not None:
            seen.add(number)
            yield Chosen(rows.place(number), number, why)
