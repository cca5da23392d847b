"""Columns of a row: which speak against training on it, and in how many ways it could be read."""

from typing import Any, get_args

import pytest

from chatlora.config import RowFormat
from chatlora.errors import DataError
from chatlora.reading.formats import parse_row, read_row
from chatlora.reading.forms import FORMS

PAIR = {"prompt": "q", "completion": "a"}


def problem(row: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_row(row, **settings)
    return "; ".join(caught.value.problems)


def test_every_form_can_be_stated() -> None:
    assert set(get_args(RowFormat)) == {"auto", *FORMS}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("label", value) for value in (False, 0, "false", "False")),
        *(("kto_tag", value) for value in (True, False)),
        *((name, "x") for name in ("chosen", "rejected", "rejected_response")),
        *((name, ["x.png"]) for name in ("images", "videos", "audios")),
        ("image", "x.png"),
    ],
)
def test_what_speaks_against_training_is_refused_until_it_is_ignored(column: str, value: Any) -> None:
    row = {**PAIR, column: value}
    assert column in problem(row)
    assert f"ignore: [{column}]" in problem(row) or column == "chosen"
    assert read_row(row, ignore=[column]).not_used == set()


@pytest.mark.parametrize(
    ("column", "value"), [("label", True), ("label", 1), ("label", "news"), ("images", []), ("rejected", None)]
)
def test_what_says_nothing_against_it_is_read(column: str, value: Any) -> None:
    assert len(parse_row({**PAIR, column: value}).messages) == 2


def test_a_column_that_is_named_is_what_it_is_named() -> None:
    row = {"text": "q", "label": "false"}
    assert parse_row(row, columns={"prompt": "text", "completion": "label"}).messages[1].content == "false"


def test_columns_given_for_some_leave_the_others_known() -> None:
    row = {"instruction": "q", "context": "c", "response": "a"}
    read = parse_row(row, columns={"output": "response", "input": "context"})
    assert [message.content for message in read.messages] == ["q\nc", "a"]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "response": "b"},
        {"question": "q", "query": "r", "answer": "a"},
        {"instruction": "i", "question": "q", "answer": "a"},
        {"instruction": "i", "input": "x", "context": "c", "response": "a"},
    ],
)
def test_a_row_that_reads_in_several_ways_is_not_guessed_at(row: dict[str, str]) -> None:
    told = problem(row)
    assert "can be read in several ways; say which: columns: {" in told
    assert all(name in told for name in row)


def test_system_columns_that_contradict_are_told() -> None:
    row = {**PAIR, "system": "a", "system_prompt": "b"}
    assert "system and system_prompt say different things; ignore: [system_prompt] keeps the first" in problem(row)
    assert parse_row(row, ignore=["system_prompt"]).messages[0].content == "a"
    assert parse_row({**row, "system_prompt": "a"}).messages[0].content == "a"


def test_thoughts_of_two_places_must_be_the_same() -> None:
    row = {"prompt": "q", "completion": "<think>hm</think>a", "reasoning": "hm"}
    assert parse_row(row).messages[1].reasoning == "hm"
    assert "tell different thoughts" in problem({**row, "reasoning": "well"})


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [([1], "chat_template_kwargs is a list"), ({"tools": []}, "chat_template_kwargs.tools is given")],
)
def test_arguments_of_the_template_are_an_object_of_its_own_names(kwargs: Any, said: str) -> None:
    assert said in problem({**PAIR, "chat_template_kwargs": kwargs})
    assert parse_row({**PAIR, "chat_template_kwargs": '{"enable_thinking": true}'}).template_kwargs == {
        "enable_thinking": True
    }


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"question": "q", "options": ["a", "b"], "answer": "b"}, "options"),
        ({"question": "q", "article": "long", "choices": {"label": ["A"]}, "answer": "A"}, "article, choices"),
        ({"prompt": "p", "completion": "c", "context": "known"}, "context"),
        ({"instruction": "p", "output": "c", "context": "known"}, "context"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "document": "d"},
            "document",
        ),
        ({"conversation": [{"system": "s", "human": "q", "assistant": "a"}]}, "system"),
        ({"data": [{"instruction": "i", "input": "n", "output": "a"}]}, "instruction"),
    ],
)
def test_what_a_question_may_need_is_never_left_unread_unsaid(row: dict[str, Any], left: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(row)
    assert f"{left} beside" in str(caught.value)
    assert f"ignore: [{left}]" in str(caught.value)
    assert parse_row(row, ignore=left.split(", ")).messages[-1].role == "assistant"


def test_what_stands_in_a_message_already_or_is_named_is_no_question_left() -> None:
    asked = "Known: long. q A) a B) b"
    row = {"question": asked, "context": "long", "options": {"A": "a", "B": "b"}, "passage": None, "answer": "B"}
    with pytest.raises(DataError, match="several ways"):
        parse_row(row)
    alone = {name: value for name, value in row.items() if name != "context"}
    assert parse_row(alone).messages[0].content == asked
    mapped = parse_row(row | {"story": "s"}, columns={"prompt": "question", "completion": "answer"})
    assert mapped.messages[0].content == asked


@pytest.mark.parametrize(
    ("row", "way"),
    [
        ({"id": "1", "context": "c", "question": "q", "answers": {"text": ["a"]}}, "a function of yours"),  # SQuAD
        ({"question": "q", "context": {"contexts": ["c"]}, "long_answer": "a"}, "a function of yours"),  # PubMedQA
        (
            {"ask_question": "q?", "context": "c", "my_answer": "a"},
            "columns: {instruction: ask_question, input: context, output: my_answer}",
        ),
        ({"article": "long", "highlights": "short"}, "columns: {prompt: article, completion: highlights}"),
    ],
)
def test_no_way_on_is_printed_that_would_lose_what_the_question_needs(row: dict[str, Any], way: str) -> None:
    with pytest.raises(DataError, match="no known form") as caught:
        parse_row(row)
    assert way in str(caught.value)
