"""Tool use that a row tells in text is rendered as the template has it, or left as it is, or set aside with the reason.

Run: pytest tests/rendering/test_tool_use_in_text.py
"""

import json
from dataclasses import replace

import pytest

from chatlora.config import ControlWords
from chatlora.errors import SetAside
from chatlora.reading import hermes
from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.hermes import CALLS_READ, RESULTS_READ, TEXT_AFTER, TOOLS_READ
from chatlora.rendering.remedies import lifted_by
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.taken import LEFT, OWN_WORDS
from tests.exactness import assert_exact, control_ids, rendered_ids
from tests.reading.test_hermes import CALL, HERMES_2, LOOK, QWEN, TOOL, talk
from tests.rendering.test_chat_templates import LONG, TEMPLATES
from tests.tiny_tokenizers import CHATML, TOOL_TOKENS, control_tokens_in, tiny_tokenizer

WRAPPED = "<tool_response>\n59 degrees\n</tool_response>"
STRUCTURED = Conversation(
    (
        Message("user", "Where?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "59 degrees"),
        Message("assistant", "Far north."),
    ),
    (TOOL,),
)
READ = {CALLS_READ: 1, RESULTS_READ: 1, TOOLS_READ: 1}


def renderer(name: str, control_text: ControlWords = "text", *, tokens: tuple[str, ...] = TOOL_TOKENS) -> Renderer:
    template = CHATML if name == "chatml" else TEMPLATES[name]
    control = [token for token in control_tokens_in(template) if not token.startswith(("<tool", "</tool"))]
    control = list(dict.fromkeys([*control, "<|endoftext|>", "<|im_end|>", "<|im_start|>"]))
    tokenizer = tiny_tokenizer(control_tokens=control, plain_tokens=tokens, eos="<|im_end|>")
    return Renderer(tokenizer, chat_template=template, control_text=control_text)


@pytest.mark.parametrize("control_text", ["text", "token"])
@pytest.mark.parametrize("words", [HERMES_2, QWEN], ids=["Hermes", "Qwen"])
@pytest.mark.parametrize("name", ["glm4moe", "llama3_1", "qwen2_5", "qwen3"])
def test_it_is_rendered_as_the_template_has_calls(name: str, words: str, control_text: ControlWords) -> None:
    told, written = talk(LOOK, WRAPPED, "user", words % json.dumps([TOOL])), renderer(name, control_text)
    found, wanted = (written.render(row, max_length=LONG) for row in (told, STRUCTURED))
    assert found.examples == wanted.examples
    assert {kind: turns for kind, turns in found.altered.items() if kind not in wanted.altered} == READ
    assert_exact(written, STRUCTURED, found.examples)
    samples, theirs = (
        written.render_for_evaluation(row, max_prompt_length=None, max_new_tokens=9) for row in (told, STRUCTURED)
    )
    assert samples.examples == theirs.examples
    assert len(samples) == 2


def test_qwen_s_own_text_gives_the_ids_that_a_server_makes_of_it() -> None:
    """System message, calls and results, word by word as the template writes them."""
    written = renderer("qwen2_5")
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n" + QWEN % json.dumps(TOOL)
    told = talk(LOOK, WRAPPED, "user", system)
    [example] = written.render(told, max_length=LONG).examples
    assert example.input_ids == rendered_ids(written, told, 5, prompt=False)
    assert set(control_ids(written, example.input_ids)) >= set(written.tokenizer.convert_tokens_to_ids(TOOL_TOKENS))


def test_calls_that_would_be_moved_are_set_aside_or_read_as_servers_do() -> None:
    told = talk(LOOK + " Done.")
    with pytest.raises(SetAside) as refused:
        renderer("qwen2_5").render(told, max_length=LONG)
    assert refused.value.reason == TEXT_AFTER
    served = renderer("qwen2_5", "token")
    rendered = served.render(told, max_length=LONG)
    assert rendered.examples[0].input_ids == rendered_ids(served, told, 4, prompt=False)
    assert rendered.altered == {LEFT: 1}


def test_what_no_token_spells_is_text_as_well_where_it_cannot_be_read() -> None:
    """Then text is what a server makes of it too."""
    plain = renderer("qwen2_5", tokens=())
    for told in (talk(LOOK + " Done."), talk("<tool_call>\n{broken}\n</tool_call>")):
        rendered = plain.render(told, max_length=LONG)
        assert rendered.examples[0].input_ids == rendered_ids(plain, told, 4, prompt=False)
        assert rendered.altered == {LEFT: 1}


def test_a_template_without_tools() -> None:
    told = talk(LOOK, WRAPPED, "user")
    with pytest.raises(SetAside, match="the chat template drops tool calls") as refused:
        renderer("chatml").render(told, max_length=LONG)
    assert lifted_by(renderer("chatml"), told, refused.value, "all") == "embedded:completed"
    for written in (renderer("chatml", "token"), renderer("chatml", tokens=())):
        rendered = written.render(told, max_length=LONG)
        assert rendered.examples[0].input_ids == rendered_ids(written, told, 4, prompt=False)
        assert rendered.altered == {LEFT: 2}


def test_own_words_stay_where_the_template_writes_calls_as_they_say() -> None:
    told = talk(LOOK, system=f"Your tools: <tools>{json.dumps([TOOL])}</tools>")
    for name in ("qwen2_5", "qwen3"):
        example = renderer(name).render(told, max_length=LONG).examples[0]
        assert "Your tools: <tools>" in renderer(name).tokenizer.decode(example.input_ids)
    for name in ("llama3_1", "glm4moe"):
        with pytest.raises(SetAside) as refused:
            renderer(name).render(told, max_length=LONG)
        assert refused.value.reason == OWN_WORDS


def test_reading_that_loses_a_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, told = hermes._calls, talk(f"{LOOK}\n{LOOK}", WRAPPED, "user")
    twice = STRUCTURED.with_messages([STRUCTURED.messages[0], replace(STRUCTURED.messages[1], tool_calls=(CALL, CALL)),
                                      *STRUCTURED.messages[2:]])  # fmt: skip
    written = renderer("qwen2_5")
    wanted = written.render(replace(twice, tools=()), max_length=LONG).examples
    assert written.render(told, max_length=LONG).examples == wanted
    monkeypatch.setattr(hermes, "_calls", lambda body: [replace(call, arguments={}) for call in right(body)])
    assert written.render(told, max_length=LONG).examples != wanted


def test_a_word_about_calls_stays_text() -> None:
    told = Conversation((Message("user", "How?"), Message("assistant", "Use <tool_call> and </tool_call>.")))
    rendered = renderer("qwen2_5").render(told, max_length=LONG)
    assert not any(kind.startswith(hermes.HERMES) for kind in rendered.altered)
