"""What makes two conversations alike: equal prompts, equal answers, nearly the same words.

Texts are compared without regard to white space. A system message that the settings give to every row is left out: it
says nothing of the row.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from chatlora.reading.conversation import Conversation, Message

SHINGLE = 5  # characters: as good for Chinese as for words
SKETCHED = 32_768  # characters of a row that are looked at for near duplicates
NUM_MINIMA = 128


@dataclass(frozen=True, slots=True)
class Likeness:
    """64-bit hashes, equal where what they are of is equal. whole: the conversation; answer: its last reply, without
    the thought before it, and all in front; prompts: what stands before each reply (`_replies`), one at least. sketch:
    `NUM_MINIMA` MinHashes, as uint16: two rows share as many of them as they share of their five-grams. group: the
    field `group_by`; 0: none."""

    whole: int
    answer: int
    prompts: tuple[int, ...]
    sketch: bytes
    group: int = 0


def likeness_of(conversation: Conversation, given_system: str | None = None) -> Likeness:
    messages = conversation.messages
    if given_system is not None and messages and messages[0].role == "system" and messages[0].content == given_system:
        messages = messages[1:]
    so_far = blake2b(json.dumps(conversation.tools, sort_keys=True).encode(), digest_size=8)
    prompts, answer, replies = [], 0, _replies(messages)
    for index, message in enumerate(messages):
        said = json.dumps(_said(message), sort_keys=True).encode()
        if index in replies:
            prompts.append(_number(so_far.digest()))
            answered = so_far.copy()
            answered.update(said)
            answer = _number(answered.digest())
        so_far.update(said + json.dumps(_plain(message.reasoning or "")).encode())
    group = _number(blake2b(conversation.group.encode(), digest_size=8).digest()) if conversation.group else 0
    return Likeness(_number(so_far.digest()), answer, tuple(prompts), sketch_of(messages), group)


def _replies(messages: Sequence[Message]) -> set[int]:
    """Which messages answer something. A greeting does not: what stands before it is the same in all rows of a set.

    Where nobody asks anything, all that the assistant says; where it says nothing, the last message, whoever's.
    """
    said = {index for index, message in enumerate(messages) if message.role == "assistant"}
    asked = next((index for index, message in enumerate(messages) if message.role in ("user", "tool")), len(messages))
    return {index for index in said if index > asked} or said or {len(messages) - 1}


def sketch_of(messages: Sequence[Message]) -> bytes:
    """MinHashes of what everybody but the system says, capitals or not."""
    from rensa import RMinHash

    said = (text for message in messages if message.role != "system" for text in _texts(message))
    text = _plain(" ".join(said)).casefold()[:SKETCHED]
    minima = RMinHash(num_perm=NUM_MINIMA, seed=0)
    minima.update([text[begin : begin + SHINGLE] for begin in range(max(1, len(text) - SHINGLE + 1))])
    return np.array(minima.digest(), np.uint32).astype(np.uint16).tobytes()


def _texts(message: Message) -> list[str]:
    calls = [json.dumps([call.name, call.arguments], ensure_ascii=False) for call in message.tool_calls]
    return [message.content, message.reasoning or "", *calls]


def _said(message: Message) -> list[Any]:
    return [message.role, _plain(message.content), [[call.name, call.arguments] for call in message.tool_calls]]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
