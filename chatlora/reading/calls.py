"""Calls of tools, what they returned, and the tools on offer."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chatlora.reading.conversation import ToolCall
from chatlora.reading.values import (
    described,
    instead_of,
    is_finite,
    is_json,
    is_parts,
    is_text,
    listed,
    parse_json,
    read_optional_text,
    read_text,
)

ARGUMENTS = ("arguments", "parameters", "args", "input")  # OpenAI's name first; where others keep them
SCHEMAS = ("parameters", "input_schema")  # of a tool: OpenAI's name, Anthropic's


def read_tool_calls(fields: Mapping[str, Any], path: str, problems: list[str]) -> tuple[ToolCall, ...]:
    """Those under a message's `tool_calls`, or `function_call`, as OpenAI had it before."""
    listed = fields.get("tool_calls")
    if isinstance(listed, str) and listed.strip():
        listed = parse_json(listed, f"{path}.tool_calls", problems)
    if listed is not None and not isinstance(listed, list):
        problems.append(f"{path}.tool_calls is {described(listed)}, not a list of calls")
        return ()
    named: Iterable[tuple[Any, str]] = (
        (call, f"{path}.tool_calls[{index}]") for index, call in enumerate(listed or ())
    )
    if not listed and fields.get("function_call"):
        named = [(fields["function_call"], f"{path}.function_call")]
    calls = [read_tool_call(call, place, problems) for call, place in named]
    return tuple(call for call in calls if call is not None)


def read_calls(value: Any, path: str, problems: list[str]) -> tuple[ToolCall, ...]:
    """One call, a list of them, or the JSON text of that, which may also be a call a line."""
    if isinstance(value, str):
        lines = [line for line in value.splitlines() if line.strip()]
        if len(lines) > 1 and all(line.strip().startswith("{") and line.strip().endswith("}") for line in lines):
            value = [parse_json(line, path, problems) for line in lines]
        else:
            value = parse_json(value, path, problems)
        if value is None or None in (value if isinstance(value, list) else ()):
            return ()
    elif value is None:
        problems.append(f"{path} is missing or null; it is a call with name and arguments")
        return ()
    calls = value if isinstance(value, list) else [value]
    if not calls:
        problems.append(f"{path} holds no call, and so no reply; leave such rows out with on_bad_row: set_aside")
    read = [read_tool_call(call, f"{path}[{i}]" if calls is value else path, problems) for i, call in enumerate(calls)]
    return tuple(call for call in read if call is not None)


def read_tool_call(value: Any, path: str, problems: list[str]) -> ToolCall | None:
    """`{id, function: {name, arguments}}` or `{name, arguments}`; arguments are an object or the JSON text of one."""
    function = value.get("function", value) if isinstance(value, Mapping) else value
    if not isinstance(function, Mapping):
        problems.append(f"{path} is {described(value)}, not a call with name and arguments")
        return None
    inner = f"{path}.function" if function is not value else path
    name = read_text(function.get("name"), f"{inner}.name", problems, instead_of("name", function))
    key = next((key for key in ARGUMENTS if key in function), "arguments")
    others = [other for other in ARGUMENTS if other != key and function.get(other)]
    if others:
        problems.append(f"{inner} has both {key} and {listed(others)}, of which one is read; keep one")
    if key not in function and instead_of(key, function):
        problems.append(f"{inner}.{key} is missing{instead_of(key, function)}")
    arguments = read_arguments(function.get(key), f"{inner}.{key}", problems)
    call_id = read_optional_text(value, "id", path, problems)
    return None if name is None else ToolCall(name, arguments, call_id or None)


def read_arguments(value: Any, path: str, problems: list[str]) -> Any:
    """The arguments of a call as a JSON value; none at all are `{}`."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = parse_json(value, path, problems)
    return value if is_json(value, path, problems) and is_finite(value, path, problems) else None


def read_result(value: Any, path: str, problems: list[str], instead: str = "") -> str | None:
    """What a tool returned: text, or any JSON value, which is written out as JSON."""
    if value is None or isinstance(value, str) or is_parts(value):
        return read_text(value, path, problems, instead)
    if not is_json(value, path, problems):
        return None
    return json.dumps(value, ensure_ascii=False, default=str)


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


def _read_tool(tool: Any, path: str, problems: list[str]) -> dict[str, Any] | None:
    if isinstance(tool, str) and tool.strip():
        return {"type": "text", "text": tool} if is_text(tool, path, problems) else None
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(function, Mapping):
        problems.append(f"{path} is {described(tool)}, not a tool with name, description and parameters")
        return None
    if read_text(function.get("name"), f"{path}.name", problems, instead_of("name", function)) is None:
        return None
    if not is_json(tool, path, problems):
        return None
    if function is not tool:
        return dict(tool)
    renamed = {"parameters" if key in SCHEMAS else key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": renamed}
