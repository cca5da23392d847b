"""What a row says, as a template takes it: found out once for a template, done to each row before it is rendered."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from chatlora.config import ControlWords, Reasoning
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.reading.hermes import HERMES, TAGS, Hermes, read_hermes
from chatlora.rendering.message_parts import CALLS, DROPS
from chatlora.rendering.template import ChatTemplate, template_messages
from chatlora.rendering.thoughts import masked_behind_tags, place_of, placed

OWN_WORDS = (
    f"{HERMES}: the system message tells of its tools in words of its own, and the template writes calls otherwise"
)
LEFT = f"{HERMES} stays text"
_CALLED, _ANSWERED = "w918279w", "w918280w"  # for an argument and a result that no template has by itself


class Taken(NamedTuple):
    """The conversation as it is rendered, and in how many of its messages what was changed, by kind."""

    conversation: Conversation
    changes: Mapping[str, int]


class Taking:
    """A template and what it takes. Picklable."""

    def __init__(
        self, template: ChatTemplate, reasoning: Reasoning, control_text: ControlWords, tokens: Collection[str]
    ) -> None:
        self.arguments_as_text = template.takes_arguments_as_text()
        self.thoughts = place_of(template, reasoning)
        called = self._called(template)
        self.has_tools = _CALLED in called and _ANSWERED in called
        self.writes_hermes = '<tool_call>\n{"name": "look"' in called
        # Tags that text may not spell: as text they are not what they are to a server.
        self.strict_tags = [tag for tag in TAGS if tag in tokens] if control_text == "text" else []

    def taken(self, conversation: Conversation) -> Taken:
        """Raises SetAside where tool use is told in text, can be read out of it only in part, and is no text either."""
        conversation, read = self._read(conversation)
        changes = Counter(read)
        messages = []
        for message in conversation.messages:
            told, change = placed(message, self.thoughts)
            messages.append(told)
            changes.update([change] if change else [])
        conversation = conversation.with_messages(messages)
        return Taken(conversation.with_arguments_as_text() if self.arguments_as_text else conversation, changes)

    def _read(self, conversation: Conversation) -> tuple[Conversation, Mapping[str, int]]:
        """Tool use read out of text, where the template renders it so."""
        read = read_hermes(conversation)
        if read is None:
            return conversation, {}
        problem, detail = read.problem or self._problem(read), ""
        if not problem:
            return read.conversation, read.changes
        texts = [message.content for message in conversation.messages]
        if any(tag in text for tag in self.strict_tags for text in texts):
            raise SetAside(problem, detail)
        return conversation, {LEFT: sum(any(tag in text for tag in TAGS) for text in texts)}

    def _problem(self, read: Hermes) -> str:
        if not self.has_tools:
            return DROPS + CALLS
        return OWN_WORDS if read.own_words and not self.writes_hermes else ""

    def _called(self, template: ChatTemplate) -> str:
        """A call and its result as the template shows them."""
        call = ToolCall("look", {"at": _CALLED}, id="call00001")
        talk = Conversation(
            (
                Message("user", "Hello"),
                Message("assistant", "", tool_calls=(call,)),
                Message("tool", _ANSWERED, tool_call_id="call00001", name="look"),
            )
        )
        talk = talk.with_arguments_as_text() if self.arguments_as_text else talk
        try:
            return template.render(template_messages(talk.as_template_input()), (), prompt=True)
        except SetAside:
            return ""


def masked_messages(
    conversation: Conversation, mask: Callable[[Any], Any], tokens: Collection[str]
) -> list[dict[str, Any]]:
    """The messages in template form, all that they say masked, but for the tags of thoughts (thoughts.py)."""
    masked = []
    for message, fields in zip(conversation.messages, template_messages(conversation.as_template_input()), strict=True):
        told = {key: value if key == "role" else mask(value) for key, value in fields.items()}
        if message.thought_text is not None:
            told["content"] = masked_behind_tags(message.content, message.thought_text, mask, tokens)
        masked.append(told)
    return masked
