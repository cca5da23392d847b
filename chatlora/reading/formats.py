"""A row in any known form becomes a Conversation.

form                columns
messages            messages: [{role, content, tool_calls, reasoning_content, loss, ...}], tools
conversations       conversations: the same with ChatGLM3's roles (observation, tool), tools
sharegpt            conversations: [{from, value}] with function_call and observation, system, tools
alpaca              instruction, input, output, history: [[question, answer]], system
prompt_completion   prompt, completion: each a text or a list of messages, history, system, tools
prompt_calls        prompt, calls: what the assistant calls, tools

The form is recognised from the columns or stated; `columns` gives a file's own names for ours, and columns.py knows
those of published sets. Columns beside those of the form (ids, metadata) are named as not used, and text is kept byte
for byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatlora.config import RowFormat
from chatlora.errors import DataError, did_you_mean
from chatlora.reading.columns import (
    BESIDE,
    TURN_COLUMNS,
    implied_columns,
    likeliest_columns,
    refused_beside,
    refused_columns,
)
from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.fields import Fields
from chatlora.reading.forms import FORMS, read_form, read_kwargs, read_offered
from chatlora.reading.turns import MESSAGE_KEYS
from chatlora.reading.values import listed, says_nothing

MAIN_COLUMNS = tuple(dict.fromkeys(name for form in FORMS.values() for name in form.needs))
OWN_NAMES = (*MAIN_COLUMNS, *BESIDE, *MESSAGE_KEYS)  # what `columns` may name
OURS = {name: name for name in MAIN_COLUMNS} | {name: ours for ours, names in BESIDE.items() for name in names}
MOST_WAYS = 4  # of reading a row that are told
KNOWN_COLUMNS = (*OWN_NAMES, *TURN_COLUMNS[:-2])  # the last two are what files call their list of rows


@dataclass(frozen=True, slots=True)
class ReadRow:
    """The conversation, and the row's columns and keys of messages that nothing read."""

    conversation: Conversation
    not_used: set[str]


def parse_row(
    row: Mapping[str, Any],
    *,
    format: RowFormat = "auto",
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    place: str | None = None,
) -> Conversation:
    """The conversation that a row holds.

    `columns` maps our column to the row's, e.g. `{"prompt": "content", "completion": "summary"}`, or our key of a
    message to the row's, e.g. `{"role": "speaker"}`; `ignore` names columns and keys that say nothing.
    Raises DataError with everything that is wrong with this row, each sentence beginning with `place`.
    A row without an assistant's turn is no mistake here: it has nothing to learn, which rendering counts.
    """
    return read_row(row, format=format, columns=columns, ignore=ignore, place=place).conversation


def read_row(
    row: Mapping[str, Any],
    *,
    format: RowFormat = "auto",
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    place: str | None = None,
) -> ReadRow:
    """As `parse_row`, with what nothing read."""
    problems: list[str] = []
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    kwargs: dict[str, Any] = {}
    fields = _named(row, columns or {}, frozenset(ignore), problems)
    mapped = set(columns or {}) & set(MAIN_COLUMNS)
    form = _form_of(fields, format, mapped, problems) if not problems else None
    if form is not None:
        messages = read_form(form, fields, problems)
        tools = read_offered(fields, problems)
        kwargs = read_kwargs(fields, problems)
        if format == "auto" and not mapped and not problems:  # else somebody has said what is read
            problems += refused_beside(fields.left(), map(fields.path, FORMS[form].needs), messages)
    if problems:
        prefix = f"{place}: " if place else ""
        raise DataError(*(f"{prefix}{problem}" for problem in problems))
    return ReadRow(Conversation(tuple(messages), tools, place, template_kwargs=kwargs), fields.not_used())


def _named(row: Mapping[str, Any], columns: Mapping[str, str], ignored: frozenset[str], problems: list[str]) -> Fields:
    """The row under our names: its own where they are ours, those of other sets, and those that `columns` gives."""
    keys = {MESSAGE_KEYS[ours]: theirs for ours, theirs in columns.items() if ours in MESSAGE_KEYS}
    columns = {ours: theirs for ours, theirs in columns.items() if ours not in MESSAGE_KEYS}
    for ours, theirs in columns.items():
        if ours not in OWN_NAMES:
            remedy = did_you_mean(ours, OWN_NAMES) or f"; known are {', '.join(OWN_NAMES)}"
            problems.append(f"columns: {ours!r} is no column of any form{remedy}")
        elif theirs not in row:
            remedy = did_you_mean(theirs, row) or f"; it has {_told_columns(row)}"
            problems.append(f"columns.{ours}: the row has no column {theirs!r}{remedy}")
    spoken_for = ignored | set(columns.values())
    problems += refused_columns(row, spoken_for)
    fields = Fields(row, keys, ignored)
    for name, value in row.items():
        own = OURS.get(name)
        if own is None or name in spoken_for or value is None or (own in BESIDE and says_nothing(value)):
            continue
        if own == "system" and own in fields.names and own not in columns and value != fields.peek(own):
            problems.append(f"{fields.path(own)} and {name} say different things; ignore: [{name}] keeps the first")
        fields.names.setdefault(own, name)
    fields.name(columns)
    return fields


def _form_of(fields: Fields, stated: RowFormat, mapped: set[str], problems: list[str]) -> str | None:
    """The form of the row. A list of messages comes before anything else: many sets keep the bare prompt beside it."""
    if stated != "auto":
        _report_missing(fields, stated, problems)
        return None if problems else stated
    complete = _complete(fields, mapped)
    if not complete:
        row = {name: value for name, value in fields.row.items() if name not in fields.ignored}
        possible = [columns for columns in implied_columns(row) if mapped <= columns.keys() - BESIDE.keys()]
        if len(possible) > 1:
            ways = " or ".join(f"columns: {_as_yaml(columns)}" for columns in possible[:MOST_WAYS])
            problems.append(f"{_told_columns(row)} can be read in several ways; say which: {ways}")
            return None
        fields.name(possible[0] if possible else {})
        complete = _complete(fields, mapped)
    if len(complete) == 1 or complete[:1] == ["messages"] or complete[:2] == ["conversations", "sharegpt"]:
        return complete[0]
    if complete:
        problems.append(f"the row could be {' or '.join(complete)}; say which with format: {complete[0]}")
        return None
    begun = next((name for name, form in FORMS.items() if any(column in fields.names for column in form.needs)), None)
    if begun is not None:
        _report_missing(fields, begun, problems)
    else:
        misspelled = next(filter(None, (did_you_mean(name, MAIN_COLUMNS) for name in map(str, fields.row))), ";")
        problems.append(
            f"no known form: the row has {_told_columns(fields.row)}{misspelled} chatlora reads messages, "
            f"conversations, prompt with completion, or instruction with output; {likeliest_columns(fields.row)}"
        )
    return None


def _complete(fields: Fields, mapped: set[str]) -> list[str]:
    """The forms whose columns are all there, and that take all that the source's `columns` names."""
    return [name for name, form in FORMS.items() if mapped <= set(form.needs) <= fields.names.keys()]


def _report_missing(fields: Fields, form: str, problems: list[str]) -> None:
    for name in FORMS[form].needs:
        if name not in fields.names:
            problems.append(
                f"{name} is missing or null, which the form {form} needs; the row has {_told_columns(fields.row)}; "
                f"{likeliest_columns(fields.row)}"
            )


def _told_columns(row: Mapping[str, Any]) -> str:
    return f"the columns {listed(row)}" if row else "no columns"


def _as_yaml(columns: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}}"
