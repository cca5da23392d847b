"""Whatever stands in a ledger is shown; what --strict stops at."""

from typing import Any

from chatlora.inspection.account import account_lines, faults, places_named

SOURCE: dict[str, Any] = {
    "path": "a.jsonl",
    "rows_read": 1_500,
    "rows_used": 1_490,
    "rows_held_out": 0,
    "set_aside": [],
    "altered": {},
    "replies": 9,
    "replies_too_long": 0,
    "max_length_for_99_percent": None,
}


def ledger(**more: Any) -> dict[str, Any]:
    return {"sources": [{**SOURCE, **more}], "replies": 9, "replies_too_long": 0}


def test_a_clean_source_is_one_line_and_no_fault() -> None:
    assert account_lines(ledger()) == ["a.jsonl: rows read 1,500, rows used 1,490, replies 9"]
    assert faults(ledger()) == []


def test_reasons_are_counted_with_an_example() -> None:
    aside = [{"place": f"a.jsonl:{line}", "reason": "no target", "detail": "x"} for line in (3, 5)]
    assert "  set aside: 2 x no target (e.g. a.jsonl:3: x)" in account_lines(ledger(set_aside=aside))
    assert faults(ledger(set_aside=aside)) == ["a.jsonl: set aside"]
    assert places_named(ledger(set_aside=aside)) == {
        "a.jsonl:3": "set aside, no target: x",
        "a.jsonl:5": "set aside, no target: x",
    }


def test_a_count_that_nobody_has_heard_of_is_shown_and_a_fault() -> None:
    new = {"turns": 1_200, "example": {"place": "a.jsonl:7", "text": "<|x|>"}}
    found = ledger(strange_things=new, names=["id", "score"])
    assert account_lines(found)[1:] == [
        "  strange things:",
        "    turns: 1,200",
        "    example:",
        "      place: a.jsonl:7",
        "      text: <|x|>",
        "  names: 2 (id, score)",
    ]
    assert faults(found) == ["a.jsonl: strange things", "a.jsonl: names"]
    assert places_named(found) == {"a.jsonl:7": "example"}
    together = {**ledger(), "leaks": [{"place": "a.jsonl:1", "of": "b.jsonl:2"}]}
    assert faults(together) == ["leaks"]
    assert "leaks: 1 (place a.jsonl:1 of b.jsonl:2)" in account_lines(together)


def test_what_is_alike_is_shown_and_only_leaks_are_faults() -> None:
    repeated, none = {"rows": 2, "examples": [["a.jsonl:1", "a.jsonl:9"]]}, {"rows": 0, "prompts": 0, "examples": []}
    alike: dict[str, Any] = {"duplicates": repeated, "near_duplicates": none, "contradictions": none}
    alike |= {"leaks": {}, "overlaps": {}, "on_leak": "warn"}
    found = {**ledger(not_used={"id": 3}), "alike": alike}
    told = [line for line in account_lines(found) if "a.jsonl:9" in line]
    assert len(told) == 1
    assert told[0].startswith("2 training rows repeat an earlier one")
    assert not [line for line in account_lines(found) if "several answers" in line]
    assert faults(found) == []
    assert faults({**found, "alike": {**alike, "leaks": {"test": {"rows": 1}}}}) == ["leaks"]
