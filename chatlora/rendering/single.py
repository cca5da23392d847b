"""One conversation rendered by itself: the two functions that other programs call."""

from collections.abc import Mapping
from typing import Any

from chatlora.config import OverLength, Supervise
from chatlora.reading.conversation import Conversation
from chatlora.rendering.examples import EvalExample, Example
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.template import chat_template_of, resolve_template_kwargs


def render(
    conversation: Conversation,
    tokenizer: Any,
    *,
    max_length: int,
    over_length: OverLength = "fit",
    supervise: Supervise = "all",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Example]:
    """One conversation's training examples, as if it were all of the data (which decides on `enable_thinking`).

    For many conversations build a `Renderer` once.
    """
    renderer = _renderer_of(conversation, tokenizer, chat_template_kwargs)
    rendered = renderer.render(conversation, max_length=max_length, over_length=over_length, supervise=supervise)
    return list(rendered.examples)


def render_for_evaluation(
    conversation: Conversation,
    tokenizer: Any,
    *,
    max_prompt_length: int | None,
    max_new_tokens: int,
    over_length: OverLength = "fit",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[EvalExample]:
    """One conversation's samples, as if it were all of the data (which decides on `enable_thinking`).

    For many conversations build a `Renderer` once; it also tells what was set aside.
    """
    renderer = _renderer_of(conversation, tokenizer, chat_template_kwargs)
    return list(
        renderer.render_for_evaluation(
            conversation, max_prompt_length=max_prompt_length, max_new_tokens=max_new_tokens, over_length=over_length
        )
    )


def _renderer_of(conversation: Conversation, tokenizer: Any, kwargs: Mapping[str, Any] | None) -> Renderer:
    any_reasoning = any(message.reasoning for message in conversation.messages)
    template = chat_template_of(tokenizer, None)
    resolved = resolve_template_kwargs(template, kwargs or {}, any_reasoning=any_reasoning)
    return Renderer(tokenizer, chat_template_kwargs=resolved)
