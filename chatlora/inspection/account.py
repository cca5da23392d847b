"""The ledger for people, whatever counts stand in it: a new one is shown, and a fault under `--strict`, by itself."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatlora.data.alike import alike_lines
from chatlora.data.ledger import counted, told_remarks
from chatlora.rendering.remarks import EMPTY, IS_CONTROL, OPENS, TEXT_SPELLS_CONTROL
from chatlora.rendering.thoughts import KEPT

COUNTS = ("rows_read", "rows_used", "rows_held_out", "turns", "targets", "tokens", "replies")
# What good rows may have as well. Any other entry that says something is a fault of theirs, until it is named here.
HARMLESS = frozenset(
    {
        *("path", "part", "left", "not_used", "max_length_for_99_percent"),
        *("duplicates", "near_duplicates", "contradictions", "overlaps", "on_leak"),
        *(EMPTY, IS_CONTROL, KEPT, OPENS, TEXT_SPELLS_CONTROL),
        *COUNTS,
    }
)
EXAMPLES_SHOWN = 5  # of names and places of one kind


def account_lines(ledger: Mapping[str, Any]) -> list[str]:
    """Every source with its counts and all else that is known of it; then what is known of all together."""
    lines = []
    for source in ledger["sources"]:
        counts = [f"{_worded(name)} {source[name]:,}" for name in COUNTS if source.get(name)]
        lines.append(f"{source['path']}: {', '.join(counts)}")
        rest = {name: value for name, value in source.items() if name not in ("path", "remarks", *COUNTS)}
        lines += [*_told(rest, "  "), *(f"  {told}" for told in told_remarks(source.get("remarks", {})))]
    rest = _of_all(ledger, alone=len(ledger["sources"]) == 1)
    return [*lines, *alike_lines(rest.pop("alike", {})), *_told(rest, "")]


def faults(ledger: Mapping[str, Any]) -> list[str]:
    """`rows.jsonl: set aside` for everything in the ledger that `--strict` does not let pass."""
    told = [
        f"{source['path']}: {_worded(name)}"
        for source in ledger["sources"]
        for name, value in (source | source.get("remarks", {}) | {"remarks": {}}).items()
        if _is_fault(name, value)
    ]
    of_all = _of_all(ledger, alone=True)
    of_all |= of_all.pop("alike", {})
    return told + [_worded(name) for name, value in of_all.items() if _is_fault(name, value)]


def _is_fault(name: str, value: Any) -> bool:
    if isinstance(value, Mapping) and name not in HARMLESS:
        return any(_is_fault(each, below) for each, below in value.items())
    return bool(value) and name not in HARMLESS


def places_named(ledger: Mapping[str, Any]) -> dict[str, str]:
    """Place of a row -> why the ledger names it, in the ledger's order."""
    found: dict[str, str] = {}
    for name, one in _entries(ledger, "ledger"):
        reason = f", {one['reason']}" if "reason" in one else ""
        detail = f": {one['detail']}" if "detail" in one else ""
        found.setdefault(str(one["place"]), f"{_worded(name)}{reason}{detail}")
    return found


def _entries(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a place in it, under the name of what holds it."""
    if isinstance(value, Mapping):
        if value.get("place"):
            yield name, value
        for key, each in value.items():
            yield from _entries(each, name if key == "examples" else key)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from _entries(each, name)


def _of_all(ledger: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
    """What is known of all sources together; alone: without that which each of them says of itself."""
    in_sources = {name for source in ledger["sources"] for name in source} if alone else set()
    return {name: value for name, value in ledger.items() if name not in ("sources", *COUNTS, *in_sources)}


def _told(values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        if not _says_something(value):
            continue
        word = f"{indent}{_worded(name)}"
        if isinstance(value, Mapping):
            yield f"{word}:"
            yield from _told(value, indent + "  ")
        elif _has_reasons(value):
            yield from (f"{word}: {line}" for line in counted(value))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{word}: {_listed(value)}"
        else:
            yield f"{word}: {_plain(value)}"


def _says_something(value: Any) -> bool:
    return any(map(_says_something, value.values())) if isinstance(value, Mapping) else bool(value)


def _has_reasons(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, Mapping) and "reason" in one for one in value)


def _listed(values: Sequence[Any]) -> str:
    more = len(values) - EXAMPLES_SHOWN
    shown = ", ".join(_plain(value) for value in values[:EXAMPLES_SHOWN])
    return f"{len(values):,} ({shown}{f' and {more:,} more' if more > 0 else ''})"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{_worded(name)} {_plain(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return " and ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _worded(name: str) -> str:
    return name.replace("_", " ")
