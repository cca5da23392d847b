"""What a template makes of a reply without losing any of it: space trimmed, a think block or a channel put in.

All of it is what the model must generate, and so a target. It is counted by kind, for the person who wonders why a
trained model writes `<think>` where the data has none.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from chatlora.errors import SetAside
from chatlora.rendering.message_parts import REASONING, TEXT
from chatlora.rendering.template import ChatTemplate
from chatlora.rendering.turns import Messages, Turn

ALIKE = "text in the arguments of a call is written as the number, true, false or null that it spells"
VALUE = re.compile(r"true|false|null|-?(0|[1-9]\d{0,99})(\.\d{1,99})?")
TAGS = "what stands around a thought in the text is changed"
LONGEST = 60  # characters of the template's own that are shown


def with_template_edits(
    turn: Turn, template: ChatTemplate, messages: Messages, tools: Messages, spellings: Iterable[str]
) -> Turn:
    message = messages[turn.index]
    if message["role"] != "assistant":
        return turn
    kinds = template_edits(turn.reply, message, spellings)
    kinds += (ALIKE,) if _has_alike_arguments(template, messages, tools, turn.index) else ()
    return replace(turn, altered=kinds) if kinds else turn


def template_edits(reply: str, message: Mapping[str, Any], spellings: Iterable[str]) -> tuple[str, ...]:
    """The kinds of change between an assistant's message, in template form, and its reply, a stop token included.

    `spellings` are the control tokens. Both texts are masked. Calls are not looked at: each template has a form of
    its own for them.
    """
    thought, content = message.get("reasoning_content", ""), message["content"]
    found = [
        f"space around {kind} is trimmed"
        for kind, value in ((REASONING, thought), (TEXT, content))
        if value.strip() and value not in reply and value.strip() in reply
    ]
    if content.strip() not in reply:  # of it all is there but this: a thought's place is found by its tags
        found.append(TAGS)
    if "tool_calls" in message or not content.strip():
        return tuple(found)
    said = _without_stop(reply, spellings)
    text = content if content in said else content.strip()
    before, there, after = said.rpartition(text)
    if text != content:  # what is left of its own space is not put in
        before, after = before.rstrip(), after.lstrip()
    if there and before and not thought.strip():
        found.append(f"{_shown(before)} is put before {TEXT}")
    if there and after:
        found.append(f"{_shown(after)} is put after {TEXT}")
    return tuple(found)


def _has_alike_arguments(template: ChatTemplate, messages: Messages, tools: Messages, index: int) -> bool:
    """Whether the template writes an argument that is text, as `"42"`, as it would write the value 42."""
    rows = [[*messages[:index], {**messages[index], "tool_calls": calls}] for calls in _with_values(messages[index])]
    if not rows:
        return False
    try:
        said = template.render(messages[: index + 1], tools, prompt=False)
        return any(template.render(row, tools, prompt=False) == said for row in rows)
    except SetAside:  # it takes no conversation that ends with a call
        return False


def _with_values(message: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The calls of a message, each time with one argument that is the text of a value made that value."""
    calls = message.get("tool_calls", [])
    for position, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        for name, text in arguments.items() if isinstance(arguments, dict) else ():
            if isinstance(text, str) and VALUE.fullmatch(text):
                function = {**call["function"], "arguments": {**arguments, name: json.loads(text)}}
                yield [*calls[:position], {**call, "function": function}, *calls[position + 1 :]]


def _without_stop(reply: str, spellings: Iterable[str]) -> str:
    stops = (spelling for spelling in spellings if reply.endswith(spelling))
    return reply.removesuffix(max(stops, key=len, default=""))


def _shown(text: str) -> str:
    return repr(text if len(text) <= LONGEST else text[:LONGEST] + "...")
