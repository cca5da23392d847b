"""Which of the package's chat templates would render a row that the one in use refuses: found by rendering it."""

import functools
from typing import Any

from chatlora.config import Supervise
from chatlora.embedded_model import EMBEDDED
from chatlora.errors import ModelError, SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering.completion import LONG, completed, of_its_family
from chatlora.rendering.embedded import COMPLETED, FAMILIES, family_template, fitting_family
from chatlora.rendering.message_parts import DROPS
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.template import RAISES
from chatlora.rendering.turns import NO_STOP, NOT_CONTINUED

LIES_WITH_THE_TEMPLATE = (DROPS, RAISES, NOT_CONTINUED, NO_STOP)  # how the reasons of such refusals begin


def lifted_by(renderer: Renderer, conversation: Conversation, refused: SetAside, supervise: Supervise) -> str:
    """`embedded:NAME` of the template that renders the conversation, proved like any; empty where none does.

    Asked for every refused row by itself: it must not matter which process met which row first.
    """
    if not refused.reason.startswith(LIES_WITH_THE_TEMPLATE):
        return ""
    return next((name for name, other in _others(renderer) if _renders(other, conversation, supervise)), "")


@functools.lru_cache(maxsize=2)  # one for training and one for evaluation; a renderer is only equal to itself
def _others(renderer: Renderer) -> tuple[tuple[str, Renderer], ...]:
    return tuple(
        (EMBEDDED + name, renderer.under(template))
        for name, template in _templates(renderer.tokenizer)
        if template != renderer.chat_template
    )


@functools.lru_cache(maxsize=2)
def _templates(tokenizer: Any) -> list[tuple[str, str]]:
    """By name. What knows all of its family's own forms comes first, what tells them in text last."""
    if not tokenizer.chat_template:
        name = fitting_family(tokenizer).removeprefix(EMBEDDED)
        return [(name, family_template(name))]
    try:
        texts = {name: family_template(name) for name in of_its_family(tokenizer)} | {COMPLETED: completed(tokenizer)}
    except ModelError:  # the tokenizer's own does not compile, or does not end: another is in use
        return []
    return sorted(texts.items(), key=lambda item: item[0] in FAMILIES and bool(FAMILIES[item[0]].passes))


def _renders(renderer: Renderer, conversation: Conversation, supervise: Supervise) -> bool:
    try:
        renderer.render(conversation, max_length=LONG, supervise=supervise)
    except (SetAside, ModelError):
        return False
    return True
