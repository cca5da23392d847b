"""Turns in any shape: roles in any case, calls that are turns of their own, parts, and texts with markers."""

import json
from datetime import date
from typing import Any

import pytest

from chatlora.errors import DataError
from chatlora.reading.conversation import Message, ToolCall
from chatlora.reading.formats import parse_row, read_row
from chatlora.reading.roles import ROLE_NAMES

CALL = {"name": "look", "arguments": {"at": "Oslo"}}
LOOK = ToolCall("look", {"at": "Oslo"})
USER, ASK = {"role": "user", "content": "q"}, Message("user", "q")


def messages(*turns: dict[str, Any], **columns: Any) -> tuple[Message, ...]:
    return parse_row({"messages": list(turns), **columns}).messages


def problem(*turns: dict[str, Any], **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_row({"messages": list(turns), **columns})
    return "; ".join(caught.value.problems)


@pytest.mark.parametrize("name", ROLE_NAMES)
def test_a_role_has_its_name_in_any_case(name: str) -> None:
    for key, text, written in (("role", "content", name.upper()), ("from", "value", name.title().replace("_", " "))):
        turns = [{key: "gpt", text: "a"}, {key: written, text: "x"}]
        assert parse_row({"conversations": turns}).messages[1].role == ROLE_NAMES[name]


def called(**more: Any) -> dict[str, Any]:
    return {"role": "tool_call", "content": json.dumps(CALL), **more}


def test_calls_that_are_turns_of_their_own_belong_to_the_reply_in_front() -> None:
    said = {"role": "assistant", "content": "A moment."}
    assert messages(USER, said, called(), called()) == (ASK, Message("assistant", "A moment.", tool_calls=(LOOK, LOOK)))
    apart = messages(USER, called(loss=False), called(loss=True))
    assert [(message.loss, message.tool_calls) for message in apart[1:]] == [(False, (LOOK,)), (True, (LOOK,))]
    answered = messages(USER, called(), {"role": "tool_response", "content": "5"}, called())
    assert [message.role for message in answered] == ["user", "assistant", "tool", "assistant"]


def test_a_turn_of_calls_that_holds_none_is_told() -> None:
    assert "messages[1].content holds no call" in problem(USER, {"role": "tool_call", "content": "[]"})


def test_parts_stand_where_a_template_can_keep_them() -> None:
    text, use = (
        {"type": "text", "text": "So."},
        {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "Oslo"}},
    )
    thought = {"type": "thinking", "thinking": "hm"}
    (reply,) = messages({"role": "assistant", "content": [thought, text, use]})
    assert reply == Message("assistant", "So.", "hm", (ToolCall("look", {"at": "Oslo"}, "c1"),))
    assert "content[1] comes too late" in problem(USER, {"role": "assistant", "content": [use, text]})
    assert "belongs into a message of the assistant" in problem({"role": "user", "content": [use]})
    assert "content[1].type is 'image'" in problem({"role": "assistant", "content": [thought, {"type": "image"}]})


def test_parts_and_keys_of_a_message_are_both_read() -> None:
    thought, text = {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "So."}
    (reply,) = messages({"role": "assistant", "content": [thought, text], "tool_calls": [CALL], "name": "ana"})
    assert reply == Message("assistant", "So.", "hm", (LOOK,), name="ana")
    told = problem({"role": "assistant", "content": [thought, text], "reasoning_content": "well"})
    assert "different texts in reasoning_content and parts; keep one" in told


def test_a_thought_in_front_of_a_call_keeps_it_apart_from_the_text_before() -> None:
    thinking = called(content=f"<think>hm</think>{json.dumps(CALL)}")
    assert messages(USER, {"role": "assistant", "content": "So."}, thinking)[1:] == (
        Message("assistant", "So."),
        Message("assistant", "", "hm", (LOOK,), thought_text="<think>hm</think>"),
    )


def test_pairs_have_flags_as_messages_do() -> None:
    pairs = [{"input": "q", "output": "bad", "train": False}, {"input": "q", "output": "a", "mood": "glad"}]
    read = read_row({"conversation": pairs})
    assert [message.loss for message in read.conversation.messages] == [None, False, None, None]
    assert read.not_used == {"mood"}
    with pytest.raises(DataError, match=r"conversation\[0\]\.keep is false, which nothing reads"):
        parse_row({"conversation": [{"input": "q", "output": "a", "keep": False}]})


def test_results_come_before_what_the_user_says_with_them() -> None:
    use = {"type": "tool_use", "id": "c1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "5"}], "is_error": False}
    both = {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]}
    assert messages({"role": "assistant", "content": [use]}, both)[1:] == (
        Message("tool", "5", tool_call_id="c1"),
        Message("user", "And now?"),
    )


def test_tools_of_two_places_must_be_the_same() -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    system = {"role": "system", "content": "s", "tools": [tool]}
    assert parse_row({"messages": [system, USER], "tools": [tool]}).tools == (tool,)
    other = {"type": "function", "function": {"name": "find"}}
    assert "offer different tools" in problem(system, USER, tools=[other])
    assert read_row({"messages": [{**USER, "tools": [tool]}]}).not_used == {"tools"}


GLAIVE = "USER: Hi.\n\nWho?\n\n\nASSISTANT: {}<|endoftext|>\n\n\n"


def test_text_between_markers_stays_byte_for_byte() -> None:
    row = {
        "system": "SYSTEM: A helper, with no access to external functions.\n\n",
        "chat": GLAIVE.format("Me.\n\n\n Yes. "),
    }
    assert [message.content for message in parse_row(row).messages] == [
        *("A helper, with no access to external functions.", "Hi.\n\nWho?", "Me.\n\n\n Yes.")
    ]


def test_a_call_between_markers_is_read_or_told() -> None:
    without = GLAIVE.format('<functioncall> {"name": "look"} ')
    assert parse_row({"chat": without}).messages[1].tool_calls == (ToolCall("look", {}),)
    for broken in ("<functioncall> look()", """<functioncall> {"name": "look", "arguments": '{x}'} """):
        with pytest.raises(DataError):
            parse_row({"chat": GLAIVE.format(broken)})


def test_tools_in_the_language_of_moss_are_refused() -> None:
    turn = {
        "Human": "<|Human|>: q<eoh>\n",
        "Commands": '<|Commands|>: Search("x")<eoc>\n',
        "MOSS": "<|MOSS|>: a<eom>\n",
    }
    with pytest.raises(DataError, match=r"chat\.turn_1 has Commands, tools in MOSS's own language"):
        parse_row({"chat": {"turn_1": turn}})


def test_a_call_s_own_thought_is_read_and_what_else_stands_beside_it_is_told() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}', "reasoning_content": "First look."}
    row = {"messages": [{"role": "user", "content": "q"}, {**call, "tool_calls": [{"name": "g"}], "refusal": "no"}]}
    with pytest.raises(DataError, match="both content and refusal"):
        read_row(row)
    read = read_row(row, ignore=["refusal"])
    assert read.conversation.messages[1].reasoning == "First look."
    assert read.not_used == {"tool_calls"}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "Sure.", "refusal": "I cannot."},
        {"role": "tool", "name": "f", "parameters": {}, "observation": "o", "content": "more"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}},
    ],
)
def test_of_two_keys_for_the_same_none_is_chosen_unsaid(turn: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="of which one is read"):
        parse_row({"messages": [{"role": "user", "content": "q"}, turn]})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"on": date(2026, 1, 1)}, "arguments holds a date"),
        ({"of": [b"raw"]}, "arguments holds a bytes"),
        ({"by": {1: "one"}}, "arguments has the key 1, which is no text"),
    ],
)
def test_arguments_that_are_no_json_as_a_reader_or_arrow_gives_them_are_refused(arguments: Any, said: str) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": arguments}]}
    assert said in problem(USER, call)
    assert "has the key 2" in problem(USER, {"role": "tool", "content": {2: "two"}})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"name": "f", "arguments": '{"at": "Oslo", "at": "Rome"}'}, "the key 'at' stands twice"),
        ({"name": "f", "arguments": {}, "parameters": {"at": "Oslo"}}, "has both arguments and parameters"),
    ],
)
def test_of_two_values_for_the_same_none_is_chosen_unsaid(call: dict[str, Any], said: str) -> None:
    assert said in problem(USER, {"role": "assistant", "content": None, "tool_calls": [call]})
