"""Tool use told in text -> calls, results and tools; what cannot be read whole stays as it is, with a reason.

Run: pytest tests/reading/test_hermes.py
"""

import json
import time
from dataclasses import replace

import pytest

from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.reading.hermes import (
    CALLS_READ,
    NO_CALL,
    NO_TOOLS,
    NOT_CLOSED,
    RESULTS_READ,
    TEXT_AFTER,
    TEXT_BESIDE,
    TOOLS_READ,
    Hermes,
    read_hermes,
)

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}}}
LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "Oslo"}}\n</tool_call>'
CALL = ToolCall("look", {"at": "Oslo"})
HERMES_2 = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
    "You may call one or more functions to assist with the user query. Don't make assumptions about what values to "
    "plug into functions. Here are the available tools: <tools> %s </tools> Use the following pydantic model json "
    'schema for each tool call you will make: {"properties": {"arguments": {"title": "Arguments", "type": "object"}, '
    '"name": {"title": "Name", "type": "string"}}, "required": ["arguments", "name"], "title": "FunctionCall", '
    '"type": "object"} '
    "For each function call return a json object with function name and arguments within <tool_call></tool_call> XML "
    "tags as follows:\n<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>"
)
QWEN = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n%s\n</tools>\n\nFor each function call, return a json "
    "object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def talk(said: str, result: str = "59 degrees", role: str = "tool", system: str = "") -> Conversation:
    messages = (
        Message("user", "Where?"),
        Message("assistant", said),
        Message("user" if role == "user" else "tool", result),
        Message("assistant", "Far north."),
    )
    return Conversation(((Message("system", system),) if system else ()) + messages)


def read(conversation: Conversation) -> Hermes:
    found = read_hermes(conversation)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        (LOOK, "", (CALL,)),
        ("Let me see.\n\n" + LOOK, "Let me see.", (CALL,)),
        (f"{LOOK}\n{LOOK}", "", (CALL, CALL)),
        ('<tool_call>[{"arguments": {}, "name": "a"}, {"name": "b", "arguments": "{\\"x\\": 1}"}]</tool_call>', "",
         (ToolCall("a", {}), ToolCall("b", {"x": 1}))),
        ('<tool_call>{"name": "a", "arguments": {}, "id": "7"}\n{"name": "b", "arguments": {}}</tool_call>', "",
         (ToolCall("a", {}, "7"), ToolCall("b", {}))),
        ("<tool_call>\n{'name': 'look', 'arguments': {'at': 'Oslo'}}\n</tool_call>", "", (CALL,)),
    ],
)  # fmt: skip
def test_calls_are_read_out_of_a_reply(said: str, text: str, calls: tuple[ToolCall, ...]) -> None:
    found = read(talk(said))
    assert not found.problem
    assert found.changes == {CALLS_READ: 1}
    assert found.conversation.messages[1] == Message("assistant", text, tool_calls=calls)
    assert found.conversation.messages[2:] == talk(said).messages[2:]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ('<tool_call>\n{"name": "look", "arguments": {"at": }}\n</tool_call>', NO_CALL),
        ('<tool_call>{"name": "look"}</tool_call>', NO_CALL),
        ('<tool_call>{"name": "look", "arguments": {"a": 1, "a": 2}}</tool_call>', NO_CALL),
        ('<tool_call>{"name": "look", "arguments": {"a": NaN}}</tool_call>', NO_CALL),
        ('<tool_call>{"name": "look", "arguments": {}, "why": "x"}</tool_call>', NO_CALL),
        ('<tool_call>{"name": "look", "arguments": [{]}</tool_call>', NO_CALL),
        ("<tool_call>{'name': 'look', 'arguments': {1, 2}}</tool_call>", NO_CALL),
        ("<tool_call>\n<function=look>\n</function>\n</tool_call>", NO_CALL),
        ('<tool_call>\n{"name": "look", "arguments": {}}', NOT_CLOSED),
        (LOOK + " Done.", TEXT_AFTER),
        (f"{LOOK} and {LOOK}", TEXT_AFTER),
    ],
)
def test_what_cannot_be_read_whole_stays_as_it_is(said: str, problem: str) -> None:
    found = read(talk(said))
    assert (found.problem, found.conversation) == (problem, talk(said))


@pytest.mark.parametrize(
    "said", ["Use <tool_call> tags.", "In <tool_call></tool_call> goes JSON.", "No word of it.", "<tools>"]
)
def test_a_word_about_calls_is_none(said: str) -> None:
    assert read_hermes(talk(said)) is None
    spoken = Conversation((Message("user", LOOK), Message("assistant", "I see.")))
    assert read_hermes(spoken) is None


@pytest.mark.parametrize("role", ["tool", "user"])
def test_results_are_read_out_of_a_turn(role: str) -> None:
    wrapped = (
        '<tool_response>\n{"name": "look", "content": 59}\n</tool_response>\n<tool_response>\n two \n</tool_response>'
    )
    found = read(talk(LOOK, wrapped, role))
    assert not found.problem
    assert found.changes == {CALLS_READ: 1, RESULTS_READ: 1}
    assert found.conversation.messages[2:4] == (
        Message("tool", '{"name": "look", "content": 59}', name="look"),
        Message("tool", " two "),
    )
    beside = read(talk(LOOK, "See: " + wrapped, role))
    assert beside.problem == (TEXT_BESIDE if role == "user" else "")
    assert beside.conversation.messages[2].content == "See: " + wrapped


def test_a_user_who_speaks_of_results_answers_no_call() -> None:
    assert read_hermes(talk("Ask.", "What is <tool_response>x</tool_response>?", "user")) is None


@pytest.mark.parametrize("words", [HERMES_2, QWEN], ids=["Hermes", "Qwen"])
@pytest.mark.parametrize(
    "told",
    [json.dumps([TOOL, TOOL]), json.dumps(TOOL) + "\n" + json.dumps(TOOL), str([TOOL, TOOL])],
    ids=["list", "lines", "Python"],
)
def test_tools_are_read_out_of_the_system_message(words: str, told: str) -> None:
    found = read(talk(LOOK, system=words % told))
    assert found.conversation == replace(
        talk(LOOK, system=""), messages=read(talk(LOOK)).conversation.messages, tools=(TOOL, TOOL)
    )
    assert found.changes == {CALLS_READ: 1, TOOLS_READ: 1}
    around = read(talk(LOOK, system=f"Be brief.\n\n{words % told}\nAnd kind.\n"))
    assert around.conversation.messages[0] == Message("system", "Be brief.\n\nAnd kind.\n")
    assert around.conversation.tools == (TOOL, TOOL)


def test_tools_in_words_that_are_not_known_stay_there() -> None:
    system = f"Your tools: <tools>{json.dumps([TOOL])}</tools> Use them well."
    found = read(talk(LOOK, system=system))
    assert found.own_words
    assert found.conversation.messages[0] == Message("system", system)
    assert found.conversation.tools == ()
    changed = QWEN.replace("to assist with", "- or none - for")
    assert read(talk(LOOK, system=changed % json.dumps(TOOL))).own_words
    assert read_hermes(talk("Hm.", system=system)) is None


def test_broken_tools_are_told() -> None:
    assert read(talk(LOOK, system=QWEN % '{"type": "function", "function": {}}')).problem == NO_TOOLS
    assert read(talk(LOOK, system=QWEN % "[{broken}]")).problem == NO_TOOLS


@pytest.mark.parametrize("told", [json.dumps(TOOL), json.dumps([{**TOOL["function"]}]), "[{broken}]"])  # type: ignore[dict-item]
def test_tools_that_a_row_offers_twice_are_told_once_where_they_are_the_same(told: str) -> None:
    row = replace(talk(LOOK, system=QWEN % told), tools=(TOOL,))
    found = read(row)
    assert found.conversation.tools == (TOOL,)
    assert found.changes[CALLS_READ] == 1
    assert (found.conversation.messages[0].role == "system") == (told == "[{broken}]")


def test_a_row_s_own_tools_and_calls_are_left_alone() -> None:
    row = replace(talk(LOOK, system=QWEN % json.dumps(TOOL)), tools=(TOOL | {"strict": True},))
    assert read(row).conversation.messages[0] == row.messages[0]
    structured = replace(row, messages=(row.messages[1], replace(row.messages[2], tool_calls=(CALL,))))
    assert read_hermes(structured) is None


@pytest.mark.parametrize(
    "text", ["<tool_call>{", "<tools>[", "<tool_response>", "<tool_call>{</tool_call>", "# Tools "]
)
def test_text_of_tags_is_read_in_no_time(text: str) -> None:
    many = f"{text * 20_000}<tools>[1]</tools>"
    began = time.process_time()
    read_hermes(Conversation((Message("system", many), Message("user", "?"), Message("assistant", LOOK + many))))
    read_hermes(talk(LOOK, many, "user"))
    assert time.process_time() - began < 2  # many seconds where time grows with the square


def test_reading_twice_reads_no_more() -> None:
    once = read(talk(LOOK, "<tool_response>\nx\n</tool_response>", "user", QWEN % json.dumps(TOOL))).conversation
    assert read_hermes(once) is None
