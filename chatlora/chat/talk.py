"""What has been said so far: exchanges of a question and an answer each, under a system message."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from chatlora.errors import ChatError, ChatLoraError
from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.formats import parse_row


@dataclass(frozen=True, slots=True)
class Talk:
    """messages: user, assistant, user, ...; left: how many exchanges have left it, for want of room."""

    system: str | None = None
    messages: tuple[Message, ...] = ()
    left: int = 0

    @property
    def conversation(self) -> Conversation:
        first = () if self.system is None else (Message("system", self.system),)
        return Conversation((*first, *self.messages))

    @property
    def num_exchanges(self) -> int:
        return len(self.messages) // 2

    def with_message(self, message: Message) -> Self:
        return replace(self, messages=(*self.messages, message))

    def without_last(self) -> Self:
        """Without the last exchange, or the question that has no answer yet."""
        return replace(self, messages=self.messages[: (len(self.messages) - 1) // 2 * 2])

    def without_first(self) -> Self:
        return replace(self, messages=self.messages[2:], left=self.left + 1)


class Fitted(NamedTuple):
    """A talk that fits into the model, the ids of its prompt, and how many tokens its answer may have."""

    talk: Talk
    prompt: list[int]
    room: int


def fitted(talk: Talk, prompt_ids: Callable[[Conversation], list[int]], limit: int | None, longest: int) -> Fitted:
    """The oldest exchanges leave, whole, until prompt and answer have room; the system message stays.

    limit: tokens that the model was made for; longest: of an answer. Raises ChatError where the last question alone
    is too long for any answer.
    """
    prompt = prompt_ids(talk.conversation)
    while limit is not None and len(prompt) + longest > limit and talk.num_exchanges:
        talk = talk.without_first()
        prompt = prompt_ids(talk.conversation)
    room = longest if limit is None else min(longest, limit - len(prompt))
    if room < 1:
        raise ChatError(
            f"the message takes {len(prompt):,} tokens with the template around it, and the model was made for "
            f"{limit:,}: say it shorter"
        )
    return Fitted(talk, prompt, room)


def row_of(talk: Talk) -> dict[str, Any]:
    """A training row. Texts as they were generated: a thought stands at their head, where the reader finds it."""
    messages = []
    for message in talk.conversation.messages:
        fields: dict[str, Any] = {"role": message.role, "content": (message.thought_text or "") + message.content}
        if message.loss is not None:
            fields["loss"] = message.loss
        messages.append(fields)
    return {"messages": messages}


def save(talk: Talk, path: Path) -> None:
    """Append the talk to a file of rows. Raises ChatError where it cannot be, or where no reader would read it so."""
    if path.suffix not in (".jsonl", ".ndjson"):
        raise ChatError(f"/save {path}: rows are JSON Lines, so the file's name must end with .jsonl")
    row = row_of(talk)
    try:
        read = parse_row(row)
    except ChatLoraError as error:
        raise ChatError(*(f"/save: as a row it could not be read: {problem}" for problem in error.problems)) from None
    if read != talk.conversation:
        raise ChatError("/save: the reader of rows would make another conversation of it; nothing was written")
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        with path.open("ab+") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            is_open_ended = end and file.read(1) != b"\n"  # of a last row without a line break
            file.write(("\n" * bool(is_open_ended) + line).encode("utf-8"))
    except OSError as error:
        raise ChatError(f"/save: {path} cannot be written: {error.strerror}") from None
