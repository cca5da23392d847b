"""What a person should know of a row that is trained as it stands: told beside the turns, changed in nothing."""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.encoding import wrong_encoding
from chatlora.rendering.control_text import ControlText, is_masked, unmask
from chatlora.rendering.turns import Turn, greeting

TEXT_SPELLS_CONTROL = "the text spells a control token, which stays text"
IS_CONTROL = "the text spells a control token, which it is as it is to a server"
EMPTY = "the reply is empty"
NAMELESS = "the speaker's name is not shown by the chat template"
OPENS = "the assistant speaks first, which is context only"
GARBLED = "the text shows signs of a wrong encoding"
UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode's categories of what leaves no ink


class Remark(NamedTuple):
    """On one message. `kind` is the same words for all of its kind."""

    kind: str
    detail: str = ""


def remarks_on(
    conversation: Conversation, text: ControlText, rendered: str, turns: Sequence[Turn]
) -> tuple[Remark, ...]:
    """rendered: the whole conversation, as it is masked; turns: those that are learned."""
    messages, learned = conversation.messages, {turn.index for turn in turns}
    found = [Remark(OPENS) for index in range(greeting(conversation)) if index not in learned]
    found += [Remark(EMPTY) for index in sorted(learned) if _is_empty(messages[index])]
    named = [message.name for message in messages if message.name and message.role != "tool"]
    found += [Remark(NAMELESS, name) for name in named if name not in unmask(rendered)]
    signs = (next(filter(None, map(wrong_encoding, _texts(message))), None) for message in messages)
    found += [Remark(GARBLED, sign) for sign in signs if sign]
    if text.as_served or is_masked(rendered) or any(is_masked(turn.reply) for turn in turns):
        kind = IS_CONTROL if text.as_served else TEXT_SPELLS_CONTROL
        words = (next(filter(None, map(text.control_in, _texts(message))), None) for message in messages)
        found += [Remark(kind, word) for word in words if word]
    return tuple(found)


def _is_empty(message: Message) -> bool:
    shows = any(unicodedata.category(character) not in UNSEEN for character in message.content)
    return message.role == "assistant" and not (shows or message.reasoning or message.tool_calls)


def _texts(message: Message) -> Iterator[str]:
    tags = () if message.thought_text is None else ("<think>", "</think>")  # those of a thought at its head
    yield functools.reduce(lambda text, tag: text.replace(tag, "", 1), tags, message.content)
    yield message.reasoning or ""
    for call in message.tool_calls:
        yield call.name
        yield from _strings(call.arguments)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
