"""A row in any known form is read byte for byte; what is wrong with it is told at once, with place and remedy."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlora.errors import DataError
from chatlora.reading.conversation import Conversation, Message, ToolCall, split_reasoning
from chatlora.reading.formats import KNOWN_COLUMNS, parse_row

QUESTION, ANSWER = "  Who?\r\n", "2024-01-01\n"
EXPECTED = (Message("user", QUESTION), Message("assistant", ANSWER))
WEATHER = {"name": "weather", "description": "today's", "parameters": {"type": "object", "properties": {}}}
CALL = ToolCall("weather", {"city": "北京", "days": [1, 2.5, None]})


MESSAGES = "system, user, assistant, tool"
SHAREGPT = "system, human, gpt, function_call, observation"


def problems_of(row: dict[str, Any], **settings: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        parse_row(row, place="t.jsonl:17", **settings)
    return caught.value.problems


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "content in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "  Who"}, {"type": "text", "text": "?\r\n"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
    },
    "conversations": {
        "conversations": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "sharegpt in the column messages": {
        "messages": [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": ANSWER}]
    },
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "alpaca with null input": {"instruction": QUESTION, "input": None, "output": ANSWER},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt and completion as messages": {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    },
    "messages beside a prompt": {
        "prompt": QUESTION,
        "prompt_id": 7,
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
    },
    "messages as JSON text": {
        "messages": json.dumps([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}])
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_every_form_gives_the_same_conversation_byte_for_byte(name: str) -> None:
    assert parse_row(ROWS[name], place="t.jsonl:1") == Conversation(EXPECTED, (), "t.jsonl:1")


@given(question=st.text(), answer=st.text().filter(lambda text: "<think>" not in text))
def test_any_text_is_kept_as_it_is(question: str, answer: str) -> None:
    expected = (Message("user", question), Message("assistant", answer))
    assert parse_row({"prompt": question, "completion": answer}).messages == expected
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    assert parse_row({"conversations": turns}).messages == expected
    alpaca = {"instruction": question, "input": question, "output": answer}
    assert parse_row(alpaca).messages[0].content == ("\n".join([question, question]) if question else "")


KEYS = st.sampled_from(
    [*KNOWN_COLUMNS, "role", "content", "from", "value", "tool_calls", "function", "name", "arguments"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(row=st.dictionaries(KEYS, JSON, min_size=1, max_size=4))
def test_any_json_object_is_a_conversation_or_a_data_error(row: dict[str, Any]) -> None:
    with suppress(DataError):
        assert isinstance(parse_row(row, place="t:1"), Conversation)


def test_other_columns_are_named_by_ours() -> None:
    row = {"content": QUESTION, "summary": ANSWER, "messages": "not these", "id": 3}
    assert parse_row(row, columns={"prompt": "content", "completion": "summary"}).messages == EXPECTED
    swapped = {"input": QUESTION, "target": ANSWER}
    assert parse_row(swapped, columns={"instruction": "input", "output": "target"}).messages == EXPECTED


def test_columns_that_are_not_there_are_told() -> None:
    row = {"content": "q", "summary": "a"}
    assert problems_of(row, columns={"prmpt": "content", "completion": "sumary"}) == (
        "t.jsonl:17: columns: 'prmpt' is no column of any form; did you mean 'prompt'?",
        "t.jsonl:17: columns.completion: the row has no column 'sumary'; did you mean 'summary'?",
    )


def test_the_form_can_be_stated_and_must_then_fit() -> None:
    both = {"instruction": "i", "output": "o", "prompt": "p", "completion": "c"}
    assert parse_row(both, format="alpaca").messages[0].content == "i"
    assert parse_row(both, format="prompt_completion").messages[0].content == "p"
    assert "say which with format:" in problems_of(both)[0]
    assert "messages is missing or null" in problems_of(both, format="messages")[0]


def test_alpaca_history_and_system_come_first() -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "history": [["q1", "a1"], ["q2", "a2"]], "system": "s"}
    assert [(m.role, m.content) for m in parse_row(row).messages] == [
        ("system", "s"),
        *(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")),
        ("user", "i\nx"),
        ("assistant", "o"),
    ]


def test_a_system_column_stands_first_and_must_not_contradict() -> None:
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}], "system": "s"}
    assert [message.role for message in parse_row(row).messages] == ["system", "assistant"]
    assert "different things" in problems_of({**row, "system": "t"})[0]


def test_only_the_completion_of_message_lists_is_learned() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = parse_row({"prompt": turns, "completion": [{"role": "assistant", "content": "b"}]})
    assert [message.loss for message in row.messages] == [None, False, None]


# ---- tools

OPENAI_CALLS = [
    {"type": "function", "function": {"name": "weather", "arguments": CALL.arguments}},
    {"type": "function", "function": {"name": "weather", "arguments": json.dumps(CALL.arguments)}},
    {"name": "weather", "arguments": CALL.arguments},
]


@pytest.mark.parametrize("call", OPENAI_CALLS)
def test_calls_are_read_from_objects_and_from_json_text(call: dict[str, Any]) -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "c1"}]},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sunny"},
    ]
    row = parse_row({"messages": messages, "tools": [{"type": "function", "function": WEATHER}]})
    assert row.messages == (
        Message("assistant", "", tool_calls=(ToolCall("weather", CALL.arguments, "c1"),)),
        Message("tool", "sunny", tool_call_id="c1", name="weather"),
    )
    assert row.tools == ({"type": "function", "function": WEATHER},)


def test_openai_before_tool_calls() -> None:
    call = {"name": "weather", "arguments": json.dumps(CALL.arguments)}
    messages = [
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    row = parse_row({"messages": messages, "functions": [WEATHER]})
    assert row.messages[0].tool_calls == (CALL,)
    assert row.messages[1] == Message("tool", "sunny", name="weather")
    assert row.tools == ({"type": "function", "function": WEATHER},)


def test_sharegpt_calls_and_observations() -> None:
    call = {"name": "weather", "arguments": CALL.arguments}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": '{"t": 22}'},
        {"from": "function_call", "value": "<think>\nhm\n</think>\n" + json.dumps([call, call])},
    ]
    row = parse_row({"conversations": turns, "tools": json.dumps([WEATHER])})
    assert row.messages == (
        Message("user", "q"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", '{"t": 22}'),
        Message("assistant", "", "hm", (CALL, CALL), thought_text="<think>\nhm\n</think>\n"),
    )
    assert row.tools == ({"type": "function", "function": WEATHER},)


def test_chatglm3_tool_messages_of_2023_are_a_call_and_its_result() -> None:
    tool = {"role": "tool", "name": "weather", "parameters": CALL.arguments, "observation": [1, "二"], "loss": False}
    row = parse_row({"conversations": [{"role": "user", "content": "q"}, tool], "tools": [WEATHER]})
    assert row.messages == (
        Message("user", "q"),
        Message("assistant", "", tool_calls=(CALL,), loss=False),
        Message("tool", '[1, "二"]', name="weather"),
    )


def test_recorded_chatglm3_rows_are_read(shared: Any) -> None:
    for name in ("process_batch", "tools_format_2023_11"):
        for recorded in json.loads((shared / "chatglm3" / f"{name}.json").read_text(encoding="utf-8")):
            row = parse_row(recorded)
            told = [tool for tool in recorded.get("tools") or () if isinstance(tool, str)]
            assert [tool["text"] for tool in row.tools if tool["type"] == "text"] == told
            calls = sum(turn["role"] == "tool" for turn in recorded["conversations"])
            assert len(row.messages) == len(recorded["conversations"]) + calls
            assert "".join(message.content for message in row.messages if message.role != "tool") == "".join(
                turn["content"] for turn in recorded["conversations"] if turn["role"] not in ("tool", "observation")
            )


# ---- reasoning and loss


def test_a_leading_thought_is_reasoning() -> None:
    assert split_reasoning("<think>\na\nb\n</think>\n\nHi\n") == ("a\nb", "Hi\n", "<think>\na\nb\n</think>\n\n")
    assert split_reasoning("<think>\n\n</think>\n\nHi") == (None, "Hi", "<think>\n\n</think>\n\n")
    assert split_reasoning("Hi <think>a</think>") == (None, "Hi <think>a</think>", None)
    assert split_reasoning("<think>never closed") == (None, "<think>never closed", None)
    user, assistant = parse_row({"prompt": "<think>x</think>y", "completion": "<think>x</think>y"}).messages
    assert (user.reasoning, user.content) == (None, "<think>x</think>y")
    assert (assistant.reasoning, assistant.content, assistant.thought_text) == ("x", "y", "<think>x</think>")


@pytest.mark.parametrize("text", ["<think>\na\n</think>\n\nHi", "\n <think></think>Hi", "<think> a </think>\n\n\n"])
def test_what_is_set_apart_of_a_reply_gives_its_text_back(text: str) -> None:
    said = split_reasoning(text)
    assert said.thought_text is not None
    assert said.thought_text + said.content == text
    call = {"from": "function_call", "value": '<think>x</think>\n{"name": "f", "arguments": {}}'}
    forms: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]},
        {"instruction": "?", "output": text},
        {"prompt": "?", "completion": text},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]},
    ]
    assert [parse_row(row).messages[1].thought_text for row in forms] == [said.thought_text] * len(forms)
    turns = [{"from": "human", "value": "?"}, call]
    assert parse_row({"conversations": turns}).messages[1].thought_text == "<think>x</think>\n"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_stated_reasoning(key: str) -> None:
    row = {"messages": [{"role": "assistant", "content": "<think>text</think>", key: "why"}]}
    assert parse_row(row).messages == (Message("assistant", "<think>text</think>", reasoning="why"),)


def test_loss_and_weight_override() -> None:
    turns: list[dict[str, Any]] = [{"loss": True}, {"loss": False}, {"weight": 0}, {"weight": 1}, {"loss": None}, {}]
    row = parse_row({"messages": [{"role": "assistant", "content": "a", **turn} for turn in turns]})
    assert [message.loss for message in row.messages] == [True, False, False, True, None, None]


# ---- mistakes


def test_all_mistakes_of_a_row_are_told_with_path_and_remedy() -> None:
    row = {
        "messages": [
            {"role": "asistant", "content": "x"},
            {"role": "user", "contnet": "x"},
            {"role": "user", "content": 5},
            "hello",
            {"role": "user", "content": "a\ud83d"},
            {"role": "user", "content": None},
            {"role": "assistant", "content": "x", "loss": "false"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": "u"}]},
            {"content": "x"},
        ]
    }
    found = problems_of(row)
    assert found[:7] == (
        f"t.jsonl:17: messages[0].role is 'asistant'; did you mean 'assistant'? the roles are {MESSAGES}",
        "t.jsonl:17: messages[1].content is missing or null; did you mean 'contnet'?; an empty text is written as \"\"",
        "t.jsonl:17: messages[2].content is the number 5, not text; put it in quotes if it is meant as text",
        "t.jsonl:17: messages[3] is the text 'hello', not a message with role and content",
        "t.jsonl:17: messages[4].content holds half a character (\\ud83d at character 1); write the whole character",
        't.jsonl:17: messages[5].content is missing or null; an empty text is written as ""',
        "t.jsonl:17: messages[6].loss is the text 'false'; it is true or false, without quotes",
    )
    assert found[7].startswith("t.jsonl:17: messages[7].tool_calls[0].function.arguments should be JSON, and is not (")
    assert "messages[8].content[0].type is 'image_url'" in found[8]
    assert found[9] == f"t.jsonl:17: messages[9].role is missing; it is one of {MESSAGES}"
    assert len(found) == 10


def test_paths_are_those_of_the_form_in_the_file() -> None:
    row = {"conversations": [{"from": "humann", "value": "x"}, {"from": "gpt", "value": 5}]}
    assert problems_of(row) == (
        f"t.jsonl:17: conversations[0].from is 'humann'; did you mean 'human'? the roles are {SHAREGPT}",
        "t.jsonl:17: conversations[1].value is the number 5, not text; put it in quotes if it is meant as text",
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"from": "gptt", "value": ""}, f"from is 'gptt'; did you mean 'gpt'? the roles are {SHAREGPT}"),
        ({"from": "narrator", "value": ""}, f"from is 'narrator'; the roles are {SHAREGPT}"),
        ({"value": ""}, f"from is missing; it is one of {SHAREGPT}"),
        (
            {"role": "asistant", "content": ""},
            f"role is 'asistant'; did you mean 'assistant'? the roles are {MESSAGES}",
        ),
        ({"role": "narrator", "content": ""}, f"role is 'narrator'; the roles are {MESSAGES}"),
    ],
)
def test_an_unknown_role_is_told_with_the_roles_of_the_rows_own_form(row: dict[str, str], said: str) -> None:
    assert problems_of({"conversations": [row]}) == (f"t.jsonl:17: conversations[0].{said}",)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"mesages": []}, "did you mean 'messages'?"),
        ({"text": "a document"}, "the row has the columns text"),
        ({}, "the row has no columns"),
        ({"prompt": "p", "reward": "c"}, "completion is missing or null"),
        ({"instruction": "i", "output": None}, "output is missing or null"),
        ({"messages": {"role": "user"}}, "messages is an object, not a list"),
        ({"messages": "[{"}, "messages should be JSON"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "history[0] is a list, not a pair"),
        ({"prompt": "p", "completion": {"role": "assistant"}}, "completion is an object, not text"),
        ({"messages": [], "tools": [{"description": "nameless"}]}, "tools[0].name is missing"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "\ud800"}]}]}, "half a character"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": {}}]}, "tool_calls is an object"),
        ({"messages": [{"role": "assistant", "content": "", "reasoning": "a", "thinking": "b"}]}, "keep one"),
    ],
)
def test_each_mistake_says_what_and_where(row: dict[str, Any], said: str) -> None:
    found = problems_of(row)
    assert len(found) == 1
    assert found[0].startswith("t.jsonl:17: ")
    assert said in found[0]


def test_rows_with_nothing_to_learn_are_no_mistake() -> None:
    assert parse_row({"messages": []}).messages == ()
    assert parse_row({"messages": [{"role": "user", "content": ""}]}).messages == (Message("user", ""),)
