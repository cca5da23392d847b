"""Whether a template shows every message that leads to a reply, found out by a conversation made up in its likeness.

A search for a message's own text may meet it by accident (`true`, `2`), and meets an empty one anywhere. So the row's
shape (which roles follow each other, what each message has) is filled with texts that stand nowhere else, and every
one of them must come out of the prompt. What is made up depends on the shape alone: one verdict holds for all rows of
it, whichever came first. Thoughts of earlier replies need not come out, most templates leave them out on purpose.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from chatlora.errors import SetAside
from chatlora.rendering.message_parts import CALLS, DROPS, SENTINEL, a_message
from chatlora.rendering.template import ChatTemplate

MOST_SHAPES = 4096  # that are remembered

Arguments = tuple[type, bool]  # of which type, and whether there are any


class _Shape(NamedTuple):
    """A message without its texts. calls, answers: ids by the order in which they occur, None for none."""

    role: str
    blank: bool
    thinks: bool
    named: bool
    calls: tuple[tuple[int | None, Arguments], ...]
    answers: int | None


class _Part(NamedTuple):
    message: int
    kind: str
    stand_in: str


class Contexts:
    """Which shapes of conversation a template shows whole; each is judged once. Picklable."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[Any, ...], _Part | None] = {}

    def check(
        self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Raises SetAside naming the first of `messages` of which the prompt behind them lacks something."""
        shapes, offer = _shapes(messages), _offer(tools)
        told = json.dumps([dict(template.kwargs), offer], sort_keys=True, default=str)
        key = (template.text, told, shapes)
        if key not in self._verdicts:
            if len(self._verdicts) >= MOST_SHAPES:
                self._verdicts.clear()
            self._verdicts[key] = next(_dropped(template, shapes, offer), None)
        dropped = self._verdicts[key]
        if dropped is not None:
            raise SetAside(DROPS + dropped.kind, f"message {dropped.message + 1}")


def _dropped(template: ChatTemplate, shapes: Sequence[_Shape], offer: Sequence[Mapping[str, Any]]) -> Iterator[_Part]:
    """What the template leaves out."""
    messages, parts = _made_up(shapes)
    if not messages:
        return
    prompt = template.render(messages, offer, prompt=True)
    yield from (part for part in parts if part.stand_in not in prompt)
    for part in parts:
        if not shapes[part.message].blank or part.kind == CALLS:
            continue
        # A text has its place; where there is none, does that place go too?
        messages[part.message]["content"] = ""
        if _length(template.render(messages, offer, prompt=True)) < _length(prompt) - len(part.stand_in):
            yield part
        messages[part.message]["content"] = part.stand_in


def _length(text: str) -> int:
    return sum(map(len, text.split()))  # templates may trim space that has no text beside it


def _shapes(messages: Sequence[Mapping[str, Any]]) -> tuple[_Shape, ...]:
    ids: dict[str, int] = {}

    def number(id: str | None) -> int | None:
        return None if id is None else ids.setdefault(id, len(ids))

    return tuple(
        _Shape(
            message["role"],
            not message["content"].strip(),
            "reasoning_content" in message,
            "name" in message,
            tuple((number(call.get("id")), _form(call["function"])) for call in message.get("tool_calls", ())),
            number(message.get("tool_call_id")),
        )
        for message in messages
    )


def _form(function: Mapping[str, Any]) -> Arguments:
    arguments = function["arguments"]
    return type(arguments), arguments not in ("{}", "", {}, [], None)


def _made_up(shapes: Sequence[_Shape]) -> tuple[list[dict[str, Any]], list[_Part]]:
    """Messages of these shapes, in template form, and the texts in them that must come out."""
    parts: list[_Part] = []

    def stand_in(message: int, kind: str) -> str:
        parts.append(_Part(message, kind, f"w{918_273_000 + len(parts)}w"))
        return parts[-1].stand_in

    messages = []
    for index, shape in enumerate(shapes):
        # An empty system message says nothing, and neither does the text beside a call: nothing is lost with them.
        silent = shape.blank and (shape.role == "system" or shape.calls)
        message: dict[str, Any] = {
            "role": shape.role,
            "content": "" if silent else stand_in(index, a_message(shape.role)),
        }
        if shape.thinks:
            message |= {"reasoning_content": SENTINEL, "thinking": SENTINEL}
        if shape.calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": stand_in(index, CALLS),
                        "arguments": _arguments(form, stand_in(index, CALLS) if form[1] else ""),
                    },
                    **_id("id", id),
                }
                for id, form in shape.calls
            ]
        message |= _id("tool_call_id", shape.answers) | ({"name": "look"} if shape.named else {})
        messages.append(message)
    return messages, parts


def _arguments(form: Arguments, value: str) -> Any:
    kind, _ = form
    arguments = {"at": value} if value else {}
    if kind is str:
        return json.dumps(arguments)
    return list(arguments.values()) if kind is list else arguments


def _id(field: str, number: int | None) -> dict[str, str]:
    return {} if number is None else {field: f"call{number:05}"}  # of the length that Mistral's templates ask for


def _offer(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A tool like the first: that they all are shown is found out with the row's own."""
    if not tools:
        return []
    kind = {"type": tools[0]["type"]} if "type" in tools[0] else {}
    if kind.get("type") == "text":
        return [kind | {"text": "Looks it up"}]
    told = {"name": "look", "description": "Looks it up", "parameters": {"type": "object", "properties": {}}}
    return [kind | ({"function": told} if "function" in tools[0] else told)]
