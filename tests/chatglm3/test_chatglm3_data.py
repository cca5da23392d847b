"""Conversations through the converted tokenizer: the original's training examples, prompts and references.

Run: pytest tests/chatglm3/test_chatglm3_data.py
"""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chatlora.chatglm3.tokenizer import STOP_IDS, tokenizer_files
from chatlora.data.collate import pad_left, pad_right
from chatlora.errors import DataError, SetAside
from chatlora.reading.conversation import Conversation, Message, Role, ToolCall
from chatlora.reading.formats import parse_row
from chatlora.rendering.examples import IGNORE_INDEX, NO_TARGET_LEFT, PROMPT_TOO_LONG, Example
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.turns import NO_TARGET
from tests.chatglm3_checkpoints import Original
from tests.tiny_tokenizers import CHATML_TOKENS, GLM_TOKENS, tiny_tokenizer


@pytest.fixture(scope="module")
def recordings(shared: Path) -> Path:
    return shared / "chatglm3"


@pytest.fixture(scope="module")
def tokenizer(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(recordings / "tokenizer/tokenizer.model", 8192).items():
        (folder / name).write_text(content, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, generation_stop_ids=STOP_IDS)


@pytest.fixture(scope="module")
def original(recordings: Path) -> Original:
    return Original(recordings / "tokenizer/tokenizer.model")


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def conversation(
    messages: list[dict[str, Any]], tools: Any = None, *, learn_observations: bool = False
) -> Conversation:
    messages = copy.deepcopy(messages)
    for message in messages:
        if learn_observations and message["role"] == "observation":
            message["loss"] = True
    return parse_row({"conversations": messages, **({"tools": tools} if tools else {})})


def is_learned(labels: list[int]) -> bool:
    return any(label != IGNORE_INDEX for label in labels)


# ---- the recordings


def test_every_recorded_training_example_is_reproduced(renderer: Renderer, recordings: Path) -> None:
    refused = {}
    for recorded in load(recordings / "process_batch.json"):
        told = conversation(recorded["conversations"], learn_observations=True)
        max_length = recorded["max_input_length"] + recorded["max_output_length"] + 1
        if not is_learned(recorded["labels"]):
            with pytest.raises(SetAside) as caught:
                renderer.render(told, max_length=max_length, over_length="cut")
            refused[recorded["name"]] = caught.value.reason
            continue
        (example,) = renderer.render(told, max_length=max_length, over_length="cut").examples
        assert example.input_ids == recorded["input_ids"], recorded["name"]
        assert example.labels == recorded["labels"], recorded["name"]
    assert refused == {
        "only_user": NO_TARGET,
        "empty_conversation": NO_TARGET,
        "trunc_inside_user_all_masked": NO_TARGET_LEFT,
    }


def test_without_loss_true_nothing_of_an_observation_is_learned(renderer: Renderer, recordings: Path) -> None:
    found = 0
    for recorded in load(recordings / "process_batch.json"):
        if not any(message["role"] == "observation" for message in recorded["conversations"]):
            continue
        found += 1
        told = conversation(recorded["conversations"])
        rendered = renderer.render(told, max_length=1000)
        learned = [label for example in rendered.examples for label in example.labels if label != IGNORE_INDEX]
        recorded_learned = [label for label in recorded["labels"] if label != IGNORE_INDEX]
        assert len(learned) < len(recorded_learned)
        text = renderer.tokenizer.decode(learned)
        assert all(message.content not in text for message in told.messages if message.role == "tool")
    assert found == 3


def test_every_recorded_evaluation_example_is_reproduced_and_long_prompts_are_named(
    renderer: Renderer, recordings: Path
) -> None:
    for recorded in load(recordings / "process_batch_eval.json"):
        told = conversation(recorded["conversations"])
        replies = sum(message.role == "assistant" for message in told.messages)
        if not replies:
            assert recorded["examples"] == []
            continue
        rendered = renderer.render_for_evaluation(
            told,
            max_prompt_length=recorded["max_input_length"],
            max_new_tokens=recorded["max_output_length"],
            over_length="cut",
        )
        found = [{"input_ids": sample.input_ids, "output_ids": sample.output_ids} for sample in rendered]
        assert found == recorded["examples"], recorded["name"]
        assert len(rendered.set_aside) == replies - len(found)
        assert all(PROMPT_TOO_LONG in reason for _, reason in rendered.set_aside)


def test_odd_rows_are_refused_or_read_as_recorded(renderer: Renderer, recordings: Path) -> None:
    for recorded in load(recordings / "process_batch_errors.json"):
        row = {name: values[0] for name, values in recorded["batch"].items()}
        if any(turn.get("role") == "bot" for turn in row.get("conversations", ())):  # another name for the assistant
            assert parse_row(row).messages[0].role == "assistant"
        elif recorded.get("error") in ("AssertionError", "KeyError") and "messages" not in row:
            with pytest.raises(DataError):
                parse_row(row)
        elif recorded["fn"] == "process_batch" and "output" in recorded:
            for message in row["conversations"]:
                message.pop("loss", None)  # which the original ignored, and we do not
            (example,) = renderer.render(parse_row(row), max_length=100).examples
            assert [example.input_ids] == recorded["output"]["input_ids"]
            assert [example.labels] == recorded["output"]["labels"]
        else:  # what the original had not implemented is read
            assert parse_row(row).messages


def test_every_recorded_tools_example_is_reproduced(renderer: Renderer, recordings: Path) -> None:
    for recorded in load(recordings / "tools_format_2023_11.json"):
        told = conversation(recorded["conversations"], recorded.get("tools"), learn_observations=True)
        (example,) = renderer.render(told, max_length=1000).examples
        assert example.input_ids == recorded["input_ids"], recorded["name"]
        assert example.labels == recorded["labels"], recorded["name"]


def test_every_recorded_chat_prompt_is_reproduced(
    tokenizer: PreTrainedTokenizerBase, renderer: Renderer, recordings: Path
) -> None:
    for recorded in load(recordings / "build_chat_input.json"):
        history = [*(recorded["history"] or []), {"role": recorded["role"], "content": recorded["query"]}]
        if "<|user|>" in json.dumps(history):  # text that spells control tokens: message by message, as in training
            ids = prompt_of_masked(renderer, history)
        else:  # what any other program gets from the chat template, with the original's history as it is
            ids = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
        assert ids == recorded["input_ids"]


def prompt_of_masked(renderer: Renderer, history: list[dict[str, Any]]) -> list[int]:
    masked = renderer._text.mask(history)
    return renderer._text.encode(renderer._template.render(masked, (), prompt=True)).ids


def test_the_original_s_history_of_calls_is_openai_s_with_tools(
    tokenizer: PreTrainedTokenizerBase, recordings: Path
) -> None:
    recorded = load(recordings / "build_chat_input.json")[4]
    system, user, call = recorded["history"]
    called = {"function": {"name": call["metadata"], "arguments": {"location": "北京"}}}
    messages = [
        user,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "content": recorded["query"]},
    ]
    tools = [{"type": "function", "function": tool} for tool in system["tools"]]
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert ids == recorded["input_ids"]


def test_batches_are_as_wide_as_the_original_s(recordings: Path) -> None:
    for recorded in load(recordings / "collator.json"):
        features, batch = recorded["features"], recorded["batch"]
        if recorded["kind"] == "train":
            padded = pad_right([Example(row["input_ids"], row["labels"]) for row in features])
            assert padded["input_ids"].shape == (len(batch["input_ids"]), len(batch["input_ids"][0]))
            for row, ids, labels in zip(features, padded["input_ids"], padded["labels"], strict=True):
                size = len(row["input_ids"])
                assert ids[:size].tolist() == row["input_ids"]
                assert labels[:size].tolist() == row["labels"]
        else:
            padded = pad_left([row["input_ids"] for row in features], 0)
            assert {name: values.tolist() for name, values in padded.items()} == {name: batch[name] for name in padded}


BROKEN_TEMPLATES = {  # a change in the template, and the recordings that must see it
    "no space before the content": ("{{ ' ' ~ content }}", "{{ content }}", "process_batch.json"),
    "a space before no content": (
        "{%- if content %}{{ ' ' ~ content }}{% endif -%}",
        "{{ ' ' ~ content }}",
        "process_batch.json",
    ),
    "no end after a last question": ("{{ '</s>' }}", "", "process_batch.json"),
    "tools in one line": ("tojson(indent=4)", "tojson", "tools_format_2023_11.json"),
    "calls as JSON": ("name ~ '=' ~ python(value)", "name ~ '=' ~ (value | tojson)", "tools_format_2023_11.json"),
}


@pytest.mark.parametrize("case", BROKEN_TEMPLATES)
def test_the_recordings_see_a_broken_template(tokenizer: PreTrainedTokenizerBase, recordings: Path, case: str) -> None:
    whole, broken, name = BROKEN_TEMPLATES[case]
    assert tokenizer.chat_template.count(whole) == 1
    renderer = Renderer(
        tokenizer, chat_template=tokenizer.chat_template.replace(whole, broken), generation_stop_ids=STOP_IDS
    )
    different = 0
    for recorded in load(recordings / name):
        told = conversation(recorded["conversations"], recorded.get("tools"), learn_observations=True)
        try:
            (example,) = renderer.render(told, max_length=1000).examples
            max_length = recorded.get("max_input_length", 999) + recorded.get("max_output_length", 0) + 1
            different += example.input_ids[:max_length] != recorded["input_ids"]
        except SetAside:
            different += is_learned(recorded["labels"])
    assert different


# ---- against the original's rules, on more than was recorded

BITS = [
    *[
        "你好",
        "hello",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "[gMASK]",
    ],
    *["sop", "eop", "</s>", "<unk>", "people of philosophy", "s", "so", "op", "p", "<", "|>", "<|", "👋🏽", "\u200b"],
    *["\u3000", "\u00a0", "\ufeff", "\x00", "\x7f", "é", "e\u0301", "𠮷", "1.5", '{"a": 1}', "'", '"', "\\", "\\n"],
    *["▁", "_", "ﬁ", "Ａ", "٣", "[MASK]", "\u2028", "\x85", "\x1c", "<0x0A>", "[", "]", "%s"],
]


def random_messages(draw: random.Random) -> Iterator[dict[str, str]]:
    for _ in range(draw.randint(1, 6)):
        role = draw.choice(["user", "user", "assistant", "assistant", "system", "observation"])
        yield {"role": role, "content": random_text(draw)}


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(BITS) for _ in range(draw.choice([0, 1, 1, 2, 3, 6])))


def test_random_conversations_become_the_original_s_examples(renderer: Renderer, original: Original) -> None:
    draw = random.Random(5)
    for _ in range(1500):
        messages = list(random_messages(draw))
        max_input, max_output = draw.choice([(256, 512), (10, 5), (20, 10), (256, 3)])
        max_length = max_input + max_output + 1
        ids, labels = original.training(messages, max_length)
        told = conversation(messages, learn_observations=True)
        if is_learned(labels):
            (example,) = renderer.render(told, max_length=max_length, over_length="cut").examples
            assert (example.input_ids, example.labels) == (ids, labels), messages
        samples = original.evaluation(messages, max_input, max_output)
        if any(message["role"] == "assistant" for message in messages):
            rendered = renderer.render_for_evaluation(
                conversation(messages), max_prompt_length=max_input, max_new_tokens=max_output, over_length="cut"
            )
            assert [(sample.input_ids, sample.output_ids) for sample in rendered] == samples, messages


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 2 else 6)
    if kind >= 6:
        items = [random_value(draw, depth + 1) for _ in range(draw.randrange(3))]
        return items if kind == 6 else {random_text(draw): item for item in items}
    return [random_text(draw), random_text(draw), draw.randrange(-9, 999), 2.5, draw.random() < 0.5, None][kind]


def test_random_calls_are_written_as_python_writes_them(renderer: Renderer, original: Original) -> None:
    draw = random.Random(11)
    for _ in range(400):
        name, parameters = draw.choice(["f", "天气"]), {f"k{i}": random_value(draw) for i in range(draw.randrange(4))}
        row: list[dict[str, Any]] = [
            {"role": "user", "content": "q"},
            {"role": "tool", "name": name, "parameters": parameters, "observation": random_text(draw)},
            {"role": "assistant", "content": "a"},
        ]
        call = "```python\ntool_call(" + ", ".join(f"{k}={v!r}" for k, v in parameters.items()) + ")\n```"
        expected = [
            *original.training([{"role": "user", "content": "q"}], 1000)[0][:-1],
            *original.message("assistant", call, metadata=name),
            *original.message("observation", row[1]["observation"]),
            *original.message("assistant", "a"),
            2,
        ]
        (example,) = renderer.render(conversation(row), max_length=2000).examples
        assert example.input_ids == expected, parameters


# ---- what the pipeline needed for it, on other tokenizers


def test_a_tool_s_message_is_learned_from_its_text_to_its_stop_token() -> None:
    chatml = Renderer(tiny_tokenizer())
    messages = (Message("user", "Where?"), Message("assistant", "I look."), Message("tool", "north", loss=True))
    (example,) = chatml.render(Conversation((*messages, Message("assistant", "North."))), max_length=1000).examples
    learned = chatml.tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    assert learned == "I look.<|im_end|>north<|im_end|>North.<|im_end|>"
    assert "north" not in [
        chatml.tokenizer.decode(sample.output_ids)
        for sample in chatml.render_for_evaluation(Conversation(messages), max_prompt_length=None, max_new_tokens=9)
    ]


# The forms of GLM-4 and GLM-4-0414: a call is metadata after the role, or a function's name and its arguments.
GLM4 = (
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
    "{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GLM4_0414 = (
    "[gMASK]<sop>{%- if tools -%}<|system|>\n# 可用工具{% for tool in tools %}\n\n## {{ tool.function.name }}\n\n"
    "{{ tool.function | tojson(indent=4, ensure_ascii=False) }}{% endfor %}{%- endif -%}{%- for msg in messages -%}"
    "{%- if msg.role == 'tool' -%}<|observation|>\n{{ msg.content }}{%- else -%}"
    "<|{{ msg.role }}|>{% if msg.content %}{{ '\n' + msg.content }}{% endif %}{% for call in msg.tool_calls or [] %}"
    "{% if msg.content or not loop.first %}<|assistant|>{% endif %}{{ call.function.name }}\n"
    "{{ call.function.arguments | tojson }}{% endfor %}{%- endif -%}{%- endfor -%}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [GLM4, GLM4_0414])
def test_templates_like_glm4_s_are_trained_exactly(template: str) -> None:
    renderer = Renderer(tiny_tokenizer(chat_template=template, control_tokens=GLM_TOKENS, eos="<|endoftext|>"))
    told: list[tuple[Role, str]] = [
        ("system", "你是助手"),
        ("user", "你好"),
        ("assistant", "你好！"),
        ("user", "再见"),
        ("assistant", "再见。"),
    ]
    (example,) = renderer.render(Conversation(tuple(Message(*each) for each in told)), max_length=1000).examples
    learned = renderer.tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    assert learned == "\n你好！<|user|>\n再见。<|endoftext|>"
    tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
    call = Message("assistant", "", tool_calls=(ToolCall("look", {"at": "东"}),))
    with_tool = Conversation((Message("user", "q"), call, Message("tool", "山"), Message("assistant", "有山")), tools)
    if template == GLM4:
        with pytest.raises(SetAside, match="does not continue its generation prompt"):
            renderer.render(with_tool, max_length=1000)
    else:
        (example,) = renderer.render(with_tool, max_length=1000).examples
        learned = renderer.tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
        assert learned == 'look\n{"at": "东"}<|observation|>\n有山<|endoftext|>'


def test_a_control_token_that_is_a_whole_word_leaves_other_words_alone() -> None:
    word = AddedToken("sop", special=True, normalized=False, single_word=True)
    renderer = Renderer(tiny_tokenizer(control_tokens=(*CHATML_TOKENS, word)))
    (sop,) = renderer.tokenizer.convert_tokens_to_ids(["sop"])
    for text in ("sop", "a sop.", "philosophy", "ends with s", "op", "x_sop", "沙sop", "²sop", "sop\n", "properties"):
        told = Conversation((Message("user", text), Message("assistant", text)))
        (example,) = renderer.render(told, max_length=1000).examples
        assert sop not in example.input_ids
        assert renderer.tokenizer.decode(example.input_ids).count(text) == 2
    assert renderer._text.mask({"parameters": "arguments"}) == {"parameters": "arguments"}
    assert sop in renderer.tokenizer.encode("²sop"), "the tokenizer takes the number two above the line for no letter"
