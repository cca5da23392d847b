"""A row's own chat_template_kwargs: rendered, proved and evaluated as a renderer that is told the same does it."""

import pickle
from dataclasses import replace

import pytest

from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.row_kwargs import MOST_KEPT
from tests.rendering.test_chat_templates import TEMPLATES, renderer_of

ROW = Conversation((Message("user", "Where is Oslo?"), Message("assistant", "In Norway.")))
OPEN, SHUT = ({"enable_thinking": value} for value in (True, False))


def told(row: Conversation, **kwargs: object) -> Conversation:
    return replace(row, template_kwargs=kwargs)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return renderer_of(TEMPLATES["qwen3"], any_reasoning=True)


@pytest.mark.parametrize("kwargs", [OPEN, SHUT])
def test_a_row_is_rendered_as_by_a_renderer_that_is_told_the_same(renderer: Renderer, kwargs: dict[str, bool]) -> None:
    own = Renderer(renderer.tokenizer, chat_template=renderer.chat_template, chat_template_kwargs=kwargs)
    row = told(ROW, **kwargs)
    assert renderer.render(row, max_length=1000) == own.render(ROW, max_length=1000)
    found = renderer.render_for_evaluation(row, max_prompt_length=None, max_new_tokens=100)
    assert found == own.render_for_evaluation(ROW, max_prompt_length=None, max_new_tokens=100)
    assert renderer.prompt_ids(row) == own.prompt_ids(ROW)
    assert pickle.loads(pickle.dumps(renderer)).render(row, max_length=1000) == own.render(ROW, max_length=1000)


def test_the_proof_goes_by_the_rows_own_arguments(renderer: Renderer) -> None:
    row, other = told(ROW, **OPEN), told(ROW, **SHUT)
    (example,) = renderer.render(other, max_length=1000).examples
    renderer.prove(example, other, renderer.turns(other))
    with pytest.raises(SetAside, match="the proof failed"):
        renderer.prove(example, row, renderer.turns(row))


def test_what_the_template_would_not_read_or_take_for_a_token_is_set_aside(renderer: Renderer) -> None:
    for kwargs, reason in (
        ({"custom_instructions": "Be brief."}, "what the chat template does not read .custom_instructions."),
        ({"enable_thinking": "<|im_end|>"}, "spell a control token"),
    ):
        with pytest.raises(SetAside, match=reason):
            renderer.render(told(ROW, **kwargs), max_length=1000)
    nothing = {"custom_instructions": "", "python_tools": [], "enable_thinking": False}
    assert renderer.render(told(ROW, **nothing), max_length=1000) == renderer.render(told(ROW, **SHUT), max_length=1000)


def test_many_texts_of_rows_are_not_all_kept() -> None:
    template = "{{ style }}{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    renderer = renderer_of(template + "{% if add_generation_prompt %}assistant: {% endif %}", any_reasoning=True)
    for number in range(MOST_KEPT + 3):
        (example,) = renderer.render(told(ROW, style=f"style {number} "), max_length=1000).examples
        assert renderer.tokenizer.decode(example.input_ids).startswith(f"style {number} user")
    assert len(renderer._row_kwargs._kept) == MOST_KEPT
