"""Rows as people have them: each is read exactly, or refused with its own columns and a way on.

Run: pytest tests/reading/test_published_forms.py. After a change that was meant,
`python -m tests.reading.test_published_forms --write` writes the table of docs/rows.md anew.
"""

import re
import sys
from pathlib import Path

import pytest

from chatlora.errors import DataError
from chatlora.reading.formats import parse_row, read_row
from tests.reading.published_forms import FORMS, Published

DOCS = Path(__file__).resolve().parents[2] / "docs" / "rows.md"
BEGIN, END = "<!-- forms -->", "<!-- end of forms -->"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_row_is_what_its_author_meant_or_is_told(form: Published) -> None:
    if form.refused:
        said = refusal(form)
        assert all(part in said for part in form.refused), said
        return
    read = read_row(form.row)
    assert read.conversation.messages == form.messages
    assert read.conversation.tools == form.tools
    assert read.conversation.template_kwargs == form.kwargs
    assert sorted(read.not_used) == sorted(form.not_used)


def test_nearly_all_are_read() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS) >= 100
    assert sum(not form.refused for form in FORMS) >= 80


@pytest.mark.parametrize("form", [form for form in FORMS if form.refused], ids=lambda form: form.name)
def test_the_way_on_that_a_refusal_prints_leads_on(form: Published) -> None:
    """`columns: {...}` and `ignore: [...]`, given as they are printed, read the row."""
    ways = re.findall(r"columns: \{[^}]*\}(?:, ignore: \[[^]]*\])?|ignore: \[[^]]*\]", refusal(form))
    for way in ways:
        columns = re.search(r"\{(.*?)\}", way)
        ignored = re.search(r"\[(.*?)\]", way)
        mapping = dict(pair.split(": ") for pair in columns[1].split(", ")) if columns else {}
        read = parse_row(form.row, columns=mapping, ignore=ignored[1].split(", ") if ignored else ())
        assert [message.role for message in read.messages][-2:] == ["user", "assistant"]


def refusal(form: Published) -> str:
    with pytest.raises(DataError) as caught:
        parse_row(form.row)
    return "; ".join(caught.value.problems)


def table() -> str:
    lines = ["| form | columns | becomes |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {form.name} | {', '.join(form.row)} | {outcome(form)} |" for form in FORMS)])


def outcome(form: Published) -> str:
    if form.refused:
        return f"refused: {form.refused[0]} ... {form.refused[-1]}".replace("|", "\\|")
    turns = ", ".join(message.role for message in form.messages) or "nothing to learn"
    more = {
        "learned in part": any(message.loss is not None for message in form.messages),
        "reasoning": any(message.reasoning for message in form.messages),
        "calls": any(message.tool_calls for message in form.messages),
        "tools": bool(form.tools),
        "arguments of the template": bool(form.kwargs),
        f"not used: {', '.join(form.not_used)}": bool(form.not_used),
    }
    return "; ".join([turns, *(what for what, there in more.items() if there)])


def test_the_table_in_docs_is_what_the_forms_do() -> None:
    written = DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert written == table(), "write it anew: python -m tests.reading.test_published_forms --write"


if __name__ == "__main__" and "--write" in sys.argv:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
