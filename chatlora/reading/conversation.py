"""A conversation, as every other part of the project sees it.

Content is kept byte for byte as it stood in the file. Roles are the field's: system, user, assistant, tool
(ChatGLM3 calls the last one observation).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

_LEADING_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the assistant makes. `arguments` is the parsed JSON value, nearly always an object."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `loss` overrides whether it is a target; None leaves that to `data.supervise`.

    thought_text: where the thought stood in the reply's text, all that stood in front of `content`, letter by letter.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    loss: bool | None = None
    thought_text: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, the tools on offer (JSON schemas, as chat templates want them) and where the row stands.

    group: what the source's `group_by` says of it; rows of one group are held out together.
    template_kwargs: what the chat template is told for this row, over `model.chat_template_kwargs`.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    place: str | None = None
    group: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def as_template_input(self) -> list[dict[str, Any]]:
        """The messages as `apply_chat_template` takes them. Absent fields are left out: some templates print `None`."""
        return [_as_template_message(message) for message in self.messages]

    def with_messages(self, messages: Iterable[Message]) -> Self:
        """The same with other messages."""
        return replace(self, messages=tuple(messages))

    def with_arguments_as_text(self) -> Self:
        """The same, the arguments of calls as JSON text."""
        return self.with_messages(map(_with_arguments_as_text, self.messages))


class Said(NamedTuple):
    """A reply's text: the thought at its head, the text after it, and the head as it stood there (`thought_text`)."""

    reasoning: str | None
    content: str
    thought_text: str | None = None


def split_reasoning(text: str) -> Said:
    """A leading `<think>...</think>` and the text after it, without the line breaks around them.

    An empty thought is None; a thought that never closes, or does not come first, stays text: `(None, text)`.
    """
    thought = _LEADING_THOUGHT.match(text)
    if thought is None:
        return Said(None, text)
    reasoning = thought[1].strip("\n")
    return Said(reasoning if reasoning.strip() else None, text[thought.end() :], thought[0])


def reply(text: str) -> Message:
    """The assistant's, a thought at its head set apart."""
    said = split_reasoning(text)
    return Message("assistant", said.content, said.reasoning, thought_text=said.thought_text)


def _with_arguments_as_text(message: Message) -> Message:
    calls = tuple(
        call
        if isinstance(call.arguments, str)
        else replace(call, arguments=json.dumps(call.arguments, ensure_ascii=False))
        for call in message.tool_calls
    )
    return replace(message, tool_calls=calls) if calls else message


def _as_template_message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_as_template_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        fields["name"] = message.name
    return fields


def _as_template_call(call: ToolCall) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    if call.id is not None:
        fields["id"] = call.id
    return fields
