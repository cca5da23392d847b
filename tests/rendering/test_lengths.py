"""What is left of a conversation that is too long, and the samples that evaluation makes of its turns.

Run: pytest tests/rendering/test_lengths.py
"""

import pytest

from chatlora.errors import DataError, SetAside
from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering.renderer import IGNORE_INDEX, Example, Renderer
from chatlora.rendering.single import render_for_evaluation
from tests.exactness import rendered_ids, spans
from tests.tiny_tokenizers import GLM, GLM_TOKENS, TOOL_TOKENS, tiny_tokenizer

MULTI = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Where is it?"),
        Message("assistant", "In the city centre.\n"),
        Message("user", "多少钱？"),
        Message("assistant", "不需要，是免费开放。"),
    ),
    place="train.jsonl:7",
)
LONG = 10_000


@pytest.fixture(scope="module")
def chatml() -> Renderer:
    return Renderer(tiny_tokenizer())


@pytest.fixture(scope="module")
def glm() -> Renderer:
    return Renderer(
        tiny_tokenizer(chat_template=GLM, control_tokens=GLM_TOKENS, plain_tokens=TOOL_TOKENS, eos="<|endoftext|>")
    )


@pytest.fixture(scope="module")
def lengths(chatml: Renderer) -> tuple[int, int, int]:
    """Ids of MULTI up to the end of its first reply, of its second, and in all."""
    [example] = chatml.render(MULTI, max_length=LONG).examples
    (_, first), (_, second) = spans(example)
    return first, second, len(example.input_ids)


def test_fit_keeps_as_many_whole_turns_from_the_start_as_fit(chatml: Renderer, lengths: tuple[int, int, int]) -> None:
    first, second, _ = lengths
    [whole] = chatml.render(MULTI, max_length=LONG).examples
    rendered = chatml.render(MULTI, max_length=second)
    assert (rendered.turns, rendered.lost_turns, rendered.lost_targets) == (2, 0, 0)
    rendered = chatml.render(MULTI, max_length=second - 1)
    assert (rendered.turns, rendered.lost_turns) == (1, 1)
    assert rendered.examples == (Example(whole.input_ids[:first], whole.labels[:first]),)
    assert rendered.lost_targets == sum(label != IGNORE_INDEX for label in whole.labels[first:])
    with pytest.raises(SetAside) as refused:
        chatml.render(MULTI, max_length=first - 1)
    assert refused.value.reason == "longer than max_length: no reply fits"
    assert f"{lengths[2]} tokens" in refused.value.detail


def test_cut_cuts_at_max_length(chatml: Renderer, lengths: tuple[int, int, int]) -> None:
    first, _, _ = lengths
    [whole] = chatml.render(MULTI, max_length=LONG).examples
    rendered = chatml.render(MULTI, max_length=first - 2, over_length="cut")
    assert rendered.examples == (Example(whole.input_ids[: first - 2], whole.labels[: first - 2]),)
    assert (rendered.turns, rendered.lost_turns) == (1, 1)
    assert rendered.lost_targets == sum(label != IGNORE_INDEX for label in whole.labels[first - 2 :])
    with pytest.raises(SetAside, match="no target is left"):
        chatml.render(MULTI, max_length=4, over_length="cut")


def test_drop_and_error_name_the_length(chatml: Renderer, lengths: tuple[int, int, int]) -> None:
    with pytest.raises(SetAside, match=rf"^longer than max_length \({lengths[2]} tokens, max_length is 20\)$"):
        chatml.render(MULTI, max_length=20, over_length="drop")
    with pytest.raises(DataError, match=rf"train\.jsonl:7: {lengths[2]} tokens.*data\.max_length.* is 20.*over_length"):
        chatml.render(MULTI, max_length=20, over_length="error")


# ---- evaluation


def test_each_assistant_turn_is_a_sample_rendered_as_the_last_message(glm: Renderer) -> None:
    first, second = glm.render_for_evaluation(MULTI, max_prompt_length=None, max_new_tokens=2)
    assert [first.turn, second.turn] == [0, 1]
    assert first.input_ids == rendered_ids(glm, MULTI, 2, prompt=True)
    assert second.input_ids == rendered_ids(glm, MULTI, 4, prompt=True)
    assert (
        glm.tokenizer.decode(first.output_ids) == "In the city centre.\n<|endoftext|>"
    )  # whole, and as a last reply ends
    assert render_for_evaluation(MULTI, glm.tokenizer, max_prompt_length=None, max_new_tokens=2) == [first, second]
    last = glm.render_for_evaluation(MULTI, max_prompt_length=None, max_new_tokens=2, supervise="last")
    assert list(last) == [second]


def test_only_cut_cuts_references_and_nothing_cuts_prompts(chatml: Renderer) -> None:
    whole = list(chatml.render_for_evaluation(MULTI, max_prompt_length=None, max_new_tokens=3))
    cut = chatml.render_for_evaluation(MULTI, max_prompt_length=None, max_new_tokens=3, over_length="cut")
    assert [sample.output_ids for sample in cut] == [sample.output_ids[:3] for sample in whole]
    assert cut.cut_references == 2
    limit = len(whole[0].input_ids)
    for over_length in ("fit", "cut", "drop"):
        short = chatml.render_for_evaluation(MULTI, max_prompt_length=limit, max_new_tokens=3, over_length=over_length)
        assert [sample.turn for sample in short] == [0]
        [(turn, reason)] = short.set_aside
        assert turn == 1
        assert f"{len(whole[1].input_ids)} tokens" in reason
    with pytest.raises(DataError, match=r"train\.jsonl:7: .*max_prompt_length"):
        chatml.render_for_evaluation(MULTI, max_prompt_length=limit, max_new_tokens=3, over_length="error")


def test_a_prompt_is_what_apply_chat_template_gives(chatml: Renderer) -> None:
    conversation = Conversation(MULTI.messages[:4])
    assert chatml.prompt_ids(conversation) == rendered_ids(chatml, conversation, 4, prompt=True)
