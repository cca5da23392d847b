"""A conversation becomes ids and targets: where targets begin, what stops them, what is left of a long one.

Run: pytest tests/rendering/test_renderer.py
"""

import pickle
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chatlora.config import Supervise
from chatlora.errors import ModelError, SetAside
from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.rendering.remarks import NAMELESS, OPENS, Remark
from chatlora.rendering.renderer import IGNORE_INDEX, Example, Renderer
from chatlora.rendering.single import render
from chatlora.rendering.template import resolve_template_kwargs
from tests.exactness import assert_exact, rendered_ids, spans
from tests.tiny_tokenizers import (
    CHATML,
    GLM,
    GLM_TOKENS,
    QWEN3,
    THINK_TOKENS,
    TOOL_TOKENS,
    llama3_tokenizer,
    tiny_tokenizer,
)

SYSTEM = Message("system", "Be brief.")
USER, ASSISTANT = Message("user", "Where is it?"), Message("assistant", "In the city centre.\n")
USER_2, ASSISTANT_2 = Message("user", "多少钱？"), Message("assistant", "不需要，是免费开放。")
SINGLE = Conversation((USER, ASSISTANT))
MULTI = Conversation((SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2), place="train.jsonl:7")
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
CALL = Message("assistant", "", tool_calls=(ToolCall("search", {"query": "rice", "limit": 2}),))
WITH_TOOL = Conversation((USER, CALL, Message("tool", "three found", name="search"), ASSISTANT))
LONG = 10_000


def glm_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(chat_template=GLM, control_tokens=GLM_TOKENS, plain_tokens=TOOL_TOKENS, eos="<|endoftext|>")


@pytest.fixture(scope="module")
def chatml() -> Renderer:
    return Renderer(tiny_tokenizer())


@pytest.fixture(scope="module")
def glm() -> Renderer:
    return Renderer(glm_tokenizer())


def replies(renderer: Renderer, example: Example) -> list[str]:
    return [renderer.tokenizer.decode(example.input_ids[start:end]) for start, end in spans(example)]


# ---- where targets begin and end


@pytest.mark.parametrize("conversation", [SINGLE, MULTI], ids=["one turn", "two turns"])
@pytest.mark.parametrize(
    "tokenizer",
    [
        tiny_tokenizer(),
        tiny_tokenizer(plain_tokens=TOOL_TOKENS, splitting="llama3"),
        llama3_tokenizer("llama3"),
    ],
    ids=["chatml", "qwen-like", "llama3"],
)
def test_one_example_holds_the_template_s_ids_and_targets_are_the_replies(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation
) -> None:
    renderer = Renderer(tokenizer)
    [example] = renderer.render(conversation, max_length=LONG).examples
    assert example.input_ids == rendered_ids(renderer, conversation, len(conversation.messages), prompt=False)
    assert_exact(renderer, conversation, (example,))
    assert render(conversation, tokenizer, max_length=LONG) == [example]


def test_the_stop_token_is_a_target_also_where_it_is_the_pad_token(chatml: Renderer) -> None:
    assert chatml.tokenizer.pad_token_id == chatml.tokenizer.eos_token_id
    [example] = chatml.render(MULTI, max_length=LONG).examples
    assert replies(chatml, example) == ["In the city centre.\n<|im_end|>", "不需要，是免费开放。<|im_end|>"]


def test_in_the_glm_family_the_next_role_stops_a_reply_and_eos_is_appended_after_the_last(glm: Renderer) -> None:
    names = glm.tokenizer.convert_ids_to_tokens(list(glm.stop_ids))
    assert names == ["<|endoftext|>", "<|user|>", "<|observation|>"]
    [example] = glm.render(MULTI, max_length=LONG).examples
    assert replies(glm, example) == ["In the city centre.\n<|user|>", "不需要，是免费开放。<|endoftext|>"]
    assert example.input_ids[:-1] == rendered_ids(glm, MULTI, 5, prompt=False)

    [example] = glm.render(WITH_TOOL, max_length=LONG).examples
    call, answer = replies(glm, example)
    assert call.endswith("</tool_call><|observation|>")
    assert answer.endswith("<|endoftext|>")


def test_a_template_without_control_tokens_gets_eos_after_each_reply() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    renderer = Renderer(tiny_tokenizer(chat_template=template))
    rendered = renderer.render(MULTI, max_length=LONG)
    assert [replies(renderer, example) for example in rendered.examples] == [
        ["In the city centre.\n\n<|im_end|>"],
        ["不需要，是免费开放。\n<|im_end|>"],
    ]
    assert_exact(renderer, MULTI, rendered.examples)


def test_stop_tokens_come_from_the_generation_config_too_and_from_the_template() -> None:
    tokenizer = tiny_tokenizer(eos="<|endoftext|>")  # as base models have it
    names = tokenizer.convert_tokens_to_ids
    assert Renderer(tokenizer).stop_ids == (names("<|endoftext|>"), names("<|im_end|>"))
    assert Renderer(tokenizer, generation_stop_ids=[7]).stop_ids == (names("<|endoftext|>"), 7, names("<|im_end|>"))


def test_a_template_that_changes_earlier_replies_gives_one_example_a_turn() -> None:
    tokenizer = tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS)
    renderer = Renderer(tokenizer)
    thinking = Conversation(
        (
            USER,
            Message("assistant", "There.", reasoning="A map helps."),
            USER_2,
            Message("assistant", "2", reasoning="1+1"),
        )
    )
    rendered = renderer.render(thinking, max_length=LONG)
    assert [replies(renderer, example) for example in rendered.examples] == [
        ["<think>\nA map helps.\n</think>\n\nThere.<|im_end|>"],
        ["<think>\n1+1\n</think>\n\n2<|im_end|>"],
    ]
    assert "A map" not in tokenizer.decode(rendered.examples[1].input_ids)
    assert_exact(renderer, thinking, rendered.examples)

    plain = Renderer(tokenizer, chat_template_kwargs=resolve_template_kwargs(QWEN3, {}, any_reasoning=False))
    rendered = plain.render(MULTI, max_length=LONG)
    assert [replies(plain, example) for example in rendered.examples] == [
        ["In the city centre.\n<|im_end|>"],
        ["不需要，是免费开放。<|im_end|>"],
    ]
    assert_exact(plain, MULTI, rendered.examples)
    assert render(MULTI, tokenizer, max_length=LONG) == list(rendered.examples)


def test_where_a_token_straddles_the_boundary_the_prompt_s_ids_win() -> None:
    # Under GPT-2's pattern "\n\n" alone is one token, and two before a word.
    tokenizer = llama3_tokenizer("gpt2")
    renderer = Renderer(tokenizer)
    whole = rendered_ids(renderer, SINGLE, 2, prompt=False)
    prompt = rendered_ids(renderer, SINGLE, 1, prompt=True)
    assert whole[: len(prompt)] != prompt
    rendered = renderer.render(MULTI, max_length=LONG)
    assert len(rendered.examples) == 2
    assert_exact(renderer, MULTI, rendered.examples)

    # Targets taken from where characters begin, in the whole conversation's ids, are refused.
    start = len(prompt) + 1 if len(whole) > len(prompt) else len(prompt)
    naive = Example(whole, [IGNORE_INDEX] * start + whole[start:])
    with pytest.raises(SetAside, match="the proof failed"):
        renderer.prove(naive, SINGLE, renderer.turns(SINGLE))


def test_the_date_that_a_template_sees_is_fixed() -> None:
    template = "{{ strftime_now('%d %B %Y') }}" + CHATML
    christmas = Renderer(tiny_tokenizer(chat_template=template), chat_template_date=date(2024, 12, 25))
    [example] = christmas.render(SINGLE, max_length=LONG).examples
    assert christmas.tokenizer.decode(example.input_ids).startswith("25 December 2024<|im_start|>")
    assert christmas.fingerprint != Renderer(christmas.tokenizer, chat_template_date=date(2024, 12, 26)).fingerprint


# ---- what is supervised


def test_supervise_and_loss_choose_the_turns(chatml: Renderer) -> None:
    def learned(conversation: Conversation, supervise: Supervise) -> list[str]:
        [example] = chatml.render(conversation, max_length=LONG, supervise=supervise).examples
        return replies(chatml, example)

    first, second = "In the city centre.\n<|im_end|>", "不需要，是免费开放。<|im_end|>"
    told = Message("assistant", ASSISTANT.content, loss=True)
    silent = Message("assistant", ASSISTANT_2.content, loss=False)
    assert learned(MULTI, "last") == [second]
    assert learned(Conversation((USER, told, USER_2, ASSISTANT_2)), "last") == [first, second]
    assert learned(Conversation((USER, ASSISTANT, USER_2, silent)), "all") == [first]
    for conversation in (Conversation((USER,)), Conversation((USER, silent))):
        with pytest.raises(SetAside, match="no assistant message is a target"):
            chatml.render(conversation, max_length=LONG)


def test_what_the_assistant_says_first_is_context_unless_the_row_asks_for_more(chatml: Renderer) -> None:
    greeting, stop = Message("assistant", "Hello!"), chatml.tokenizer.eos_token
    for opening in ((greeting,), (greeting, greeting), (replace(greeting, loss=False),)):
        conversation = Conversation((*opening, USER, ASSISTANT_2))
        rendered = chatml.render(conversation, max_length=LONG)
        [example] = rendered.examples
        assert replies(chatml, example) == [ASSISTANT_2.content + stop]
        assert "Hello!" in chatml.tokenizer.decode(example.input_ids)
        assert rendered.remarks == (Remark(OPENS),) * len(opening)
        [sample] = chatml.render_for_evaluation(conversation, max_prompt_length=None, max_new_tokens=9)
        assert sample.turn == len(opening)
        assert sample.input_ids + sample.output_ids == example.input_ids[: len(sample.input_ids + sample.output_ids)]
    opening_itself = Renderer(llama3_tokenizer("gpt2"))  # its prompt leads to a first message as to any
    rendered = opening_itself.render(Conversation((greeting, USER, ASSISTANT_2)), max_length=LONG)
    assert (rendered.turns, rendered.remarks) == (2, ())
    for conversation, reason in (
        (Conversation((replace(greeting, loss=True), USER, ASSISTANT_2)), "comes first"),
        (Conversation((greeting,)), "comes first"),
        (Conversation((greeting, USER)), "no assistant message is a target"),
    ):
        with pytest.raises(SetAside, match=reason):
            chatml.render(conversation, max_length=LONG)


def test_a_speaker_s_name_that_the_template_does_not_show_is_told(chatml: Renderer) -> None:
    named = Conversation((replace(USER, name="Ana"), replace(ASSISTANT, name="Bo")))
    assert chatml.render(named, max_length=LONG).remarks == (Remark(NAMELESS, "Ana"), Remark(NAMELESS, "Bo"))
    shown = chatml.chat_template.replace("message['content']", "(message['name'] or '') + message['content']")
    asked = Conversation((named.messages[0], ASSISTANT))
    assert chatml.under(shown).render(asked, max_length=LONG).remarks == ()


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (WITH_TOOL, "the chat template drops tool calls"),
        (Conversation((USER, ASSISTANT), (TOOL,)), "the chat template drops the tools on offer"),
        (Conversation((USER, Message("assistant", "2", reasoning="1 + 1"))), "the chat template drops reasoning"),
        # The value that is dropped happens to stand elsewhere in the reply.
        (Conversation((USER, Message("assistant", "2 is it", reasoning="2"))), "the chat template drops reasoning"),
        (Conversation((Message("user", "search"), ASSISTANT), (TOOL,)), "the chat template drops the tools on offer"),
    ],
)
def test_what_the_template_drops_is_found_out(conversation: Conversation, reason: str) -> None:
    chatml = Renderer(tiny_tokenizer(), reasoning="field")
    for attempt in (chatml.render, chatml.render_for_evaluation):
        limits: dict[str, Any] = {"max_prompt_length": LONG, "max_new_tokens": 9}
        if attempt == chatml.render:
            limits = {"max_length": LONG}
        with pytest.raises(SetAside) as refused:
            attempt(conversation, **limits)
        assert refused.value.reason == reason


def test_a_dropped_tool_answer_is_found_out() -> None:
    template = CHATML.replace(
        "{{ '<|im_start|>' + message", "{% if message['role'] != 'tool' %}{{ '<|im_start|>' + message", 1
    )
    template = template.replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    conversation = Conversation((USER, ASSISTANT, Message("tool", "three found"), ASSISTANT_2))
    with pytest.raises(SetAside, match="drops a tool message"):
        Renderer(tiny_tokenizer(chat_template=template)).render(conversation, max_length=LONG)


def test_a_reply_that_does_not_continue_its_prompt_is_refused_with_what_was_tried() -> None:
    opens_thought = QWEN3.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\nHm' }}")
    renderer = Renderer(tiny_tokenizer(chat_template=opens_thought, plain_tokens=THINK_TOKENS))
    with pytest.raises(SetAside, match="does not continue its generation prompt") as refused:
        renderer.render(SINGLE, max_length=LONG)
    assert "enable_thinking" in refused.value.detail
    assert "enable_thinking" not in refused.value.reason


# ---- the renderer itself


def test_enable_thinking_is_false_where_no_row_reasons_and_the_template_knows_it() -> None:
    assert resolve_template_kwargs(QWEN3, {}, any_reasoning=False) == {"enable_thinking": False}
    assert resolve_template_kwargs(QWEN3, {}, any_reasoning=True) == {}
    assert resolve_template_kwargs(QWEN3, {"enable_thinking": True}, any_reasoning=False) == {"enable_thinking": True}
    assert resolve_template_kwargs(CHATML, {"style": "x"}, any_reasoning=False) == {"style": "x"}


def test_without_a_template_the_error_names_the_setting() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, chat_template=CHATML).chat_template == CHATML
    with pytest.raises(ModelError, match=r"does not compile in line 2: .*set model\.chat_template"):
        Renderer(tokenizer, chat_template="{# a comment #}\n{% for %}")


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(SetAside, match="raises an error"):
        Renderer(tiny_tokenizer(chat_template="{{ messages.__class__.__mro__ }}" + CHATML)).render(
            SINGLE, max_length=LONG
        )


def test_the_fingerprint_tells_what_would_change_ids() -> None:
    tokenizer, day = tiny_tokenizer(), date(2025, 1, 1)
    prints = {
        Renderer(tokenizer, chat_template_date=day).fingerprint,
        Renderer(tiny_tokenizer(), chat_template_date=day).fingerprint,
    }
    assert len(prints) == 1
    others = [
        Renderer(tiny_tokenizer(plain_tokens=TOOL_TOKENS), chat_template_date=day),
        Renderer(tokenizer, chat_template=QWEN3, chat_template_date=day),
        Renderer(tokenizer, chat_template_kwargs={"x": 1}, chat_template_date=day),
        Renderer(tokenizer, generation_stop_ids=[5], chat_template_date=day),
    ]
    assert len(prints.union(renderer.fingerprint for renderer in others)) == 5


def test_a_renderer_travels_to_other_processes(chatml: Renderer) -> None:
    expected = chatml.render(MULTI, max_length=LONG)
    travelled = pickle.loads(pickle.dumps(chatml))
    assert travelled.render(MULTI, max_length=LONG) == expected
    assert travelled.fingerprint == chatml.fingerprint
    assert chatml.proof_seconds > 0
