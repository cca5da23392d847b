"""Leaks and duplicates of a run: looked for once, told in the ledger and the first lines, obeyed (`data.on_leak`)."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chatlora.cache import found_once
from chatlora.config import DataConfig
from chatlora.config_rows import UNNAMED
from chatlora.data.leaks import Alike, find_alike
from chatlora.data.likenesses import Likenesses
from chatlora.data.store import ExampleStore
from chatlora.errors import DataError
from chatlora.reading.likeness import likeness_of
from chatlora.reading.scan import Input, code_digest, digest, inputs_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class AlikeRows:
    """told: for ledger.json. left_out: bool, the rows of data.train that leak and are not trained on; into: of each row
    that leaks, the place of one held out."""

    told: dict[str, Any]
    left_out: np.ndarray
    into: dict[int, str]


def alike_in(
    store: ExampleStore,
    rows: Likenesses,
    drawn: Mapping[str, np.ndarray],
    own: Mapping[str, ExampleStore],
    data: DataConfig,
    cache: Path,
    say: Say,
) -> AlikeRows:
    """store, rows: of data.train. drawn: which of its rows a split holds out. own: the validation sets, by name, that
    have other rows. Raises DataError where rows leak and `data.on_leak` says so.
    """
    test = _test_inputs(data, say)
    held = np.any([np.zeros(len(rows), bool), *drawn.values()], axis=0)

    def look() -> Alike:
        sets = {split: rows.among(mine) for split, mine in drawn.items() if mine.any()}
        sets |= {_told_name(name): each.likenesses() for name, each in own.items()}
        if test:
            sets["test"] = _likenesses_of(test, data.system)
        compared = [(name, "test") for name in sets if name != "test" and "test" in sets]
        return find_alike(rows.among(~held), sets, compared)

    stores = {name: each.record["sha256"] for name, each in {"": store, **own}.items()}
    drawn_from = {split: digest_of(mine) for split, mine in drawn.items()}
    key = digest([code_digest(), stores, drawn_from, data.system, [each.identity for each in test]])
    alike = found_once(cache / f"alike-{key}.json", Alike, look)
    if alike.leaks and data.on_leak == "error":
        raise DataError(*(line.strip() for line in _leak_lines(alike.leaks, dropped=False)))
    into = dict(zip(np.flatnonzero(~held)[[row for row, _ in alike.leaking]].tolist(), alike.leaking, strict=True))
    left_out = np.zeros(len(rows), bool)
    if data.on_leak == "drop":
        left_out[list(into)] = True
    told = {**alike.told(), "on_leak": data.on_leak}
    return AlikeRows(told, left_out, {row: place for row, (_, place) in into.items()})


def digest_of(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _told_name(name: str) -> str:
    return name if name == UNNAMED else f"validation set {name}"


def _test_inputs(data: DataConfig, say: Say) -> list[Input]:
    """The test rows that are not drawn. Training needs none: where the hub does not give them, that is said."""
    if isinstance(data.test, float):
        return []
    try:
        return inputs_of(data.test, "test")
    except DataError as error:
        say(f"leaks into data.test are not looked for: {error.problems[0]}")
        return []


def _likenesses_of(inputs: list[Input], system: str | None) -> Likenesses:
    """Of rows that are not rendered here; those that cannot be read are told when they are evaluated."""
    return Likenesses.of(
        (likeness_of(row, system), row.place or "")
        for each in inputs
        for row in each.conversations(system, [])
        if any(message.role == "assistant" for message in row.messages)
    )


def alike_lines(told: Mapping[str, Any]) -> list[str]:
    """For people: what `AlikeRows.told` says, a line each."""
    if not told:
        return []
    lines = []
    for kind, what in (("duplicates", "repeat"), ("near_duplicates", "nearly repeat")):
        if told[kind]["rows"]:
            lines.append(f"{told[kind]['rows']:,} training rows {what} an earlier one ({_example(told[kind])})")
    if told["contradictions"]["prompts"]:
        prompts, rows = told["contradictions"]["prompts"], told["contradictions"]["rows"]
        example = _example(told["contradictions"])
        lines.append(f"{prompts:,} prompts of training rows have several answers, in {rows:,} rows ({example})")
    lines += _leak_lines(told["leaks"], dropped=told["on_leak"] == "drop")
    for names, each in told["overlaps"].items():
        lines.append(f"{names} share: {_shared(each)}")
    return lines


def _leak_lines(leaks: Mapping[str, Any], *, dropped: bool) -> list[str]:
    remedy = "{} left out" if dropped else "data.on_leak: drop leaves {} out"
    start = "" if dropped else "WARNING: "
    return [
        f"{start}{name} shares with the training rows: {_shared(each)}; "
        + remedy.format(_number(each["training_rows"], "training row"))
        for name, each in leaks.items()
    ]


def _shared(each: Mapping[str, Any]) -> str:
    prompts = f"the prompt{'s' * (each['rows'] != 1)} of {_number(each['rows'], 'row')}" if each["rows"] else ""
    near = f"nearly all words of {_number(each['near'], 'row')}" if each["near"] else ""
    return f"{' and '.join(filter(None, (prompts, near)))} ({_example(each)})"


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _example(each: Mapping[str, Any]) -> str:
    here, there = each["examples"][0]
    return f"e.g. {here} and {there}"
