"""What a row says, as a template takes it: found out once for a template, done to each row before it is rendered."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from chatlora.config import Reasoning
from chatlora.reading.conversation import Conversation
from chatlora.rendering.template import ChatTemplate, template_messages
from chatlora.rendering.thoughts import masked_behind_tags, place_of, placed


class Taken(NamedTuple):
    """The conversation as it is rendered, and in how many of its messages what was changed, by kind."""

    conversation: Conversation
    changes: Mapping[str, int]


class Taking:
    """A template and what it takes. Picklable."""

    def __init__(self, template: ChatTemplate, reasoning: Reasoning) -> None:
        self.arguments_as_text = template.takes_arguments_as_text()
        self.thoughts = place_of(template, reasoning)

    def taken(self, conversation: Conversation) -> Taken:
        changes: Counter[str] = Counter()
        messages = []
        for message in conversation.messages:
            told, change = placed(message, self.thoughts)
            messages.append(told)
            changes.update([change] if change else [])
        conversation = conversation.with_messages(messages)
        return Taken(conversation.with_arguments_as_text() if self.arguments_as_text else conversation, changes)


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
