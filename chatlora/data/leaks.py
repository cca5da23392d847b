"""Rows that are alike: duplicates and contradictions among those trained on, and what held-out rows share with them.

Exact is: equal but for white space. Nearly the same is: an estimated `SIMILAR` of all five-grams of both rows in common
(Jaccard), found by MinHash in bands; of the rows that agree in a band, each is compared with a few, so that rows that
are all alike cost no more than others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chatlora.data.likenesses import Likenesses, sketches_of

SIMILAR = 0.8
MINIMA_PER_BAND = 8  # 16 bands of 128 minima: of rows with 0.9 of all in common, one pair in some thousands is missed
NEIGHBOURS = 2  # in a band, beside its first and its last row
ENOUGH = 8  # near rows of one row, of its own set and of others: beyond, only those with fewer find more
PAIRS_AT_A_TIME = 1 << 16
EXAMPLES = 10  # of each kind, in the ledger


@dataclass(frozen=True)
class Alike:
    """What the ledger says, and the numbers of the training rows that leak, each with the place of a held-out row.

    duplicates, near_duplicates: training rows that are, or are nearly, an earlier one. contradictions: prompts of
    training rows with several answers. leaks: by held-out set, its rows whose prompt a training row has, or that are
    nearly one. overlaps: the same of the test rows and each validation set.
    """

    duplicates: dict[str, Any]
    near_duplicates: dict[str, Any]
    contradictions: dict[str, Any]
    leaks: dict[str, dict[str, Any]]
    overlaps: dict[str, dict[str, Any]]
    leaking: list[tuple[int, str]]

    def told(self) -> dict[str, Any]:
        """The part of it that stands in ledger.json."""
        kinds = {name: getattr(self, name) for name in ("duplicates", "near_duplicates", "contradictions")}
        return {**kinds, "leaks": self.leaks, "overlaps": self.overlaps}


def find_alike(train: Likenesses, held_out: Mapping[str, Likenesses], compared: Sequence[tuple[str, str]]) -> Alike:
    """held_out: the sets by name. compared: which of them are compared with each other, not only with training rows."""
    sets = {**held_out, "": train}  # the training rows come last: of a near pair the later one is theirs
    near = _Near(sets)
    leaks, leaking = {}, dict[int, str]()
    for name, rows in held_out.items():
        shared = _Shared(rows, train, near.between(name, ""))
        leaks[name] = shared.told() | {"training_rows": len(shared.others())}
        leaking = shared.others() | leaking
    overlaps = {
        f"{one} and {other}": _Shared(held_out[one], held_out[other], near.between(one, other)).told()
        for one, other in compared
    }
    return Alike(
        duplicates=_duplicates(train),
        near_duplicates=_told(near.between("", ""), train, train, "rows"),
        contradictions=_contradictions(train),
        leaks={name: told for name, told in leaks.items() if told["rows"] or told["near"]},
        overlaps={names: told for names, told in overlaps.items() if told["rows"] or told["near"]},
        leaking=sorted(leaking.items()),
    )


# ---- exactly


def _duplicates(rows: Likenesses) -> dict[str, Any]:
    first = _first_of(rows.whole)
    again = np.flatnonzero(first != np.arange(len(rows)))
    return _told(np.stack([again, first[again]], axis=1), rows, rows, "rows")


def _contradictions(rows: Likenesses) -> dict[str, Any]:
    first = _first_of(rows.last_prompt)
    other = np.flatnonzero(rows.answer != rows.answer[first])
    prompts, chosen = np.unique(first[other], return_index=True)
    told = _told(np.stack([other[chosen], prompts], axis=1), rows, rows, "prompts")
    return {**told, "rows": int(np.isin(first, prompts).sum())}


def _first_of(values: np.ndarray) -> np.ndarray:
    """Of each value the position of the first that is equal."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[which])


def _told(pairs: np.ndarray, rows: Likenesses, others: Likenesses, counted: str) -> dict[str, Any]:
    """How many rows stand first in the pairs, int64 [P, 2], and the first of these, by place."""
    found, at = np.unique(pairs[:, 0], return_index=True)
    shown = pairs[at[:EXAMPLES]]
    places = zip(rows.places(shown[:, 0]), others.places(shown[:, 1]), strict=True)
    return {counted: len(found), "examples": [list(pair) for pair in places]}


class _Shared:
    """The rows of a held-out set whose prompt another set asks, at any of its turns, or that ask what one of its turns
    asks; and those that are nearly one of its rows."""

    def __init__(self, rows: Likenesses, others: Likenesses, near: np.ndarray) -> None:
        self._rows, self._others = rows, others
        self._exact = np.concatenate([_equal(rows, others), _equal(others, rows)[:, ::-1]])
        self._near = near[~np.isin(near[:, 0], self._exact[:, 0])]
        self._all = np.concatenate([self._exact, near])

    def others(self) -> dict[int, str]:
        """The rows of the other set, each with the place of a row that it shares something with."""
        found, at = np.unique(self._all[:, 1], return_index=True)
        return dict(zip(found.tolist(), self._rows.places(self._all[at, 0]), strict=True))

    def told(self) -> dict[str, Any]:
        told = _told(self._exact, self._rows, self._others, "rows")
        near = _told(self._near, self._rows, self._others, "near")
        return {**told, **near, "examples": (told["examples"] + near["examples"])[:EXAMPLES]}


def _equal(rows: Likenesses, others: Likenesses) -> np.ndarray:
    """int64 [P, 2]: (row, other) where the last prompt of the one is a prompt of the other.

    Each row, and each other, of which there is such a pair stands in one of those given.
    """
    known, which = np.unique(rows.last_prompt, return_inverse=True)
    found = np.flatnonzero(np.isin(others.prompts, known))
    at = np.searchsorted(known, others.prompts[found])
    row_of, other_of = np.zeros(len(known), np.int64), np.full(len(known), -1)
    row_of[which[::-1]] = np.arange(len(rows))[::-1]
    other_of[at[::-1]] = others.prompt_rows[found[::-1]]
    asked = np.flatnonzero(other_of[which] >= 0)
    each_row = np.stack([asked, other_of[which[asked]]], axis=1)
    return np.concatenate([each_row, np.stack([row_of[at], others.prompt_rows[found]], axis=1)])


# ---- nearly


class _Near:
    """Pairs of rows that are nearly the same and not equal, over all sets, which are numbered through."""

    def __init__(self, sets: Mapping[str, Likenesses]) -> None:
        sizes = [len(rows) for rows in sets.values()]
        self._starts = dict(zip(sets, np.cumsum([0, *sizes])[:-1].tolist(), strict=True))
        self._numbers = {name: number for number, name in enumerate(sets)}
        self._set_of = np.repeat(np.arange(len(sets)), sizes)
        whole = np.concatenate([rows.whole for rows in sets.values()])
        self._first = _first_of(whole ^ (self._set_of.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
        kept = self._first == np.arange(len(whole))  # of equal rows of one set the first stands for all
        chosen = [
            rows.among(kept[begin:][: len(rows)])
            for rows, begin in zip(sets.values(), self._starts.values(), strict=True)
        ]
        pairs = np.flatnonzero(kept)[_near_pairs(sketches_of(chosen), self._set_of[kept])]
        self._pairs = pairs[whole[pairs[:, 0]] != whole[pairs[:, 1]]]

    def between(self, one: str, other: str) -> np.ndarray:
        """int64 [P, 2]: (row of the one, row of the other), where one was given before the other; within a set (row, an
        earlier one), and of equal rows the first alone."""
        numbers = self._set_of[self._pairs]
        pairs = self._pairs[(numbers[:, 0] == self._numbers[one]) & (numbers[:, 1] == self._numbers[other])]
        if one == other:
            return np.asarray(pairs[:, ::-1] - self._starts[one])
        pairs = np.concatenate([pairs, self._equal_to(pairs), self._equal_to(pairs[:, ::-1])[:, ::-1]])
        return np.asarray(pairs - np.array([self._starts[one], self._starts[other]]))

    def _equal_to(self, pairs: np.ndarray) -> np.ndarray:
        """The same pairs with the rows that are equal to the first of each."""
        rows, at = np.unique(pairs[:, 0], return_index=True)
        equal = np.flatnonzero(np.isin(self._first, rows))
        return np.stack([equal, pairs[at[np.searchsorted(rows, self._first[equal])], 1]], axis=1)


def _near_pairs(sketches: np.ndarray, set_of: np.ndarray) -> np.ndarray:
    """int64 [P, 2]: pairs (a, b), a < b, that agree in a band and are similar over all.

    No more are looked for between two rows that both have `ENOUGH`, of their own set or of others as these two.
    """
    size, found = max(1, len(sketches)), np.zeros(0, np.int64)
    partners = np.zeros((2, len(sketches)), np.int64)  # how many each row has of its own set, and of others
    for begin in range(0, sketches.shape[1], MINIMA_PER_BAND):
        band = np.ascontiguousarray(sketches[:, begin : begin + MINIMA_PER_BAND]).view(np.uint64)
        pairs = _neighbours(band[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ band[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F))
        kinds = (set_of[pairs[:, 0]] != set_of[pairs[:, 1]]).astype(np.int64)
        pairs = pairs[(partners[kinds[:, None], pairs] < ENOUGH).any(axis=1)]
        new = _not_among(pairs[:, 0] * size + pairs[:, 1], found)
        similar = [_similar(sketches, new[at : at + PAIRS_AT_A_TIME]) for at in range(0, len(new), PAIRS_AT_A_TIME)]
        a, b = np.divmod(np.concatenate([found[:0], *similar]), size)
        for kind in (0, 1):
            of_kind = (set_of[a] != set_of[b]) == bool(kind)
            partners[kind] += np.bincount(np.concatenate([a[of_kind], b[of_kind]]), minlength=len(sketches))
        found = np.sort(np.concatenate([found, a * size + b]))
    return np.stack(np.divmod(found, size), axis=1)


def _not_among(values: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The values, sorted, each once, that are not in `found`, sorted too; numpy's own sets are slow with such ones."""
    values = np.sort(values)
    values = values[np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]]
    at = np.searchsorted(found, values)
    return np.asarray(values[np.append(found, -1)[at] != values])


def _similar(sketches: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    a, b = np.divmod(pairs, len(sketches))
    return np.asarray(pairs[(sketches[a] == sketches[b]).mean(axis=1) >= SIMILAR])


def _neighbours(keys: np.ndarray) -> np.ndarray:
    """int64 [P, 2]: positions a < b of equal keys: each with the first and the last of its key, and its neighbours."""
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]])[: len(keys)])
    sizes = np.diff(begins, append=len(keys))
    here, first = np.arange(len(keys)), np.repeat(begins, sizes)
    last = first + np.repeat(sizes, sizes) - 1
    partners = [first, last, *(np.minimum(here + lag, last) for lag in range(1, NEIGHBOURS + 1))]
    pairs = np.concatenate([np.stack([np.minimum(here, other), np.maximum(here, other)], axis=1) for other in partners])
    return np.asarray(order[pairs[pairs[:, 0] < pairs[:, 1]]])
