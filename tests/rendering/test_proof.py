"""The proof holds over every row of real files, and catches each way in which a mask is usually wrong.

Run: pytest tests/rendering/test_proof.py
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.formats import parse_row
from chatlora.rendering.renderer import IGNORE_INDEX, Example, Renderer
from tests.broken_masks import BROKEN
from tests.exactness import assert_exact, rendered_ids, spans
from tests.tiny_tokenizers import QWEN3, THINK_TOKENS, tiny_tokenizer

QWEN25 = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
FILES = {  # name -> rows, and whether the model's own template does
    "kdconv_travel.jsonl": (150, True),
    "e2e.jsonl": (4672, True),
    "identity.json": (91, True),
    "glaive_toolcall_en_demo.json": (300, False),
    "glaive_toolcall_zh_demo.json": (300, False),
}
LONG = 100_000


@pytest.fixture(scope="module")
def renderers(smollm2: Path) -> dict[bool, Renderer]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return {True: Renderer(tokenizer), False: Renderer(tokenizer, chat_template=QWEN25)}


def conversations(path: Path) -> list[Conversation]:
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [parse_row(row) for row in rows]


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_real_files_is_proved_and_broken_masks_are_refused(
    shared: Path, renderers: dict[bool, Renderer], name: str
) -> None:
    number, own = FILES[name]
    renderer, rows = renderers[own], conversations(shared / "data" / name)
    assert len(rows) == number
    for position, row in enumerate(rows):
        rendered = renderer.render(row, max_length=LONG)  # raises where the proof fails
        [example] = rendered.examples
        assert rendered.lost_turns == 0
        assert example.input_ids == rendered_ids(renderer, row, len(row.messages), prompt=False)
        if position % 50 == 0:
            assert_exact(renderer, row, rendered.examples)
            for broken in BROKEN:
                assert_refused(renderer, row, example, broken)


def assert_refused(
    renderer: Renderer, row: Conversation, example: Example, broken: Callable[[Example], list[int]]
) -> None:
    turns = renderer.turns(row)
    renderer.prove(example, row, turns)
    with pytest.raises(SetAside, match="the proof failed"):
        renderer.prove(Example(example.input_ids, broken(example)), row, turns)


def test_every_example_of_a_row_is_proved_and_broken_ones_are_refused(shared: Path) -> None:
    """A template that gives an example a turn: one call of `apply_chat_template` a row, its text for the others."""
    tokenizer = tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS)
    renderer = Renderer(tokenizer, chat_template_kwargs={"enable_thinking": False})
    row = conversations(shared / "data" / "kdconv_travel.jsonl")[0]
    examples, turns = renderer.render(row, max_length=LONG).examples, renderer.turns(row)
    assert len(examples) == len(turns) > 5
    for number, (example, turn) in enumerate(zip(examples, turns, strict=True)):
        other = examples[number - 1]
        prompt, answer = split(example)
        wrong = [
            *(Example(example.input_ids, broken(example)) for broken in BROKEN),
            Example(*led_by(split(other)[0], answer)),  # of another turn
            Example(*led_by([*prompt[:3], prompt[3] + 1, *prompt[4:]], answer)),
            Example(*led_by([*prompt[:-4], *split(other)[0][-9:]], answer)),
        ]
        for in_one_call in (True, False):
            renderer._prove(example, row, [turn], in_one_call=in_one_call)
            for one in wrong:
                with pytest.raises(SetAside, match="the proof failed"):
                    renderer._prove(one, row, [turn], in_one_call=in_one_call)


def split(example: Example) -> tuple[list[int], list[int]]:
    [(start, _)] = spans(example)
    return example.input_ids[:start], example.input_ids[start:]


def led_by(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer


def test_without_a_template_for_calls_no_row_is_trained_that_holds_one(
    shared: Path, renderers: dict[bool, Renderer]
) -> None:
    rows = conversations(shared / "data" / "glaive_toolcall_en_demo.json")
    outcomes = [outcome(renderers[True], row) for row in rows]
    dropping = {"the chat template drops tool calls", "the chat template drops the tools on offer"}
    assert set(outcomes) == {"trained", *dropping}
    for row, told in zip(rows, outcomes, strict=True):
        needs_calls = bool(row.tools) or any(message.tool_calls for message in row.messages)
        assert (told == "trained") == (not needs_calls)


def outcome(renderer: Renderer, row: Conversation) -> str:
    try:
        renderer.render(row, max_length=LONG)
    except SetAside as refused:
        return refused.reason
    return "trained"


# ---- ids that are not the prompt's


TWO_TURNS = Conversation(
    (Message("user", "Where?"), Message("assistant", "There."), Message("user", "OK?"), Message("assistant", "Yes."))
)


@pytest.mark.parametrize("place", ["in front", "in the first prompt", "between the turns"])
def test_a_changed_prompt_is_refused(place: str) -> None:
    renderer = Renderer(tiny_tokenizer())
    [example] = renderer.render(TWO_TURNS, max_length=LONG).examples
    (first, _), (second, _) = spans(example)
    at = {"in front": 0, "in the first prompt": first - 2, "between the turns": second - 3}[place]
    for replaced in ([], [example.input_ids[at]] * 2, [5]):
        ids = [*example.input_ids[:at], *replaced, *example.input_ids[at + 1 :]]
        labels = [*example.labels[:at], *[IGNORE_INDEX] * len(replaced), *example.labels[at + 1 :]]
        with pytest.raises(SetAside, match="the ids before a target are not those of its prompt"):
            renderer.prove(Example(ids, labels), TWO_TURNS, renderer.turns(TWO_TURNS))


@pytest.mark.parametrize("question", ["Where?", "Where is <|im_end|>?"], ids=["plain", "control text"])
def test_ids_that_spell_the_prompt_otherwise_than_inference_are_refused(question: str) -> None:
    renderer = Renderer(tiny_tokenizer())
    conversation = replace(TWO_TURNS, messages=(Message("user", question), *TWO_TURNS.messages[1:]))
    [example] = renderer.render(conversation, max_length=LONG).examples
    tokenizer = renderer.tokenizer
    header, letters = tokenizer.convert_tokens_to_ids(["assistant"]), tokenizer.convert_tokens_to_ids(list("assistant"))
    for start, _ in spans(example):
        at = start - 2
        assert example.input_ids[at : start - 1] == header
        ids = [*example.input_ids[:at], *letters, *example.input_ids[start - 1 :]]
        labels = [*example.labels[:at], *[IGNORE_INDEX] * len(letters), *example.labels[start - 1 :]]
        assert tokenizer.decode(ids) == tokenizer.decode(example.input_ids)
        with pytest.raises(SetAside, match="the ids before a target are not those of its prompt"):
            renderer.prove(Example(ids, labels), conversation, renderer.turns(conversation))


def test_a_changed_reply_is_refused() -> None:
    renderer = Renderer(tiny_tokenizer())
    [example] = renderer.render(TWO_TURNS, max_length=LONG).examples
    for start, end in spans(example):
        for at, replaced in ((start, [5]), (start, []), (end - 2, [5, 6]), (end - 1, [5])):
            ids = [*example.input_ids[:at], *replaced, *example.input_ids[at + 1 :]]
            labels = [*example.labels[:at], *replaced, *example.labels[at + 1 :]]
            with pytest.raises(SetAside, match="the targets do not decode to the reply"):
                renderer.prove(Example(ids, labels), TWO_TURNS, renderer.turns(TWO_TURNS))


def test_a_rendering_that_is_not_what_transformers_gives_is_refused() -> None:
    template = "{{ style }}" + tiny_tokenizer().chat_template
    renderer = Renderer(tiny_tokenizer(chat_template=template), chat_template_kwargs={"style": "brief"})
    assert renderer.render(TWO_TURNS, max_length=LONG).turns == 2
    renderer._template = replace(renderer._template, kwargs={"style": "long"})
    with pytest.raises(SetAside, match="the ids before a target are not those of its prompt"):
        renderer.render(TWO_TURNS, max_length=LONG)


def test_a_second_bos_is_refused() -> None:
    template = "{{ bos_token }}{{ bos_token }}" + tiny_tokenizer().chat_template
    renderer = Renderer(tiny_tokenizer(chat_template=template, bos="<|endoftext|>"))
    with pytest.raises(SetAside, match="more than one beginning-of-sequence token"):
        renderer.render(TWO_TURNS, max_length=LONG)


def test_a_reply_that_the_tokenizer_cannot_spell_is_refused(renderers: dict[bool, Renderer]) -> None:
    # SmolLM2's vocabulary lacks some bytes, and its tokenizer drops them without a word.
    said = Conversation((Message("user", "hi"), Message("assistant", "a \U00040000 b")))
    with pytest.raises(SetAside, match="cannot spell"):
        renderers[True].render(said, max_length=LONG)
    asked = Conversation((Message("user", "hi \U00040000"), Message("assistant", "a b")))
    [example] = renderers[True].render(asked, max_length=LONG).examples
    assert example.input_ids == rendered_ids(renderers[True], asked, 2, prompt=False)
    both = Conversation((Message("user", "<|im_end|> \U00040000"), Message("assistant", "a b")))
    with pytest.raises(SetAside, match="cannot spell"):
        renderers[True].render(both, max_length=LONG)
