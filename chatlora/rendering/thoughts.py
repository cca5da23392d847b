"""Where a reply's thought goes before a template sees it: into its own field, into the reply's text, or nowhere.

In the text it stands in front of the answer between `<think>` and `</think>`, as models write it and servers take it
apart. What the data has so stays so, letter by letter. Where a tokenizer has the two tags as tokens, these two become
them, unlike any others in the text: a model that has them writes them, and servers read them so.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Literal

from chatlora.config import Reasoning
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering.template import ChatTemplate, template_messages

Place = Literal["field", "text", "drop"]
A_THOUGHT = "a thought"  # how all of these begin
KEPT = f"{A_THOUGHT} is kept at the head of the reply's text"
PUT = f"{A_THOUGHT} from a field of its own is put at the head of the reply's text"
LEFT_OUT = f"{A_THOUGHT} is left out"

OPEN, CLOSE = "<think>", "</think>"
_TAGS = re.compile(f"({OPEN})(.*)({CLOSE})", re.DOTALL)  # of a head: the thought itself may spell some too
_ASKED = Message("user", "Hello")
_REPLIES = 2  # to see what an earlier one keeps
_THOUGHT, _ANSWER = "w918275w", "w918276w"  # for a thought and a text that no template has by itself
_HIDDEN_OPEN, _HIDDEN_CLOSE = "w918277w", "w918278w"  # for the tags, to which templates react


def place_of(template: ChatTemplate, wanted: Reasoning) -> Place:
    """Where thoughts go under `data.reasoning`.

    `auto` is `text` where the template shows them whole there, in earlier replies too, and a field of their own not at
    all, or as that text: then what the data has is as good, and stays as it is. Never where the prompt opens them.
    """
    if wanted != "auto":
        return wanted
    inside = _as_text(_THOUGHT, OPEN, CLOSE) + _ANSWER
    opened = opening_of(_rendered(template, (_ASKED,), prompt=True))
    if opened or _replied(template, Message("assistant", inside)).count(inside) < _REPLIES:
        return "field"
    apart = _replied(template, Message("assistant", _ANSWER, _THOUGHT))
    hidden = _replied(template, Message("assistant", _as_text(_THOUGHT, _HIDDEN_OPEN, _HIDDEN_CLOSE) + _ANSWER))
    as_text = hidden.replace(_HIDDEN_OPEN, OPEN).replace(_HIDDEN_CLOSE, CLOSE)
    return "text" if _THOUGHT not in apart or apart == as_text else "field"


def placed(message: Message, place: Place) -> tuple[Message, str | None]:
    """The message with its thought in its place, and what that changed, where it is the text.

    Where the place is the text, `thought_text` is how the content begins; else None.
    """
    thought, head = (message.reasoning or "").strip(), message.thought_text
    if message.role != "assistant" or (not thought and head is None) or place == "field":
        return (message if head is None else replace(message, thought_text=None)), None
    if place == "drop":
        return replace(message, reasoning=None, thought_text=None), LEFT_OUT
    text = _as_text(message.reasoning or "", OPEN, CLOSE) if head is None else head
    told = replace(message, content=text + message.content, reasoning=None, thought_text=text)
    return told, KEPT if message.thought_text is not None else PUT


def opening_of(prompt: str) -> str:
    """The thought that a prompt begins for its reply: `<think>` and the whitespace behind it, or nothing."""
    _, tag, rest = prompt.rpartition(OPEN)
    return "" if rest.strip() else tag + rest if tag else ""


def masked_behind_tags(content: str, head: str, mask: Callable[[str], str], tokens: Collection[str]) -> str:
    """`content` masked, but for the tags of the thought at its head (`head`) where they are tokens."""
    tags = _TAGS.search(head)
    if tags is None:
        return mask(content)
    pieces = (content[: tags.start()], *tags.groups(), content[tags.end() :])
    return "".join(piece if piece in (OPEN, CLOSE) and piece in tokens else mask(piece) for piece in pieces)


def _as_text(thought: str, opening: str, closing: str) -> str:
    return f"{opening}\n{thought}\n{closing}\n\n"


def _replied(template: ChatTemplate, reply: Message) -> str:
    return _rendered(template, (_ASKED, reply) * _REPLIES)


def _rendered(template: ChatTemplate, messages: tuple[Message, ...], *, prompt: bool = False) -> str:
    try:
        return template.render(template_messages(Conversation(messages).as_template_input()), (), prompt=prompt)
    except SetAside:  # it wants something else of a conversation; rows will tell
        return ""
