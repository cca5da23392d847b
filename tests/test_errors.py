"""How mistakes are told."""

from chatlora.errors import REPEATED, SHOWN, DataError


def test_one_sentence_for_many_rows_is_told_once_with_its_first_place() -> None:
    same = [f"a.jsonl:{number}: no reply" for number in range(2, 62)]
    told = str(DataError(*same, "b.jsonl:1: no reply", "a.jsonl:9: something else")).splitlines()[1:]
    assert told == [
        "  a.jsonl:2 and 59 more rows: no reply",
        "  b.jsonl:1: no reply",
        "  a.jsonl:9: something else",
    ]


def test_a_few_rows_are_each_told() -> None:
    same = [f"a.jsonl:{number}: no reply" for number in range(REPEATED)]
    assert str(DataError(*same)).splitlines()[1:] == [f"  {problem}" for problem in same]


def test_the_rest_is_counted_by_rows() -> None:
    different = [f"a.jsonl:{number}: problem {number}" for number in range(SHOWN)]
    same = [f"x y.parquet: row {number}: last" for number in range(10)]
    assert str(DataError(*different, *same)).splitlines()[-1] == "  ... and 10 more of 30"


def test_every_form_of_a_place_is_grouped() -> None:
    for place in ("a.json:{}", "a.json:1: row {}", "a: row {}", "a.json: data[{}]"):
        problems = [f"{place.format(number)}: content: is null" for number in range(5)]
        assert str(DataError(*problems)).splitlines()[1:] == [f"  {place.format(0)} and 4 more rows: content: is null"]
