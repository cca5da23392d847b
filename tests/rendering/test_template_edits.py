"""What a template changes in a reply without losing any of it is counted by kind, and told.

Run: pytest tests/rendering/test_template_edits.py
"""

import json
from pathlib import Path

import pytest

from chatlora.config import DataConfig, Source
from chatlora.data.dataset import prepare_evaluation_data, prepare_training_data, summary_lines
from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.reading.sources import read_conversations
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.template_edits import ALIKE, LONGEST, template_edits
from tests.rendering.test_chat_templates import TEMPLATES, TOOL, renderer_of
from tests.tiny_tokenizers import QWEN3, THINK_TOKENS, llama3_tokenizer, tiny_tokenizer

TRIMMED = "space around the reply's text is trimmed"
SPELLINGS = ("<|end|>", "<|end", "<think>", "</think>")
LOOK = {"type": "function", "function": {"name": "look", "arguments": {}}}


@pytest.mark.parametrize(
    ("reply", "message", "kinds"),
    [
        ("Fine.<|end|>", {"content": "Fine."}, ()),
        ("Fine.", {"content": "Fine."}, ()),
        (" Fine. <|end|>", {"content": " Fine. "}, ()),
        ("Fine.<|end|>", {"content": "Fine.\n"}, (TRIMMED,)),
        (" Fine.<|end|>", {"content": " Fine.\n"}, (TRIMMED,)),  # on one side only
        ("<|end|>", {"content": ""}, ()),
        ("<|end|>", {"content": " \n"}, ()),
        (
            "<think>\n\n</think>\n\na<|end|>",
            {"content": "a"},
            (r"'<think>\n\n</think>\n\n' is put before the reply's text",),
        ),
        ("end of it\nend<|end|>", {"content": "end"}, (r"'end of it\n' is put before the reply's text",)),
        ("Fine.\n<|end|>", {"content": "Fine."}, (r"'\n' is put after the reply's text",)),
        ("<think>\nhm\n</think>\nFine.<|end|>", {"content": "Fine.", "reasoning_content": "hm"}, ()),
        (
            "<think>hm</think>a<|end|>",
            {"content": "a", "reasoning_content": "hm\n"},
            ("space around reasoning is trimmed",),
        ),
        ("So:\n{}<|end|>", {"content": "So:", "tool_calls": [LOOK]}, ()),
        ("x" * 99 + "yes<|end|>", {"content": "yes"}, (f"{'x' * LONGEST + '...'!r} is put before the reply's text",)),
    ],
)
def test_kinds(reply: str, message: dict[str, object], kinds: tuple[str, ...]) -> None:
    assert template_edits(reply, {"role": "assistant", **message}, SPELLINGS) == kinds


def rows(path: Path, answers: list[str]) -> Source:
    """One row for each answer, of two turns that both give it."""
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] * 2 for answer in answers]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    return Source(path=str(path))


def test_the_ledger_counts_turns_by_kind_and_the_summary_tells_them(tmp_path: Path) -> None:
    llama3 = Renderer(llama3_tokenizer("llama3"))
    source = rows(tmp_path / "t.jsonl", ["a", "b\n", " c"])
    config = DataConfig(train=(source,), max_length=256, validation=0.0)
    data = prepare_training_data(config, 0, lambda _: llama3, cache=tmp_path, say=print)
    (account,) = data.ledger["sources"]
    assert account["altered"] == {TRIMMED: 4}
    assert any(f"in 4 turns {TRIMMED} by the chat template" in line for line in summary_lines(data.ledger))
    again = prepare_training_data(config, 0, lambda _: llama3, cache=tmp_path, say=print)
    assert again.ledger == data.ledger  # out of the cache
    _, ledger = prepare_evaluation_data([source], llama3, max_prompt_length=None, max_new_tokens=99)
    assert ledger["sources"][0]["altered"] == {TRIMMED: 4}


def test_turns_that_are_cut_off_are_not_counted(tmp_path: Path) -> None:
    thinking = Renderer(tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS))
    kind = r"'<think>\n\n</think>\n\n' is put before the reply's text"
    source = rows(tmp_path / "t.jsonl", ["a", "b"])
    (conversation, _) = read_conversations(source)
    shorter, longer = (len(example.input_ids) for example in thinking.render(conversation, max_length=256).examples)
    for max_length, turns in ((longer, 4), (shorter, 2)):
        config = DataConfig(train=(source,), max_length=max_length, validation=0.0)
        (account,) = prepare_training_data(config, 0, lambda _: thinking, cache=tmp_path, say=print).ledger["sources"]
        assert (account["altered"], account["turns"]) == ({kind: turns}, turns)


@pytest.mark.parametrize(
    ("name", "alike"), [("glm4moe", 1), ("qwen3_5_think", 1), ("nemotron_3_nano", 1), ("qwen3", 0), ("llama3_1", 0)]
)
def test_text_that_is_written_as_a_number_is_counted_where_the_template_writes_them_alike(
    name: str, alike: int
) -> None:
    renderer = renderer_of(TEMPLATES[name], any_reasoning=False)
    for value, expected in (("42", alike), (42, 0), ("42 ", 0), ("4.2", alike), ("Oslo", 0)):
        call = Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Oslo", "days": value}),))
        talk = (Message("user", "q"), call, Message("tool", "5"), Message("assistant", "Five."))
        altered = renderer.render(Conversation(talk, (TOOL,)), max_length=10_000).altered
        assert altered.get(ALIKE, 0) == expected, value
