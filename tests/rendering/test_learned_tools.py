"""A tool's message that is to be learned: its own text and what ends it, and nothing of the next message.

Run: pytest tests/rendering/test_learned_tools.py
"""

from dataclasses import replace

import pytest

from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.turns import RUNS_ON
from tests.exactness import spans
from tests.rendering.test_chat_templates import CALL, TEMPLATES, renderer_of

LONG = 10_000
OTHER = replace(CALL, id="call00002")


def conversation(*learned: bool) -> Conversation:
    """A question, as many calls and results as `learned` has, each result learned or not, and a reply that is not."""
    calls = (CALL, OTHER)[: len(learned)]
    results = (
        Message("tool", f"seen by {call.id}", tool_call_id=call.id, name=call.name, loss=wanted)
        for call, wanted in zip(calls, learned, strict=True)
    )
    asked = (Message("user", "Look."), Message("assistant", "", tool_calls=calls, loss=False))
    return Conversation((*asked, *results, Message("assistant", "Far north.", loss=False)))


def targets(renderer: Renderer, row: Conversation) -> list[str]:
    [example] = renderer.render(row, max_length=LONG).examples
    return [renderer.tokenizer.decode(example.input_ids[start:end]) for start, end in spans(example)]


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        ("gemma4", (True,)),  # result and reply are one turn there
        ("gptoss", (True,)),  # what ends the result stops no reply
        ("qwen2_5", (True, False)),  # results are told in one turn
        ("qwen2_5", (True, True)),
        ("nemotron_3_nano", (True, False)),
    ],
)
def test_a_result_that_nothing_ends_sets_the_row_aside(template: str, learned: tuple[bool, ...]) -> None:
    with pytest.raises(SetAside) as refused:
        renderer_of(TEMPLATES[template], any_reasoning=False).render(conversation(*learned), max_length=LONG)
    assert refused.value.reason == RUNS_ON


@pytest.mark.parametrize(
    ("template", "learned", "ends"),
    [
        ("qwen2_5", (True,), "\n</tool_response><|im_end|>"),
        ("qwen2_5", (False, True), "\n</tool_response><|im_end|>"),
        ("llama3_1", (True,), '"<|eot_id|>'),
        ("muse_glimmer", (True, True), "\n</tool_output><|eot|>"),
    ],
)
def test_a_result_is_learned_to_its_own_end(template: str, learned: tuple[bool, ...], ends: str) -> None:
    wanted = [f"seen by {call.id}{ends}" for call, each in zip((CALL, OTHER), learned, strict=False) if each]
    assert targets(renderer_of(TEMPLATES[template], any_reasoning=False), conversation(*learned)) == wanted
