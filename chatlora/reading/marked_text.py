"""Conversations whose turns are told apart by markers inside text: Glaive's and MOSS's.

Only the markers that their makers put around every turn are taken away; the text between them stays byte for byte.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from chatlora.reading.calls import read_arguments
from chatlora.reading.conversation import Message, ToolCall
from chatlora.reading.values import described, read_text

GLAIVE = re.compile(r"\s*(USER|ASSISTANT): ")
_GLAIVE_TURN = re.compile(r"(?:^\s*|\n\n\n\s*)(USER|ASSISTANT|FUNCTION RESPONSE): ")
_GLAIVE_CALL = re.compile(
    r"""\s*<functioncall>\s*\{\s*"name":\s*"([^"]*)"(?:,\s*"arguments":\s*'(.*)')?\s*\}\s*""", re.DOTALL
)
_GLAIVE_END = re.compile(r"\s*(<\|endoftext\|>)?\s*$")
_GLAIVE_SYSTEM = re.compile(r"SYSTEM: (.*?)\s*$", re.DOTALL)
_GLAIVE_TOOLS = " with access to the following functions. Use them if required -"

MOSS = {"turn_1"}
_MOSS_MARKED = re.compile(r"<\|(?:Human|MOSS|Inner Thoughts|Commands|Results)\|>:\s?(.*?)(?:<eo[a-z]>)?\s*", re.DOTALL)
_MOSS_TOOLS = ("Inner Thoughts", "Commands", "Tool Responses")


def read_glaive(text: str, path: str, problems: list[str]) -> list[Message]:
    _, *marked = _GLAIVE_TURN.split(text)
    messages = []
    for speaker, said in zip(marked[::2], marked[1::2], strict=True):
        content = said[: _GLAIVE_END.search(said).start()]  # type: ignore[union-attr]  # it matches the empty string
        if speaker == "USER":
            messages.append(Message("user", content))
        elif speaker == "FUNCTION RESPONSE":
            messages.append(Message("tool", content))
        else:
            messages += _glaive_reply(content, path, problems)
    return messages


def _glaive_reply(content: str, path: str, problems: list[str]) -> list[Message]:
    text, marker, _ = content.partition("<functioncall>")
    if not marker:
        return [Message("assistant", content)]
    call = _GLAIVE_CALL.fullmatch(content, len(text))
    if call is None:
        problems.append(f"{path} holds a <functioncall> that is not {{name, arguments}}: {described(content)}")
        return []
    arguments = read_arguments(call[2], f"{path}: the arguments of {call[1]}", problems)
    return [Message("assistant", text.rstrip(), tool_calls=(ToolCall(call[1], arguments),))]


def split_glaive_system(system: str) -> tuple[str, list[Any]]:
    """The system message without its marker, and the functions that it lists at its end."""
    found = _GLAIVE_SYSTEM.fullmatch(system)
    if found is None:
        return system, []
    text, marker, listed = found[1].partition(_GLAIVE_TOOLS)
    tools = _json_objects(listed) if marker else []
    return (f"{text}.", tools) if tools else (found[1], [])


def _json_objects(text: str) -> list[Any]:
    """JSON values that stand one after the other; none where something else stands there."""
    found, position = [], 0
    decoder = json.JSONDecoder()
    while position < len(text.rstrip()):
        position += len(text[position:]) - len(text[position:].lstrip())
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return []
        found.append(value)
    return found


def read_moss(turns: Mapping[str, Any], path: str, problems: list[str]) -> list[Message]:
    messages = []
    for number in range(1, len(turns) + 1):
        at, turn = f"{path}.turn_{number}", turns.get(f"turn_{number}")
        if not isinstance(turn, Mapping):
            problems.append(f"{at} is {described(turn)}, not a turn with Human and MOSS")
            continue
        used = [key for key in _MOSS_TOOLS if turn.get(key) and _unmarked(str(turn[key])) not in ("None", "")]
        if used:
            problems.append(
                f"{at} has {' and '.join(used)}, tools in MOSS's own language; turn them into calls with "
                "reader: my_rows.py:read, or leave such rows out with on_bad_row: set_aside"
            )
        for key, role in (("Human", "user"), ("MOSS", "assistant")):
            text = read_text(turn.get(key), f"{at}.{key}", problems)
            if text is not None:
                messages.append(Message("user" if role == "user" else "assistant", _unmarked(text)))
    return messages


def _unmarked(text: str) -> str:
    found = _MOSS_MARKED.fullmatch(text)
    return text if found is None else found[1]
