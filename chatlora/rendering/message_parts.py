"""What a message is made of, and whether a text holds it.

A template may drop any of it without a word: tool calls beside content, reasoning, a tool's answer. Two searches find
out. `end_of_parts` looks for the very values; a short one (`2`, `OK`) may be met by accident, so `Sentinels` puts
values that no text holds in their place, and the template must show those too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatlora.errors import SetAside
from chatlora.reading.conversation import split_reasoning
from chatlora.rendering.control_text import unmask

DROPS = "the chat template drops "
TEXT, REASONING, CALLS, TOOLS = "the reply's text", "reasoning", "tool calls", "the tools on offer"

SENTINEL = "w918272w"  # for the text of a message, where no text may hold it by accident

Part = tuple[str, str | int | float | bool | None]  # what it is called in a reason, and its value


def reply_parts(message: Mapping[str, Any]) -> Iterator[Part]:
    """All that an assistant's message (in template form) says: reasoning, text, names and argument values of calls.

    A thought at the head of the text is reasoning too: a template may take it out of there.
    """
    inside = split_reasoning(message["content"])
    for thought in (message.get("reasoning_content", ""), inside.reasoning or ""):
        if thought.strip():
            yield REASONING, thought
    if inside.content.strip():
        yield TEXT, inside.content
    for call in message.get("tool_calls", ()):
        yield CALLS, call["function"]["name"]
        yield from ((CALLS, value) for value in _leaves(call["function"]["arguments"]))


def end_of_parts(text: str, parts: Iterator[Part]) -> int:
    """Where the last of the parts ends in `text`. Raises SetAside naming the kind of the first that is not in it."""
    end, text = 0, unmask(text)  # of the same length; a template may escape what stands beside masked text
    for kind, value in parts:
        spelling = next((form for form in _forms(value) if form in text), None)
        if spelling is None:
            raise SetAside(DROPS + kind)
        end = max(end, text.find(spelling) + len(spelling))
    return end


def check_prompt(prompt: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
    """Everything that leads to a reply stands in its prompt, but for earlier thoughts, which many templates leave out.

    Raises SetAside naming what was dropped.
    """
    visible = unmask(prompt)
    end_of_parts(prompt, ((TOOLS, tool.get("function", tool).get(_told_by(tool), "")) for tool in tools))
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            end_of_parts(prompt, (part for part in reply_parts(message) if part[0] != REASONING))
        elif not any(form in visible for form in _forms(message["content"])):
            raise SetAside(DROPS + a_message(message["role"]), f"message {number}")


def a_message(role: str) -> str:
    return f"{'an' if role == 'assistant' else 'a'} {role} message"


class Sentinels:
    """Stand-ins for the values of a message or of tools: no text holds them, and each keeps its value's type."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The assistant's message with stand-ins for its text, its reasoning and its calls' names and values."""
        shown = dict(message)
        for field, kind in (("content", TEXT), ("reasoning_content", REASONING), ("thinking", REASONING)):
            if shown.get(field, "").strip():
                shown[field] = self._stand_in(kind, "")
        if "tool_calls" in shown:
            shown["tool_calls"] = [
                {
                    **call,
                    "function": {
                        "name": self._stand_in(CALLS, ""),
                        "arguments": self._value(call["function"]["arguments"]),
                    },
                }
                for call in shown["tool_calls"]
            ]
        if "thinking" in shown:  # the same thought under a second name
            shown["thinking"] = shown["reasoning_content"]
            self.parts = [part for part in self.parts if part[0] != REASONING]
            self.parts.append((REASONING, shown["reasoning_content"]))
        return shown

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The tools with stand-ins for their names."""
        return [
            {**tool, "function": {**tool["function"], "name": self._stand_in(TOOLS, "")}}
            if "function" in tool
            else {**tool, _told_by(tool): self._stand_in(TOOLS, "")}
            for tool in tools
        ]

    def _value(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if value is None or value == "" or isinstance(value, bool):
            return value
        return self._stand_in(CALLS, value)

    def _stand_in(self, kind: str, like: str | int | float) -> Any:
        number = 918_273_000 + len(self.parts)
        stand_in = f"w{number}w" if isinstance(like, str) else number if isinstance(like, int) else number + 0.5
        self.parts.append((kind, stand_in))
        return stand_in


def _told_by(tool: Mapping[str, Any]) -> str:
    """The field that tells what the tool is."""
    return "text" if tool.get("type") == "text" else "name"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _forms(value: Any) -> Iterator[str]:
    """The ways in which templates spell a value: as it is, inside JSON, as Python prints it."""
    if isinstance(value, str):
        value = unmask(value)
        yield value.strip()
        yield json.dumps(value, ensure_ascii=False)[1:-1].strip()
        yield json.dumps(value)[1:-1]
        yield repr(value)[1:-1]
    else:
        yield json.dumps(value)
        yield str(value)
