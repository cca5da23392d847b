"""What a message says of whether it is learned: flags of every dialect, and what may be one."""

from typing import Any

import pytest

from chatlora.errors import DataError
from chatlora.reading.flags import FLAGS, NO_FLAGS
from chatlora.reading.formats import parse_row, read_row

USER = {"role": "user", "content": "q"}


def reply(**flags: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **flags}


def losses(*turns: dict[str, Any], **settings: Any) -> list[bool | None]:
    return [message.loss for message in parse_row({"messages": list(turns)}, **settings).messages]


def problem(*turns: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        parse_row({"messages": list(turns)})
    (told,) = caught.value.problems
    return told


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), (1.0, 0.0)])
def test_a_flag_is_true_or_false_in_any_of_their_forms(flag: str, yes: Any, no: Any) -> None:
    learned, not_learned = (yes, no) if FLAGS[flag] else (no, yes)
    assert losses(USER, reply(**{flag: learned}), USER, reply(**{flag: not_learned}), reply(**{flag: None})) == [
        *(None, True, None, False, None)
    ]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", [0.5, 2, -1, "no", [], float("nan")])
def test_anything_else_is_refused(flag: str, value: Any) -> None:
    assert problem(USER, reply(**{flag: value})).startswith(f"messages[1].{flag} is ")


def test_mask_means_what_the_turns_of_the_user_say_of_it() -> None:
    for hidden in (True, False):
        masked = {**USER, "mask": hidden}
        assert losses(masked, reply(mask=hidden), masked, reply(mask=not hidden)) == [False, False, False, True]
    sharegpt = [{"from": "human", "value": "q", "mask": 0}, {"from": "gpt", "value": "a", "mask": 0}]
    assert [message.loss for message in parse_row({"conversations": sharegpt}).messages] == [False, False]


def test_mask_on_replies_alone_or_both_ways_on_users_is_refused_until_it_is_named() -> None:
    assert "in both senses" in problem(USER, reply(mask=True))
    assert "in both senses" in problem({**USER, "mask": 1}, reply(mask=1), {**USER, "mask": 0}, reply(mask=1))
    assert losses(USER, reply(mask=True), columns={"loss": "mask"}) == [None, True]
    assert losses(USER, reply(mask=True), columns={"masked": "mask"}) == [None, False]


@pytest.mark.parametrize("value", [True, False, 0, 1, 0.25])
def test_a_number_or_boolean_that_nothing_reads_is_an_error_that_names_it(value: Any) -> None:
    told = problem(USER, reply(keep=value))
    assert told.startswith("messages[1].keep is ")
    assert "columns: {loss: keep}" in told
    turns = [USER, reply(keep=value)]
    assert parse_row({"messages": turns}, ignore=["keep"]).messages[1].loss is None
    assert read_row({"messages": turns}, ignore=["keep"]).not_used == set()


def test_ids_times_and_positions_are_no_flags_and_are_listed() -> None:
    turns = [USER, reply(**dict.fromkeys(NO_FLAGS, 1), mood="glad")]
    assert read_row({"messages": turns}).not_used == {*NO_FLAGS, "mood"}


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_flag_that_asks_to_learn_context_is_refused_by_its_name(role: str) -> None:
    turns: list[dict[str, Any]] = [{"role": role, "content": "c", "train": True}, USER, reply(train=True)]
    assert "messages[0].train says that a turn of the " + role in problem(*turns)
    assert "ignore: [train]" in problem(*turns)
    assert "masked says" in problem({**USER, "masked": False}, reply())
    assert losses({**USER, "train": None, "weight": 0}, reply(train=True)) == [False, True]
    chatglm3 = read_row({"conversations": [{**USER, "loss": True}, reply()]})  # the original did not hear it
    assert chatglm3.not_used == {"loss: true on a turn of the system or the user"}


def test_what_is_learned_of_a_part_of_a_message_is_refused() -> None:
    spans = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    assert "ignore: [train_detail]" in problem(USER, reply(train_detail=spans))
    assert "content[0].train is false" in problem(USER, reply(content=[{"type": "text", "text": "a", "train": False}]))
    assert losses(USER, reply(content=[{"type": "text", "text": "a", "index": 0}])) == [None, None]


@pytest.mark.parametrize(
    ("column", "value"),
    [("loss_mask", [0, 1]), ("mask", [False, True]), ("weight", 0.5), ("train", False), ("weights", [1.0, 0.0])],
)
def test_a_mask_beside_the_messages_is_refused_until_it_is_ignored(column: str, value: Any) -> None:
    row = {"messages": [USER, reply()], column: value}
    with pytest.raises(DataError, match=rf"{column} is .* ignore: \[{column}\]"):
        parse_row(row)
    assert len(parse_row(row, ignore=[column]).messages) == 2
    assert read_row({"messages": [USER, reply()], "weight": 1.0, "mask": "a word"}).not_used == {"weight", "mask"}
