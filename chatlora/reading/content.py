"""What a message says in parts that are more than text: thoughts, calls and results, as Anthropic writes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chatlora.reading.calls import read_result, read_tool_call
from chatlora.reading.conversation import Message, ToolCall
from chatlora.reading.values import TEXT_PARTS, read_optional_text, read_part, read_text

THOUGHT, CALL, RESULT = "thinking", "tool_use", "tool_result"
SPEAKER = {THOUGHT: "assistant", CALL: "assistant", RESULT: "user"}  # in whose message such a part stands
ORDER = {RESULT: 0, THOUGHT: 0, "text": 1, CALL: 2}  # in which templates write the parts of one message


@dataclass(slots=True)
class Content:
    text: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


def has_more_than_text(value: Any) -> bool:
    return isinstance(value, list) and any(_kind(part) in SPEAKER for part in value)


def read_content(parts: list[Any], role: str | None, path: str, problems: list[str]) -> Content:
    content = Content()
    reached = 0
    for index, part in enumerate(parts):
        at = f"{path}[{index}]"
        kind = _kind(part)
        if kind not in SPEAKER:
            text = read_part(part, at, problems) if isinstance(part, Mapping) else read_text(part, at, problems)
            content.text += [] if text is None else [text]
        elif role != SPEAKER[kind]:
            problems.append(f"{at}.type is {kind!r}, which belongs into a message of the {SPEAKER[kind]}")
        else:
            _read_part(kind, part, at, content, problems)
        rank = ORDER["text"] if kind in TEXT_PARTS else ORDER.get(kind, 0)
        if rank < reached:
            problems.append(f"{at} comes too late: chat templates write thoughts, text, calls; make it two messages")
        reached = max(rank, reached)
    return content


def _kind(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, Mapping) else ""


def _read_part(kind: str, part: Mapping[str, Any], path: str, content: Content, problems: list[str]) -> None:
    if kind == THOUGHT:
        thought = read_text(part.get("thinking"), f"{path}.thinking", problems)
        content.thoughts += [] if thought is None else [thought]
    elif kind == CALL:
        call = read_tool_call(part, path, problems)
        content.calls += [] if call is None else [call]
    else:
        result = read_result(part.get("content", ""), f"{path}.content", problems)
        call_id = read_optional_text(part, "tool_use_id", path, problems)
        content.results += [] if result is None else [Message("tool", result, tool_call_id=call_id)]
