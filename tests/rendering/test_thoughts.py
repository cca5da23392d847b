"""Where thoughts go: their field, the reply's text or nowhere; and that the ids are those of inference.

Run: pytest tests/rendering/test_thoughts.py
"""

from dataclasses import replace
from typing import Any

import pytest

from chatlora.config import Reasoning
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message, reply
from chatlora.reading.formats import parse_row
from chatlora.rendering import taken
from chatlora.rendering.completion import completed
from chatlora.rendering.renderer import Rendered, Renderer
from chatlora.rendering.template_edits import TAGS
from chatlora.rendering.thoughts import KEPT, LEFT_OUT, PUT
from tests.exactness import rendered_ids, spans
from tests.rendering.test_chat_templates import CONVERSATIONS, LONG, TEMPLATES, renderer_of, tokenizer_of
from tests.tiny_tokenizers import CHATML, THINK_TOKENS, tiny_tokenizer

IN_TEXT = "cohere cohere2 gemma gemma3 gemma4 lfm2 lfm2_v2 llama3 llama3_1 phi3 qwen2_5 qwen2_5_vl qwen3_instruct_2507"
IN_FIELD = "deepseek_r1_distill gemma4_v5 glm4moe gptoss nemotron_3_nano qwen3 qwen3_5_nothink qwen3_6 smolvlm"
HEADS = (
    "<think>\nTwo and two.\n</think>\n\n",
    "<think>Two</think>",
    "\n<think>\n\n</think>\n",
    "<think> x </think>\n\n\n",
)


def talk(*texts: str, **reasoning: str) -> Conversation:
    """Replies as the reader takes them from a row."""
    turns = [
        [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": text, **reasoning}] for text in texts
    ]
    return parse_row({"messages": [message for turn in turns for message in turn]})


def under(name: str, wanted: Reasoning, **kwargs: Any) -> Renderer:
    return Renderer(tokenizer_of(TEMPLATES[name]), reasoning=wanted, chat_template_kwargs=kwargs)


def replies(renderer: Renderer, rendered: Rendered) -> list[str]:
    """The targets of each turn as text, without the token that stops them."""
    found = []
    for example in rendered.examples:
        found += [renderer.tokenizer.decode(example.input_ids[start : end - 1]) for start, end in spans(example)]
    return found


def test_auto_is_the_text_where_the_template_has_no_place_of_its_own() -> None:
    found = {name: renderer_of(TEMPLATES[name], any_reasoning=True).taking.thoughts for name in TEMPLATES}
    assert {name: found[name] for name in IN_TEXT.split()} == dict.fromkeys(IN_TEXT.split(), "text")
    assert {name: found[name] for name in IN_FIELD.split()} == dict.fromkeys(IN_FIELD.split(), "field")


@pytest.mark.parametrize("name", ["lfm2", "phi3", "qwen2_5", "qwen3_instruct_2507"])
@pytest.mark.parametrize("head", HEADS)
def test_a_thought_in_the_text_stays_letter_by_letter(name: str, head: str) -> None:
    renderer = under(name, "auto")
    rendered = renderer.render(talk(head + "Four.", head + "Still four."), max_length=LONG)
    assert replies(renderer, rendered) == [head + "Four.", head + "Still four."]
    assert rendered.altered == {KEPT: 2}


def test_a_template_that_trims_the_text_trims_what_stands_around_it() -> None:
    renderer = under("llama3", "auto")
    for head in HEADS:
        rendered = renderer.render(talk(head + "Four."), max_length=LONG)
        assert replies(renderer, rendered) == [(head + "Four.").strip()]


def test_a_thought_of_a_field_is_put_into_the_text() -> None:
    renderer = under("qwen2_5", "auto")
    rendered = renderer.render(talk("Four.", reasoning_content="Two and two."), max_length=LONG)
    assert replies(renderer, rendered) == ["<think>\nTwo and two.\n</think>\n\nFour."]
    assert rendered.altered == {PUT: 1}
    assert renderer.render(talk("Four."), max_length=LONG).altered == {}


def test_each_setting_is_obeyed() -> None:
    row = talk("<think>\nTwo and two.\n</think>\n\nFour.")
    with pytest.raises(SetAside, match="the chat template drops reasoning"):
        under("qwen2_5", "field").render(row, max_length=LONG)
    for name in ("qwen2_5", "qwen3"):
        renderer = under(name, "drop")
        rendered = renderer.render(row, max_length=LONG)
        assert "Two and two" not in renderer.tokenizer.decode(rendered.examples[0].input_ids)
        assert rendered.altered[LEFT_OUT] == 1
        samples = renderer.render_for_evaluation(row, max_prompt_length=None, max_new_tokens=99)
        assert samples.altered[LEFT_OUT] == 1
    text, field = (under("qwen3", wanted).render(row, max_length=LONG) for wanted in ("text", "field"))
    assert text.examples == field.examples  # the template reads it out of the text, as it does for a server
    assert text.altered == {KEPT: 1}
    assert field.altered == {}


@pytest.mark.parametrize("name", ["glm4moe", "qwen3", "qwen3_6"])
def test_a_template_that_takes_thoughts_out_of_the_text_does_so(name: str) -> None:
    """As for a server; where it writes other space around them, that is counted."""
    text, field = under(name, "text"), under(name, "field")
    for number, head in enumerate(HEADS[:2]):
        row = talk(head + "Four.", head + "Still four.")
        told, given = (renderer.render(row, max_length=LONG) for renderer in (text, field))
        assert told.examples == given.examples
        assert told.altered[KEPT] == 2
        assert told.altered[TAGS] >= number


def test_what_a_setting_changes_changes_what_is_kept_in_the_cache() -> None:
    prints = {wanted: under("qwen2_5", wanted).fingerprint for wanted in ("auto", "field", "text", "drop")}
    assert prints["auto"] == prints["text"]
    assert len(set(prints.values())) == 3


# ---- the ids


@pytest.fixture(params=["tokens", "special tokens", "words"])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    """`<think>` as Qwen3 has it, as a special token, and as Qwen2.5 and Llama have it."""
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    kinds: dict[str, dict[str, Any]] = {
        "tokens": {"plain_tokens": THINK_TOKENS},
        "special tokens": {"control_tokens": (*control, *THINK_TOKENS)},
        "words": {},
    }
    return Renderer(tiny_tokenizer(chat_template=CHATML, **kinds[request.param]), reasoning="text")


def as_text(row: Conversation) -> Conversation:
    """The row as a client sends it: all of each reply in its text."""
    return row.with_messages(
        replace(message, content=(message.thought_text or "") + message.content, reasoning=None)
        for message in row.messages
    )


def assert_inference(renderer: Renderer, row: Conversation) -> None:
    """The whole, the prompts and, of plain text, all ids are transformers'."""
    [example] = renderer.render(row, max_length=LONG).examples
    sent = as_text(row)
    assert example.input_ids == rendered_ids(renderer, sent, len(row.messages), prompt=False)
    samples = renderer.render_for_evaluation(row, max_prompt_length=None, max_new_tokens=LONG)
    for sample in samples:
        index = 2 * sample.turn + 1
        assert sample.input_ids == rendered_ids(renderer, sent, index, prompt=True)
        whole = rendered_ids(renderer, sent, index + 1, prompt=False)
        ids = sample.input_ids + sample.output_ids
        assert whole[: len(ids)] == ids


# A reply that begins with a line break merges with the prompt's last one, and then the prompt's ids count.
@pytest.mark.parametrize("head", [head for head in HEADS if head.startswith("<")])
def test_the_ids_are_those_of_the_text_at_inference(renderer: Renderer, head: str) -> None:
    assert_inference(renderer, talk(head + "Four.", head + "Still four."))


def test_a_tag_that_is_masked_like_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Renderer(tiny_tokenizer(chat_template=CHATML, plain_tokens=THINK_TOKENS), reasoning="text")
    assert_inference(tokens, talk(HEADS[0] + "Four."))
    monkeypatch.setattr(taken, "masked_behind_tags", lambda content, head, mask, tokens: mask(content))
    with pytest.raises(AssertionError):
        assert_inference(tokens, talk(HEADS[0] + "Four."))


def test_only_the_thought_s_own_tags_are_tokens() -> None:
    """What a thought or an answer says of tags, or of other control tokens, is text like any other."""
    renderer = Renderer(tiny_tokenizer(chat_template=CHATML, plain_tokens=THINK_TOKENS), reasoning="text")
    said = "<think>\nHe asks of <think> and <|im_end|>.\n</think>\n\nIt ends with </think>, or <|im_end|>."
    [example] = renderer.render(talk(said), max_length=LONG).examples
    tags = renderer.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [id for id in example.input_ids if id in tags] == tags
    given = talk("Four.", reasoning_content="a </think> b <think>")
    [example] = renderer.render(given, max_length=LONG).examples
    assert [id for id in example.input_ids if id in tags] == tags
    assert "<think>\na </think> b <think>\n</think>\n\nFour." in renderer.tokenizer.decode(example.input_ids)


# ---- beside the package's templates


@pytest.mark.parametrize("name", IN_TEXT.split())
def test_a_template_completed_tells_thoughts_as_the_text_does(name: str) -> None:
    """The same ids with and without additions, however the thought stands there."""
    renderer = under(name, "auto")
    other = renderer.under(completed(renderer.tokenizer))
    assert other.chat_template != renderer.chat_template
    assert other.taking.thoughts == "text"
    given = talk("Four.", "Still four.", reasoning_content="Two and two.")
    for row in (given, CONVERSATIONS["reasoning"], *(talk(head + "Four.", "Four.") for head in HEADS)):
        assert other.render(row, max_length=LONG) == renderer.render(row, max_length=LONG)
    field = Renderer(renderer.tokenizer, chat_template=other.chat_template, reasoning="field")
    assert field.render(given, max_length=LONG).examples == renderer.render(given, max_length=LONG).examples


def test_a_call_keeps_the_thought_in_front_of_it() -> None:
    row = CONVERSATIONS["tools"]
    call = replace(row.messages[1], reasoning="Look it up.")
    thoughtful = row.with_messages([row.messages[0], call, *row.messages[2:]])
    renderer = under("qwen2_5", "auto")
    said = replies(renderer, renderer.render(thoughtful, max_length=LONG))[0]
    assert said.strip().startswith("<think>\nLook it up.\n</think>")
    assert '"name": "get_weather"' in said


def test_a_reply_gives_its_text_back() -> None:
    assert reply("<think>a</think>b") == Message("assistant", "b", "a", thought_text="<think>a</think>")
