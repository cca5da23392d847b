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


def test_a_flag_that_asks_to_learn_a_user_is_listed_as_not_used() -> None:
    assert read_row({"messages": [{**USER, "train": True}, reply(train=True)]}).not_used == {
        "loss: true on a turn of the user"
    }
