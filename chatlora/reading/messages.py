"""One turn of a row -> the messages that it is."""

from collections.abc import Mapping
from typing import Any

from chatlora.reading.calls import read_arguments, read_calls, read_result, read_tool_calls
from chatlora.reading.content import Content, has_more_than_text, read_content
from chatlora.reading.conversation import Message, Role, Said, ToolCall, split_reasoning
from chatlora.reading.flags import FLAGS, read_loss, report_unknown_flags
from chatlora.reading.roles import CALL_ROLES, ROLE_NAMES, folded, read_role
from chatlora.reading.values import described, instead_of, listed, read_optional_text, read_text, says_nothing

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
READ_KEYS = {"role", "content", "from", "value", "name", "tool_call_id", "mask", *FLAGS}
READ_OF: dict[str, set[str]] = {  # role -> what else is read of its messages
    "system": {"tools"},
    "assistant": {"refusal", "tool_calls", "function_call", *REASONING_KEYS},
    "tool": {"observation", "parameters"},
    **{role: set(REASONING_KEYS) for role in CALL_ROLES},
}
ALL_READ = READ_KEYS.union(*READ_OF.values())
ONE_OF = (("content", "refusal"), ("content", "observation"), ("value", "observation"), ("tool_calls", "function_call"))


def unread_keys(turn: Mapping[str, Any], role: str | None) -> set[str]:
    """The keys of a turn that hold something and that nothing reads. role: its own, or that of a call."""
    left = turn.keys() - READ_KEYS - READ_OF.get(role or "", set())
    return {str(key) for key in left if not says_nothing(turn[key])}


def read_message(
    fields: Any,
    path: str,
    problems: list[str],
    *,
    role_key: str = "role",
    content_key: str = "content",
    flags: Mapping[str, bool] = FLAGS,
) -> list[Message]:
    """One message in OpenAI's form, or ShareGPT's under the keys from and value.

    ChatGLM3's tool message (name, parameters, observation) gives two: the assistant's call and its result; Anthropic's
    results, which stand in a user's message, one each.
    """
    if not isinstance(fields, Mapping):
        problems.append(f"{path} is {described(fields)}, not a message with {role_key} and {content_key}")
        return []
    if not fields.keys() & ALL_READ and len(fields) > 1:
        problems.append(_told_other_keys(fields, path))
        return []
    report_unknown_flags(fields, ALL_READ, path, problems)
    for one, other in ONE_OF:
        if not says_nothing(fields.get(one)) and not says_nothing(fields.get(other)):
            problems.append(f"{path} has both {one} and {other}, of which one is read; keep one, or ignore: [{other}]")
    if folded(fields.get(role_key)) in CALL_ROLES:
        return _read_call(fields, path, content_key, flags, problems)
    role = read_role(fields, role_key, path, problems)
    loss = read_loss(fields, path, problems, flags)
    if role == "tool" and "observation" in fields:
        return _read_call_with_result(fields, path, loss, problems)
    parts, text = Content(), None
    if has_more_than_text(fields.get(content_key)):
        parts = read_content(fields[content_key], role, f"{path}.{content_key}", problems)
        text = "".join(parts.text)
    else:
        text = _read_text(fields, content_key, role, path, problems)
    said, tool_calls = Said(None, text or ""), tuple(parts.calls)
    if role == "assistant" and text is not None:
        said = _read_reasoning(fields, parts.thoughts, text, path, problems)
        tool_calls += read_tool_calls(fields, path, problems)
    tool_call_id = read_optional_text(fields, "tool_call_id", path, problems)
    name = read_optional_text(fields, "name", path, problems)
    if role is None or text is None or (parts.results and not parts.text):
        return parts.results
    message = Message(
        role, said.content, said.reasoning, tool_calls, tool_call_id or None, name, loss, said.thought_text
    )
    return [*parts.results, message]


def _told_other_keys(fields: Mapping[str, Any], path: str) -> str:
    texts = sorted((str(key) for key, value in fields.items() if isinstance(value, str)), key=lambda k: len(fields[k]))
    texts.sort(key=lambda key: folded(fields[key]) not in ROLE_NAMES)
    role, content = (texts[0], texts[-1]) if len(texts) > 1 else ("SPEAKER", "TEXT")
    return (
        f"{path} has neither role nor content, but {listed(fields)}; perhaps columns: "
        f"{{role: {role}, content: {content}}}; what columns cannot say, reader: my_rows.py:read can"
    )


def _read_call(
    fields: Mapping[str, Any], path: str, content_key: str, flags: Mapping[str, bool], problems: list[str]
) -> list[Message]:
    loss = read_loss(fields, path, problems, flags)
    value, said = fields.get(content_key), Said(None, "")
    if isinstance(value, str):
        said = _read_reasoning(fields, [], value, path, problems)
        value = said.content
    calls = read_calls(value, f"{path}.{content_key}", problems)
    if not calls:
        return []
    return [Message("assistant", "", said.reasoning, calls, loss=loss, thought_text=said.thought_text)]


def _read_text(fields: Mapping[str, Any], key: str, role: Role | None, path: str, problems: list[str]) -> str | None:
    value = fields.get(key)
    if role == "assistant" and not value and fields.get("refusal"):  # OpenAI: what it says instead
        return read_text(fields["refusal"], f"{path}.refusal", problems)
    if value is None and role == "assistant" and (fields.get("tool_calls") or fields.get("function_call")):
        return ""
    if value is None and role == "system" and fields.get("tools"):
        return ""
    read = read_result if role == "tool" else read_text
    return read(value, f"{path}.{key}", problems, instead_of(key, fields))


def _read_reasoning(fields: Mapping[str, Any], parts: list[str], text: str, path: str, problems: list[str]) -> Said:
    """The thought of a message and its text: stated under a key or as parts, else at the beginning of the text."""
    stated = {key: fields[key] for key in REASONING_KEYS if fields.get(key)} | (
        {"parts": "".join(parts)} if parts else {}
    )
    if not stated:
        return split_reasoning(text)
    if len({str(thought) for thought in stated.values()}) > 1:
        problems.append(f"{path} has different texts in {' and '.join(stated)}; keep one")
    key, thought = next(iter(stated.items()))
    return Said(read_text(thought, f"{path}.{key}", problems), text)


def _read_call_with_result(
    fields: Mapping[str, Any], path: str, loss: bool | None, problems: list[str]
) -> list[Message]:
    name = read_text(fields.get("name"), f"{path}.name", problems, instead_of("name", fields))
    arguments = read_arguments(fields.get("parameters"), f"{path}.parameters", problems)
    observation = read_result(fields["observation"], f"{path}.observation", problems)
    if name is None or observation is None:
        return []
    call = Message("assistant", "", tool_calls=(ToolCall(name, arguments),), loss=loss)
    return [call, Message("tool", observation, name=name)]
