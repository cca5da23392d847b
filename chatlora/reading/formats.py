"""A row in any known form becomes a Conversation.

form                columns
messages            messages: [{role, content, tool_calls, reasoning_content, loss, ...}], tools
conversations       conversations: the same with ChatGLM3's roles (observation, tool), tools
sharegpt            conversations: [{from, value}] with function_call and observation, system, tools
alpaca              instruction, input, output, history: [[question, answer]], system
prompt_completion   prompt, completion: two texts, or two lists of messages, system, tools

The form is recognised from the columns or stated; `columns` gives a file's own names for ours. Columns beside those
of the form (ids, metadata) are left alone, and text is kept byte for byte.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from chatlora.config import RowFormat
from chatlora.errors import DataError, did_you_mean
from chatlora.reading.conversation import Conversation, Message, Said, reply, split_reasoning
from chatlora.reading.messages import (
    described,
    parse_json,
    read_loss,
    read_message,
    read_text,
    read_tool_call,
    read_tools,
)

FORM_COLUMNS: dict[str, tuple[str, ...]] = {  # what a row needs, in the order in which forms are tried
    "messages": ("messages",),
    "conversations": ("conversations",),  # a turn with from and value is read as ShareGPT's all the same
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
BESIDE = ("system", "tools", "functions", "input", "history")  # what else a form may read
KNOWN_COLUMNS = (*dict.fromkeys(name for names in FORM_COLUMNS.values() for name in names), *BESIDE)


def parse_row(
    row: Mapping[str, Any],
    *,
    format: RowFormat = "auto",
    columns: Mapping[str, str] | None = None,
    place: str | None = None,
) -> Conversation:
    """The conversation that a row holds.

    `columns` maps our column to the row's, e.g. `{"prompt": "content", "completion": "summary"}`.
    Raises DataError with everything that is wrong with this row, each sentence beginning with `place`.
    A row without an assistant's turn is no mistake here: it has nothing to learn, which rendering counts.
    """
    problems: list[str] = []
    fields = _renamed(row, columns or {}, problems)
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    form = _form_of(fields, format, problems) if not problems else None
    if form is not None:
        messages = _read_form(form, fields, problems)
        offered = "tools" if fields.get("tools") is not None else "functions"
        tools = read_tools(fields.get(offered), offered, problems)
        if not problems and not _is_chatglm3(form, fields):
            _check_results(messages, problems)
    if problems:
        prefix = f"{place}: " if place else ""
        raise DataError(*(f"{prefix}{problem}" for problem in problems))
    return Conversation(tuple(messages), tools, place)


def _is_chatglm3(form: str, fields: Mapping[str, Any]) -> bool:
    """Whether observations may stand anywhere, as they might for the original."""
    return form == "conversations" and not any(map(_is_sharegpt, fields[form]))


def _check_results(messages: Sequence[Message], problems: list[str]) -> None:
    """A tool's result stands behind a call: the assistant's, which some data sets write as text."""
    called: list[str] = []
    for index, message in enumerate(messages):
        called += [call.id for call in message.tool_calls if call.id is not None]
        which = f"message {index + 1} of {len(messages)} is a tool's result"
        if message.role == "tool" and (index == 0 or messages[index - 1].role not in ("assistant", "tool")):
            problems.append(f"{which}, but no assistant's message is in front of it; put the call there")
        elif message.tool_call_id is not None and called and message.tool_call_id not in called:
            remedy = did_you_mean(message.tool_call_id, called) or f"; the ids are {', '.join(called)}"
            problems.append(f"{which} for the call {message.tool_call_id!r}, which is not in front of it{remedy}")


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """The known columns of the row under our names. A null column is absent: Parquet cannot tell them apart."""
    for ours, theirs in columns.items():
        if ours not in KNOWN_COLUMNS:
            remedy = did_you_mean(ours, KNOWN_COLUMNS) or f"; known are {', '.join(KNOWN_COLUMNS)}"
            problems.append(f"columns: {ours!r} is no column of any form{remedy}")
        elif theirs not in row:
            remedy = did_you_mean(theirs, row) or f"; it has {_listed(row)}"
            problems.append(f"columns.{ours}: the row has no column {theirs!r}{remedy}")
    taken = set(columns.values())
    forms_are_mapped = any(ours not in BESIDE for ours in columns)
    fields = {
        name: row[name]
        for name in (BESIDE if forms_are_mapped else KNOWN_COLUMNS)
        if row.get(name) is not None and name not in taken
    }
    fields.update((ours, row[theirs]) for ours, theirs in columns.items() if row.get(theirs) is not None)
    if not fields and not problems:
        problems.append(_unrecognised(row))
    return fields


def _form_of(fields: Mapping[str, Any], stated: RowFormat, problems: list[str]) -> str | None:
    """The form of the row. A list of messages comes before anything else: many sets keep the bare prompt beside it."""
    if stated != "auto":
        _report_missing(fields, stated, problems)
        return None if problems else stated
    complete = [form for form, names in FORM_COLUMNS.items() if all(name in fields for name in names)]
    if len(complete) == 1 or complete[:1] == ["messages"] or complete[:2] == ["conversations", "sharegpt"]:
        return complete[0]
    if complete:
        problems.append(f"the row could be {' or '.join(complete)}; say which with format: {complete[0]}")
        return None
    begun = next((form for form, names in FORM_COLUMNS.items() if any(name in fields for name in names)), None)
    if begun is None:
        problems.append(_unrecognised(fields))
    else:
        _report_missing(fields, begun, problems)
    return None


def _report_missing(fields: Mapping[str, Any], form: str, problems: list[str]) -> None:
    for name in FORM_COLUMNS[form]:
        if name not in fields:
            problems.append(f"{name} is missing or null, which the form {form} needs; the row has {_listed(fields)}")


def _unrecognised(row: Mapping[str, Any]) -> str:
    remedy = next(filter(None, (did_you_mean(name, KNOWN_COLUMNS) for name in map(str, row))), ";")
    return (
        f"no known form: the row has {_listed(row)}{remedy} chatlora reads messages, conversations, prompt with "
        "completion, or instruction with output; name other columns with columns: {prompt: ..., completion: ...}"
    )


def _listed(row: Iterable[Any]) -> str:
    names = list(map(str, row))
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"the columns {shown}" if names else "no columns"


def _read_form(form: str, fields: Mapping[str, Any], problems: list[str]) -> list[Message]:
    if form == "alpaca":
        messages = _read_alpaca(fields, problems)
    elif form == "prompt_completion":
        messages = _read_prompt_completion(fields, problems)
    else:
        messages = _read_turns(form, fields, problems)
    return _with_system_column(fields.get("system"), messages, problems)


def _read_turns(form: str, fields: Mapping[str, Any], problems: list[str]) -> list[Message]:
    (column,) = FORM_COLUMNS[form]
    messages = []
    for index, turn in enumerate(_read_list(fields[column], column, problems)):
        read = _read_sharegpt_turn if form == "sharegpt" or _is_sharegpt(turn) else read_message
        messages += read(turn, f"{column}[{index}]", problems)
    return messages


def _is_sharegpt(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "role" not in turn and ("from" in turn or "value" in turn)


def _read_sharegpt_turn(turn: Any, path: str, problems: list[str]) -> list[Message]:
    if not isinstance(turn, Mapping) or turn.get("from") != "function_call":
        return read_message(turn, path, problems, role_key="from", content_key="value")
    path = f"{path}.value"
    value, thought = turn.get("value"), Said(None, "")
    if isinstance(value, str):
        thought = split_reasoning(value)
        value = parse_json(thought.content, path, problems)
    elif value is None:
        problems.append(f"{path} is missing or null; it is a call with name and arguments")
    if value is None:
        return []
    calls = value if isinstance(value, list) else [value]
    read = [read_tool_call(call, f"{path}[{i}]" if calls is value else path, problems) for i, call in enumerate(calls)]
    tool_calls = tuple(call for call in read if call is not None)
    loss = read_loss(turn, path, problems)
    return [Message("assistant", "", thought.reasoning, tool_calls, loss=loss, thought_text=thought.thought_text)]


def _read_alpaca(fields: Mapping[str, Any], problems: list[str]) -> list[Message]:
    messages: list[Message] = []
    for index, pair in enumerate(_read_list(fields.get("history") or [], "history", problems)):
        path = f"history[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            problems.append(f"{path} is {described(pair)}, not a pair [question, answer]")
            continue
        messages += _exchange(read_text(pair[0], f"{path}[0]", problems), read_text(pair[1], f"{path}[1]", problems))
    instruction = read_text(fields["instruction"], "instruction", problems)
    details = read_text(fields.get("input", ""), "input", problems)
    question = "\n".join(part for part in (instruction, details) if part)  # as LLaMA-Factory joins them
    return messages + _exchange(question, read_text(fields["output"], "output", problems))


def _read_prompt_completion(fields: Mapping[str, Any], problems: list[str]) -> list[Message]:
    """Two texts, or two lists of messages of which only the completion's are to be learned (as in TRL)."""
    prompt, completion = fields["prompt"], fields["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _exchange(read_text(prompt, "prompt", problems), read_text(completion, "completion", problems))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        problems.append("prompt and completion are two texts or two lists of messages, not one of each")
        return []
    context = [m for i, turn in enumerate(prompt) for m in read_message(turn, f"prompt[{i}]", problems)]
    reply = [m for i, turn in enumerate(completion) for m in read_message(turn, f"completion[{i}]", problems)]
    return [_unlearned(message) for message in context] + reply


def _unlearned(message: Message) -> Message:
    if message.role != "assistant" or message.loss is not None:
        return message
    return replace(message, loss=False)


def _exchange(question: str | None, answer: str | None) -> list[Message]:
    if question is None or answer is None:
        return []
    return [Message("user", question), reply(answer)]


def _read_list(value: Any, column: str, problems: list[str]) -> list[Any]:
    """A list, or the JSON text of one, as CSV and some Parquet files hold it."""
    if isinstance(value, str):
        value = parse_json(value, column, problems)
        if value is None:
            return []
    if not isinstance(value, list):
        problems.append(f"{column} is {described(value)}, not a list")
        return []
    return value


def _with_system_column(system: Any, messages: list[Message], problems: list[str]) -> list[Message]:
    if system is None or system == "":
        return messages
    text = read_text(system, "system", problems)
    if text is None:
        return messages
    stated = [message.content for message in messages if message.role == "system"]
    if stated and stated != [text]:
        problems.append("the column system and a system message say different things; keep one of them")
    return messages if stated else [Message("system", text), *messages]
