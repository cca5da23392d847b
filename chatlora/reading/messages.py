"""The parts of a row: one text, one message, one tool call, the tools on offer.

Every reader takes the value as it stood in the file, its path inside the row (`messages[2].content`) and the list in
which problems are gathered. What cannot be read adds a sentence there and gives None (or nothing), so that one look
at a row finds everything that is wrong with it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chatlora.errors import did_you_mean
from chatlora.reading.conversation import ROLES, Message, Role, Said, ToolCall, split_reasoning

ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "developer": "system",  # OpenAI
    "human": "user",  # ShareGPT
    "gpt": "assistant",
    "model": "assistant",  # Gemma
    "observation": "tool",  # ChatGLM3, ShareGPT
    "function": "tool",  # OpenAI before tool_calls
}
ROLES_UNDER = {  # by the key of the role, which tells the form: what a role is called there
    "role": ROLES,
    "from": ("system", "human", "gpt", "function_call", "observation"),
}
MEANT_BY = {"ai": "assistant", "bot": "assistant", "chatbot": "assistant", "chatgpt": "assistant", "prompter": "user"}
MOST_LEVELS = 64  # of lists and objects inside each other; templates, and Python, walk them by recursion
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def read_message(
    fields: Any, path: str, problems: list[str], *, role_key: str = "role", content_key: str = "content"
) -> list[Message]:
    """One message in OpenAI's form, or ShareGPT's under the keys from and value.

    ChatGLM3's tool message (name, parameters, observation) gives two: the assistant's call and its result.
    """
    if not isinstance(fields, Mapping):
        problems.append(f"{path} is {described(fields)}, not a message with {role_key} and {content_key}")
        return []
    role = read_role(fields, role_key, path, problems)
    loss = read_loss(fields, path, problems)
    if role == "tool" and "observation" in fields:
        return _read_call_with_result(fields, path, loss, problems)
    tool_calls = _read_tool_calls(fields, path, problems) if role == "assistant" else ()
    content = _read_content(fields, content_key, role, path, problems)
    said = Said(None, content or "")
    if role == "assistant" and content is not None:
        said = _read_reasoning(fields, content, path, problems)
    tool_call_id = _read_optional_text(fields, "tool_call_id", path, problems)
    name = _read_optional_text(fields, "name", path, problems)
    if role is None or content is None:
        return []
    return [Message(role, said.content, said.reasoning, tool_calls, tool_call_id, name, loss, said.thought_text)]


def read_role(fields: Mapping[str, Any], key: str, path: str, problems: list[str]) -> Role | None:
    value = fields.get(key)
    known = ", ".join(ROLES_UNDER[key])
    if value is None:
        problems.append(f"{path}.{key} is missing{_instead(fields, key)}; it is one of {known}")
    elif not isinstance(value, str):
        problems.append(f"{path}.{key} is {described(value)}, not one of {known}")
    elif value not in ROLE_NAMES:
        problems.append(f"{path}.{key} is {value!r}{_meant(value, key)} the roles are {known}")
    else:
        return ROLE_NAMES[value]
    return None


def _meant(value: str, key: str) -> str:
    """The role that an unknown one was meant to be, by the name that the row's form has for it; else a semicolon."""
    word = value.strip().lower()
    meant = MEANT_BY.get(word)
    if meant is None:
        return did_you_mean(word, (*ROLES_UNDER[key], *ROLE_NAMES)) or ";"
    return f"; did you mean '{next(name for name in ROLES_UNDER[key] if ROLE_NAMES.get(name) == meant)}'?"


def read_text(value: Any, path: str, problems: list[str], instead: str = "") -> str | None:
    """A string byte for byte; a list of `{type: text}` parts is joined. Numbers are not turned into text."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        parts = [_read_part(part, f"{path}[{index}]", problems) for index, part in enumerate(value)]
        return None if None in parts else "".join(part for part in parts if part is not None)
    if value is None:
        problems.append(f'{path} is missing or null{instead}; an empty text is written as ""')
    elif not isinstance(value, str):
        problems.append(f"{path} is {described(value)}, not text; put it in quotes if it is meant as text")
    elif _is_text(value, path, problems):
        return value
    return None


def read_result(value: Any, path: str, problems: list[str], instead: str = "") -> str | None:
    """What a tool returned: text, or any JSON value, which is written out as JSON."""
    if value is None or isinstance(value, str) or _is_parts(value):
        return read_text(value, path, problems, instead)
    if not _is_json_text(value, path, problems):
        return None
    return json.dumps(value, ensure_ascii=False, default=str)


def read_tool_call(value: Any, path: str, problems: list[str]) -> ToolCall | None:
    """`{id, function: {name, arguments}}` or `{name, arguments}`; arguments are an object or the JSON text of one."""
    function = value.get("function", value) if isinstance(value, Mapping) else value
    if not isinstance(function, Mapping):
        problems.append(f"{path} is {described(value)}, not a call with name and arguments")
        return None
    inner = f"{path}.function" if function is not value else path
    name = read_text(function.get("name"), f"{inner}.name", problems, _instead(function, "name"))
    if "arguments" not in function and _instead(function, "arguments"):
        problems.append(f"{inner}.arguments is missing{_instead(function, 'arguments')}")
    arguments = read_arguments(function.get("arguments"), f"{inner}.arguments", problems)
    call_id = _read_optional_text(value, "id", path, problems)
    return None if name is None else ToolCall(name, arguments, call_id)


def read_arguments(value: Any, path: str, problems: list[str]) -> Any:
    """The arguments of a call as a JSON value; none at all are `{}`."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = parse_json(value, path, problems)
    return value if _is_json_text(value, path, problems) else None


def read_tools(value: Any, path: str, problems: list[str]) -> tuple[dict[str, Any], ...]:
    """The tools on offer as JSON schemas in OpenAI's form `{type: function, function: {name, ...}}`.

    A tool that is told in words, as ChatGLM3's data may, is `{type: text, text: ...}`.
    """
    if isinstance(value, str) and value.strip():
        value = parse_json(value, path, problems)
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        problems.append(f"{path} is {described(value)}, not a list of tools")
        return ()
    tools = [_read_tool(tool, f"{path}[{index}]", problems) for index, tool in enumerate(value)]
    return tuple(tool for tool in tools if tool is not None)


def parse_json(text: str, path: str, problems: list[str]) -> Any:
    """The value of JSON text that stands inside a string. None, and a problem, where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path} should be JSON, and is not ({error}): {_shortened(text)!r}")
        return None


def described(value: Any) -> str:
    """What stands there, for a sentence: `the number 5`, `null`, `a list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {_shortened(value)!r}"
    return {"Mapping": "an object", "dict": "an object", "list": "a list", "tuple": "a list"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _instead(fields: Mapping[str, Any], key: str) -> str:
    """`"; did you mean 'contnet'?"` about a field that is there, where the one that is wanted is not."""
    if key in fields:
        return ""
    known = {"role", "content", "from", "value", "name", "tool_calls", "loss", "arguments", "type", "function"}
    return did_you_mean(key, (name for name in map(str, fields) if name not in known))


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(p, Mapping) and "type" in p for p in value)


def _read_part(part: Mapping[str, Any], path: str, problems: list[str]) -> str | None:
    if part.get("type") != "text":
        problems.append(f"{path}.type is {part.get('type')!r}; only parts of type 'text' can be trained on")
        return None
    return read_text(part.get("text"), f"{path}.text", problems, _instead(part, "text"))


def _is_text(value: str, path: str, problems: list[str]) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        problems.append(f"{path} holds half a character ({half} at character {error.start}); write the whole character")
        return False
    return True


def _is_json_text(value: Any, path: str, problems: list[str]) -> bool:
    """Whether a JSON value can be written out, and rendered: not too deep, and text throughout."""
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        level = [item for each in level for item in _inside(each)]
        if not level:
            return _is_text(json.dumps(value, ensure_ascii=False, default=str), path, problems)
    problems.append(f"{path} has lists and objects in more than {MOST_LEVELS} levels; write it flatter")
    return False


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()


def _read_optional_text(fields: Mapping[str, Any], key: str, path: str, problems: list[str]) -> str | None:
    return None if fields.get(key) is None else read_text(fields[key], f"{path}.{key}", problems)


def read_loss(fields: Mapping[str, Any], path: str, problems: list[str]) -> bool | None:
    """`loss: true|false`, or OpenAI's `weight: 0|1`."""
    loss, weight = fields.get("loss"), fields.get("weight")
    if loss is None and weight is not None:
        if weight in (0, 1) and isinstance(weight, (int, float)):
            return bool(weight)
        problems.append(f"{path}.weight is {described(weight)}; it is 0 or 1")
    elif loss is not None and not isinstance(loss, bool):
        problems.append(f"{path}.loss is {described(loss)}; it is true or false, without quotes")
    else:
        return loss
    return None


def _read_content(fields: Mapping[str, Any], key: str, role: Role | None, path: str, problems: list[str]) -> str | None:
    value = fields.get(key)
    if value is None and role == "assistant" and (fields.get("tool_calls") or fields.get("function_call")):
        return ""
    read = read_result if role == "tool" else read_text
    return read(value, f"{path}.{key}", problems, _instead(fields, key))


def _read_reasoning(fields: Mapping[str, Any], content: str, path: str, problems: list[str]) -> Said:
    stated = [key for key in REASONING_KEYS if fields.get(key)]
    if not stated:
        return split_reasoning(content)
    if len({str(fields[key]) for key in stated}) > 1:
        problems.append(f"{path} has different texts in {' and '.join(stated)}; keep one")
    return Said(read_text(fields[stated[0]], f"{path}.{stated[0]}", problems), content)


def _read_tool_calls(fields: Mapping[str, Any], path: str, problems: list[str]) -> tuple[ToolCall, ...]:
    listed = fields.get("tool_calls")
    if isinstance(listed, str) and listed.strip():
        listed = parse_json(listed, f"{path}.tool_calls", problems)
    if listed is not None and not isinstance(listed, list):
        problems.append(f"{path}.tool_calls is {described(listed)}, not a list of calls")
        return ()
    named: Iterable[tuple[Any, str]] = (
        (call, f"{path}.tool_calls[{index}]") for index, call in enumerate(listed or ())
    )
    if not listed and fields.get("function_call"):  # OpenAI before tool_calls
        named = [(fields["function_call"], f"{path}.function_call")]
    calls = [read_tool_call(call, place, problems) for call, place in named]
    return tuple(call for call in calls if call is not None)


def _read_call_with_result(
    fields: Mapping[str, Any], path: str, loss: bool | None, problems: list[str]
) -> list[Message]:
    name = read_text(fields.get("name"), f"{path}.name", problems, _instead(fields, "name"))
    arguments = read_arguments(fields.get("parameters"), f"{path}.parameters", problems)
    observation = read_result(fields["observation"], f"{path}.observation", problems)
    if name is None or observation is None:
        return []
    call = Message("assistant", "", tool_calls=(ToolCall(name, arguments),), loss=loss)
    return [call, Message("tool", observation, name=name)]


def _read_tool(tool: Any, path: str, problems: list[str]) -> dict[str, Any] | None:
    if isinstance(tool, str) and tool.strip():
        return {"type": "text", "text": tool} if _is_text(tool, path, problems) else None
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(function, Mapping):
        problems.append(f"{path} is {described(tool)}, not a tool with name, description and parameters")
        return None
    if read_text(function.get("name"), f"{path}.name", problems, _instead(function, "name")) is None:
        return None
    if not _is_json_text(tool, path, problems):
        return None
    if function is not tool:
        return dict(tool)
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
