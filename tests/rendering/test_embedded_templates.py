"""Templates of the package: what each is for, the ids of its family, and how a tokenizer's own is completed.

What all of them make of every kind of conversation: test_chat_templates.py; of conversations drawn at random:
test_random_conversations.py. Run: pytest tests/rendering/test_embedded_templates.py
"""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chatlora.errors import ModelError, SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering import completion, embedded
from chatlora.rendering.completion import completed, embedded_template, of_its_family
from chatlora.rendering.embedded import FAMILIES, FOLDER, PASSES, behind, embedded_name, family_template, fitting_family
from chatlora.rendering.remedies import lifted_by
from chatlora.rendering.renderer import Renderer
from tests.exactness import rendered_ids
from tests.rendering.test_chat_templates import (
    CONVERSATIONS,
    LONG,
    TEMPLATES,
    WITH_REASONING,
    outcome_under,
    renderer_of,
    tokenizer_of,
)
from tests.tiny_tokenizers import CHATML, control_tokens_in, tiny_tokenizer

OWN = TEMPLATES | {"plain ChatML": CHATML}
# Whose prompts and targets they give, wherever those are exact.
SAME = {"chatml": ["plain ChatML"], "gemma": ["gemma", "gemma3"], "llama3": ["llama3"], "phi3": ["phi3", "phi3_5"]}
DEEPSEEK = ("deepseek_r1_distill", "deepseekv3")


def differing(own: str, template: str) -> list[str]:
    """The kinds of conversation which both are exact for, with other ids. Raises where the second is not."""
    found = []
    for kind, conversation in CONVERSATIONS.items():
        renderer = renderer_of(OWN[own], any_reasoning=kind in WITH_REASONING)
        theirs = outcome_under(renderer, conversation, lifting=False)
        ours = outcome_under(renderer.under(template), conversation, lifting=False)
        assert ours.rendered is not None
        if theirs.rendered is not None and (theirs.rendered, theirs.samples) != (ours.rendered, ours.samples):
            found.append(kind)
    return found


@pytest.mark.parametrize(("name", "own"), [(name, own) for name, owns in SAME.items() for own in owns])
def test_a_family_s_template_gives_the_ids_of_the_family_s_own(name: str, own: str) -> None:
    assert differing(own, family_template(name)) == []
    assert differing(own, "{{ ' ' }}" + family_template(name)) != []


@pytest.mark.parametrize("own", DEEPSEEK)
def test_deepseek_s_prompts_are_those_of_its_own_template(own: str) -> None:
    kinds = {kind: each for kind, each in CONVERSATIONS.items() if not each.tools}
    if own == "deepseekv3":  # the other drops calls; neither shows the tools on offer
        kinds["calls"] = Conversation(CONVERSATIONS["tools"].messages)
    for conversation in kinds.values():
        renderer = renderer_of(TEMPLATES[own], any_reasoning=True)
        samples = renderer.under(family_template("deepseek-r1")).render_for_evaluation(
            conversation, max_prompt_length=None, max_new_tokens=9
        )
        turns = [index for index, each in enumerate(conversation.messages) if each.role == "assistant"]
        assert [sample.input_ids for sample in samples] == [
            rendered_ids(renderer, conversation, index, prompt=True) for index in turns
        ]


def test_deepseek_s_reply_closes_the_thought_that_its_prompt_opens() -> None:
    renderer = renderer_of(family_template("deepseek-r1"), any_reasoning=True)
    found = {}
    for kind in ("text", "reasoning", "tools"):
        samples = renderer.render_for_evaluation(CONVERSATIONS[kind], max_prompt_length=None, max_new_tokens=999)
        found[kind] = [renderer.tokenizer.decode(sample.output_ids) for sample in samples]
    assert found == {
        "text": ["\n</think>\n\nI am fine, thanks.<｜end▁of▁sentence｜>"],
        "reasoning": [
            "They ask how I am.\n</think>\n\nFine.<｜end▁of▁sentence｜>",
            "Two and two.\n</think>\n\n4<｜end▁of▁sentence｜>",
        ],
        "tools": [
            "\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            '{"city": "São Paulo", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
            "It is sunny.<｜end▁of▁sentence｜>",
        ],
    }


OWN_FAMILIES = {
    "deepseek-r1": DEEPSEEK,
    "gemma": ("gemma3",),
    "llama3": ("llama3",),
    "phi3": ("phi3", "phi3_5"),
    "chatml": ("plain ChatML", "qwen3_instruct_2507"),
    "": ("cohere", "gemma", "lfm2", "llama3_1", "qwen2_5", "qwen2_5_vl", "smolvlm"),
}


def test_a_family_is_known_by_its_prompts() -> None:
    for family, names in OWN_FAMILIES.items():
        for name in names:
            assert list(of_its_family(tokenizer_of(OWN[name]))) == ([family] if family else []), name
    other = TEMPLATES["deepseek_r1_distill"].replace("<think>\\n'", "<think>'")
    assert other != TEMPLATES["deepseek_r1_distill"]
    assert list(of_its_family(tokenizer_of(other))) == []


def test_nothing_is_put_in_front_of_a_template_that_needs_nothing() -> None:
    assert completed(tokenizer_of(TEMPLATES["qwen3"])) == TEMPLATES["qwen3"]
    added = {name: [each for each in PASSES if is_in(each, completed(tokenizer_of(TEMPLATES[name])))] for name in NEEDS}
    assert added == NEEDS


NEEDS = {
    "cohere2": ["thoughts", "tools"],
    "deepseek_r1_distill": ["tools", "reply"],
    "gemma": ["thoughts", "tools", "system"],
    "llama3_1": ["thoughts"],
    "nemotron_3_nano": ["empty_thought"],
    "qwen3_5_nothink": ["thinking"],
    "smolvlm": ["thoughts", "tools", "parts"],
}


def is_in(name: str, template: str) -> bool:
    return (FOLDER / "passes" / f"{name}.jinja").read_text("utf-8").strip() in template


# A prompt that opens a thought, and replies that never show one: QwQ and others that were made after DeepSeek-R1.
OPENS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1] %}"
    "{% else %}{% set said = m.content %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}\n{% endif %}\n"
)


def test_a_reply_is_written_behind_the_prompt_where_the_template_cannot() -> None:
    tokenizer = tiny_tokenizer(chat_template=OPENS, plain_tokens=["<think>", "</think>"])
    own = Renderer(tokenizer)
    renderer = own.under(completed(tokenizer))
    for conversation in CONVERSATIONS.values():
        assert outcome_under(own, conversation, lifting=False).rendered is None
        assert outcome_under(renderer, conversation, lifting=False).rendered is not None
    talk = CONVERSATIONS["reasoning"]
    samples = renderer.render_for_evaluation(talk, max_prompt_length=None, max_new_tokens=99)
    assert [sample.input_ids for sample in samples] == [rendered_ids(own, talk, index, prompt=True) for index in (1, 3)]
    assert [tokenizer.decode(sample.output_ids) for sample in samples] == [
        "They ask how I am.\n</think>\n\nFine.<|im_end|>",
        "Two and two.\n</think>\n\n4<|im_end|>",
    ]


def test_no_thought_is_closed_that_the_prompt_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a reply could be proved as well: its prompt decides."""
    never = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n#'")
    assert completed(tiny_tokenizer(chat_template=never)) == never
    monkeypatch.setattr(completion._Own, "opens_thought", lambda own: True)
    assert is_in("reply", completed(tiny_tokenizer(chat_template=never)))


def test_a_pass_that_loses_something_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is proved like any template: one that renders everything but the arguments of calls completes nothing."""
    text = embedded._text
    monkeypatch.setattr(embedded, "_text", lambda file: text(file).replace("~ arguments ~", "~ '{}' ~"))
    template = completed(tokenizer_of(TEMPLATES["llama3"]))
    assert not is_in("tools", template)
    assert is_in("thoughts", template)


def test_what_is_put_in_front_leaves_the_template_as_it_is() -> None:
    """To the letter, a line break at its beginning too."""
    own = "\n" + CHATML
    conversation = CONVERSATIONS["multi-turn"]
    alone = Renderer(tiny_tokenizer(chat_template=own))
    for name in PASSES:
        if name != "parts":
            assert alone.under(behind([name], own)).prompt_ids(conversation) == alone.prompt_ids(conversation)


def test_a_real_tokenizer_s_template_is_completed(smollm2: Path) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(smollm2))
    conversation = CONVERSATIONS["tools"]
    with pytest.raises(SetAside, match="drops tool calls") as refused:
        renderer.render(conversation, max_length=LONG)
    assert lifted_by(renderer, conversation, refused.value, "all") == "embedded:completed"
    completed_one = renderer.under(embedded_template("completed", renderer.tokenizer))
    assert outcome_under(completed_one, conversation, lifting=False).verdict == "1"


def test_a_refusal_that_no_template_lifts_names_none() -> None:
    renderer = renderer_of(TEMPLATES["gemma"], any_reasoning=False)
    messages = CONVERSATIONS["text"].messages
    twice = Conversation((messages[0], *messages))
    with pytest.raises(SetAside, match="must alternate") as refused:
        renderer.render(twice, max_length=LONG)
    assert lifted_by(renderer, twice, refused.value, "all") == ""
    assert lifted_by(renderer, CONVERSATIONS["system"], refused.value, "all") == "embedded:completed"
    other = Renderer(tiny_tokenizer(chat_template="{% for %}"), chat_template=TEMPLATES["gemma"])
    assert lifted_by(other, CONVERSATIONS["system"], refused.value, "all") == ""
    other = Renderer(tiny_tokenizer(chat_template=None), chat_template=TEMPLATES["gemma"])
    assert lifted_by(other, CONVERSATIONS["system"], refused.value, "all") == "embedded:chatml"
    assert lifted_by(renderer, CONVERSATIONS["system"], SetAside("no assistant message is a target"), "all") == ""


def test_an_unknown_name_is_told_the_nearest() -> None:
    assert embedded_name("embedded:llama3") == "llama3"
    assert embedded_name(Path("my.jinja")) is embedded_name(None) is None
    with pytest.raises(ModelError, match=r"no embedded template 'lama3'; did you mean 'llama3'\?"):
        embedded_name("embedded:lama3")
    with pytest.raises(ModelError, match="there are chatml, deepseek-r1, gemma, llama3, phi3, zephyr, completed"):
        embedded_name("embedded:?")


def test_a_tokenizer_without_a_template_is_told_the_family_of_its_control_tokens() -> None:
    for name, family in FAMILIES.items():
        tokens = [*family.tokens, "</s>"]
        assert set(family.tokens) <= set(control_tokens_in(family_template(name))) | set(tokens)
        bare = tiny_tokenizer(chat_template=None, control_tokens=tokens, eos="</s>")
        assert fitting_family(bare) == f"embedded:{name}"
        with pytest.raises(ModelError, match=f"set `model.chat_template` to embedded:{name}, or to a Jinja file"):
            completed(bare)
        for kind, conversation in CONVERSATIONS.items():
            outcome = outcome_under(Renderer(bare, chat_template=family_template(name)), conversation, lifting=False)
            assert outcome.rendered is not None, kind


def test_all_templates_are_in_the_package() -> None:
    assert {file.stem for file in FOLDER.glob("*.jinja")} == set(FAMILIES)
    assert {file.stem for file in (FOLDER / "passes").glob("*.jinja")} == {*PASSES, "reply_end"}
