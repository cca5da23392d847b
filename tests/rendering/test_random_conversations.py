"""Conversations drawn at random x chat templates: no crash, and no target that is not the reply.

Run: pytest tests/rendering/test_random_conversations.py [-m slow]. CHATLORA_DRAW_SEED draws others; a failure
names the seed and the number of its conversation.
"""

import functools
import os
from typing import Any

import pytest
from tokenizers import AddedToken

from chatlora.embedded_model import EMBEDDED
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering import embedded
from chatlora.rendering.completion import completed
from chatlora.rendering.control_text import ControlText
from chatlora.rendering.examples import Draft, Example
from chatlora.rendering.renderer import Rendered, Renderer
from tests.exactness import assert_exact, control_ids, spans
from tests.random_conversations import CONTROL, draw
from tests.rendering.test_chat_templates import TEMPLATES, renderer_of
from tests.tiny_tokenizers import (
    CHATML,
    CHATML_TOKENS,
    GLM,
    GLM_TOKENS,
    LLAMA3,
    LLAMA3_TOKENS,
    QWEN3,
    THINK_TOKENS,
    TOOL_TOKENS,
    tiny_tokenizer,
)

SEED = int(os.environ.get("CHATLORA_DRAW_SEED", "0"))
FEW, MANY = 50, 2_000
LONG = 1_000_000
NEVER = ("the proof failed", "the tokenizer reads message text as a control token", "the tokenizer cannot spell")


def families() -> dict[str, Renderer]:
    llama3: dict[str, Any] = {
        "chat_template": LLAMA3,
        "control_tokens": LLAMA3_TOKENS,
        "eos": "<|eot_id|>",
        "bos": "<|begin_of_text|>",
    }
    stripping = [AddedToken(word, rstrip=True, special=True, normalized=False) for word in CHATML_TOKENS]
    glm: dict[str, Any] = {"chat_template": GLM, "control_tokens": GLM_TOKENS, "eos": "<|endoftext|>"}
    return {
        "chatml": Renderer(tiny_tokenizer(chat_template=CHATML)),
        "tokens that swallow the space after them, and tokens of space": Renderer(
            tiny_tokenizer(control_tokens=stripping, plain_tokens=["\n\n", "  "])
        ),
        "llama3": Renderer(tiny_tokenizer(**llama3, splitting="llama3")),
        "llama3 under GPT-2's splitting": Renderer(tiny_tokenizer(**llama3)),
        "glm": Renderer(tiny_tokenizer(**glm, plain_tokens=TOOL_TOKENS)),
        "qwen3": Renderer(
            tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS),
            chat_template_kwargs={"enable_thinking": False},
        ),
    }


FAMILIES = families()
EMBEDDED_TEMPLATES = [EMBEDDED + name for name in embedded.FAMILIES]
COMPLETED = " completed"
SOME_COMPLETED = [name + COMPLETED for name in ("deepseekv3", "gemma", "llama3_1", "nemotron_3_nano")]


@functools.cache
def renderer_for(name: str, any_reasoning: bool) -> Renderer:
    if name in FAMILIES:
        return FAMILIES[name]
    if name in EMBEDDED_TEMPLATES:
        template = embedded.family_template(name.removeprefix(EMBEDDED))
        return renderer_of(template, any_reasoning=any_reasoning)
    renderer = renderer_of(TEMPLATES[name.removesuffix(COMPLETED)], any_reasoning=any_reasoning)
    return renderer.under(completed(renderer.tokenizer)) if name.endswith(COMPLETED) else renderer


def outcome(renderer: Renderer, conversation: Conversation) -> Rendered | str:
    try:
        return renderer.render(conversation, max_length=LONG)
    except SetAside as refused:
        return refused.reason


def check(name: str, number: int) -> bool:
    """Whether the conversation was rendered; then each target is a reply, and text is text."""
    conversation, twin = draw(SEED, number), draw(SEED, number, hostile=False)
    renderer = renderer_for(name, any(message.reasoning for message in conversation.messages))
    rendered = outcome(renderer, conversation)
    harmless = rendered if conversation == twin else outcome(renderer, twin)
    if isinstance(rendered, str) or isinstance(harmless, str):
        assert rendered == harmless, conversation.place
        assert not str(rendered).startswith(NEVER), conversation.place
        return False
    assert_replies(renderer, conversation, rendered)
    if conversation == twin:
        if all(message.loss is None for message in conversation.messages):
            assert_exact(renderer, conversation, rendered.examples)
        return True
    for example, other in zip(rendered.examples, harmless.examples, strict=True):
        assert control_ids(renderer, example.input_ids) == control_ids(renderer, other.input_ids), conversation.place
    return True


def check_all(name: str, numbers: range = range(FEW)) -> None:
    rendered = [check(name, number) for number in numbers]
    assert any(rendered) or not renders_anything(name)


def assert_replies(renderer: Renderer, conversation: Conversation, rendered: Rendered) -> None:
    """As many spans of targets as replies to learn, each with all of its own and what stops it."""
    decode, supervised = renderer.tokenizer.decode, [m for m in conversation.messages if m.role == "assistant"]
    learned = [message for message in supervised if message.loss is not False]
    found = [example.input_ids[start:end] for example in rendered.examples for start, end in spans(example)]
    assert len(found) == len(learned) == rendered.turns, conversation.place
    spelled = sorted(((decode(ids), ids) for ids in found), key=lambda pair: pair[0])
    for message in learned:
        parts = [message.content, message.reasoning or "", *(call.name for call in message.tool_calls)]
        holders = [text for text, _ in spelled if all(squeezed(part) in squeezed(text) for part in parts)]
        assert holders, (conversation.place, message)
    for _, ids in spelled:
        assert control_ids(renderer, ids[-1:]), conversation.place


def squeezed(text: str) -> str:
    """Without space: templates trim it, and some control tokens swallow it."""
    return "".join(text.split())


@pytest.mark.parametrize(
    "name",
    [
        *(*FAMILIES, *EMBEDDED_TEMPLATES, *SOME_COMPLETED),
        *(name for name in TEMPLATES if not name.endswith("_training")),
    ],
)
def test_conversations_drawn_at_random_are_exact_or_refused(name: str) -> None:
    check_all(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*FAMILIES, *EMBEDDED_TEMPLATES, *TEMPLATES, *(name + COMPLETED for name in TEMPLATES)]
)
def test_many_conversations_drawn_at_random_are_exact_or_refused(name: str) -> None:
    check_all(name, range(FEW, MANY))


def renders_anything(name: str) -> bool:
    """Those that refuse plain text refuse all."""
    return not name.startswith(("deepseek", "llava_next", "idefics3", "smolvlm"))


def test_text_that_is_not_masked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlText, "mask", lambda self, value: value)
    with pytest.raises(AssertionError):
        check_all("chatml")


@pytest.mark.parametrize("name", ["chatml", "glm", "qwen3", "llama3_1", "gptoss"])
@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, -1), (-1, 0), (0, 1)])
def test_targets_that_are_off_by_one_are_found_without_the_proof(
    monkeypatch: pytest.MonkeyPatch, name: str, first: int, last: int
) -> None:
    right = Draft.example

    def wrong(draft: Draft) -> Example:
        moved = [(max(0, start + first), max(0, end + last)) for start, end in draft.spans]
        return right(Draft(draft.ids, moved, draft.turns))

    monkeypatch.setattr(Draft, "example", wrong)
    monkeypatch.setattr(Renderer, "_prove", lambda *given, **named: None)
    with pytest.raises((AssertionError, StopIteration)):
        check_all(name)


def test_a_draw_can_be_drawn_again_and_holds_what_it_should() -> None:
    conversations = [draw(SEED, number) for number in range(300)]
    assert conversations == [draw(SEED, number) for number in range(300)]
    assert conversations[:50] != [draw(SEED + 1, number) for number in range(50)]
    assert len({repr(conversation.messages) for conversation in conversations}) == 300
    messages = [message for conversation in conversations for message in conversation.messages]
    assert {message.role for message in messages} == {"system", "user", "assistant", "tool"}
    assert any(message.tool_calls for message in messages)
    assert any(message.reasoning for message in messages)
    for spelled in (*CONTROL, "🙂", "你好", "\r\n"):
        assert any(spelled in message.content for message in messages)
    twins = [draw(SEED, number, hostile=False) for number in range(300)]
    assert 0.3 < sum(one == twin for one, twin in zip(conversations, twins, strict=True)) / 300 < 0.9
