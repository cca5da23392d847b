"""A tokenizer's own chat template, completed: behind the passes that it needs, found by trying.

For each kind of conversation that the template refuses, the passes are tried that could make it render; one stays
where the conversation is then rendered and proved, like any row. Where nothing is refused nothing is added, so what
the template renders exactly by itself it renders the same completed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.rendering.control_text import ControlText
from chatlora.rendering.embedded import FAMILIES, REPLY, behind, family_template
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.template import chat_template_of, resolve_template_kwargs
from chatlora.rendering.thoughts import opening_of

LONG = 1_000_000_000


class _Kind(NamedTuple):
    """A made-up conversation, and which passes could help where it is refused, the first choice first."""

    conversation: Conversation
    any_reasoning: bool
    ways: tuple[str, ...]


_QUESTION, _NEXT = Message("user", "Where is it?"), Message("user", "And now?")
_ANSWER, _LAST = Message("assistant", "Far north."), Message("assistant", "Still there.")
_TALK = Conversation((_QUESTION, _ANSWER, _NEXT, _LAST))
_THOUGHTFUL = Conversation(
    (_QUESTION, Message("assistant", "Far north.", "A map helps."), _NEXT, Message("assistant", "There.", "It stays."))
)
_LOOK = {"name": "look", "description": "Looks it up", "parameters": {"type": "object", "properties": {}}}
_CALLING = Conversation(
    (
        _QUESTION,
        Message("assistant", "", tool_calls=(ToolCall("look", {"at": "Oslo"}, id="call00001"),)),
        Message("tool", "59 degrees", tool_call_id="call00001", name="look"),
        _ANSWER,
    ),
    ({"type": "function", "function": _LOOK},),
)
_KINDS = (
    _Kind(_TALK, False, ("parts", REPLY)),
    _Kind(Conversation((Message("system", "Be brief."), *_TALK.messages)), False, ("system",)),
    _Kind(_CALLING, False, ("tools",)),
    _Kind(_THOUGHTFUL, True, ("thinking", "thoughts")),
    _Kind(_TALK, True, ("empty_thought",)),
)


def embedded_template(name: str, tokenizer: Any) -> str:
    """The text of `embedded:NAME` for this tokenizer."""
    return family_template(name) if name in FAMILIES else completed(tokenizer)


def completed(tokenizer: Any) -> str:
    """The tokenizer's template behind the passes that it needs; itself where it needs none or none helps."""
    own, passes = _Own(tokenizer), set[str]()
    for kind in _KINDS:
        allowed = [way for way in kind.ways if way != REPLY or own.opens_thought()]
        ways = (passes | added for added in (set[str](), *({way} for way in allowed)))
        found = next((way for way in ways if own.renders(kind, behind(tuple(way), own.template))), None)
        if found is None and kind is _KINDS[0]:  # not even plain text: no pass mends that
            return own.template
        passes = passes if found is None else found
    return behind(tuple(passes), own.template)


def of_its_family(tokenizer: Any) -> Iterator[str]:
    """The names of the package's templates whose prompts are those of the tokenizer's own."""
    own = _Own(tokenizer)
    wanted = [own.prompt(kind, own.template) for kind in _KINDS[:2]]
    for name in FAMILIES:
        if [own.prompt(kind, family_template(name)) for kind in _KINDS[:2]] == wanted:
            yield name


class _Own:
    """A tokenizer and its own template, and others tried in its place, told what its own is told."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template_of(tokenizer, None)
        text = ControlText(tokenizer)
        self._renderers = {
            any_reasoning: Renderer(
                tokenizer,
                chat_template_kwargs=resolve_template_kwargs(self.template, {}, any_reasoning=any_reasoning),
                reasoning="field",  # what the template shows, not what can be told in a reply's text
                text=text,
            )
            for any_reasoning in (False, True)
        }

    def renders(self, kind: _Kind, template: str) -> bool:
        try:
            self._renderers[kind.any_reasoning].under(template).render(kind.conversation, max_length=LONG)
        except SetAside:
            return False
        return True

    def prompt(self, kind: _Kind, template: str) -> list[int] | None:
        """The ids in front of the last reply; None where the template renders none."""
        asked = Conversation(kind.conversation.messages[:-1])
        try:
            return self._renderers[kind.any_reasoning].under(template).prompt_ids(asked)
        except SetAside:
            return None

    def opens_thought(self) -> bool:
        prompt = self.prompt(_KINDS[0], self.template)
        return prompt is not None and bool(opening_of(str(self.tokenizer.decode(prompt))))
