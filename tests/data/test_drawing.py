"""A share holds out whole prompts and groups, by what stands in them: added or reordered rows move no others."""

import random
from itertools import pairwise

import numpy as np
import pytest

from chatlora.data import drawing
from chatlora.data.drawing import drawn_rows
from chatlora.data.likenesses import Likenesses
from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.likeness import likeness_of

SHARES = {"validation": 0.1, "test": 0.2}
Row = tuple[str, str, str | None]  # prompt, answer, group


def drawn(rows: list[Row], shares: dict[str, float] = SHARES, seed: int = 0) -> dict[Row, str]:
    """Of each row the split that it is drawn for, or train."""
    likenesses = Likenesses.of(
        (likeness_of(Conversation((Message("user", prompt), Message("assistant", answer)), group=group)), "")
        for prompt, answer, group in rows
    )
    found = dict.fromkeys(rows, "train")
    for split, mine in drawn_rows(likenesses, shares, seed, lambda line: None).items():
        for row in np.flatnonzero(mine):
            assert found[rows[row]] in ("train", split)
            found[rows[row]] = split
    return found


def random_rows(number: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    return [(f"prompt {draw.randrange(number // 2)}", f"answer {row}", None) for row in range(number)]


def test_equal_prompts_go_the_same_way_and_shares_are_about_what_they_say() -> None:
    found = drawn(random_rows(4000))
    sides: dict[str, set[str]] = {}
    for (prompt, _, _), split in found.items():
        sides.setdefault(prompt, set()).add(split)
    assert max(map(len, sides.values())) == 1
    parts = [*found.values()]
    assert parts.count("validation") / 4000 == pytest.approx(0.1, abs=0.02)
    assert parts.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    assert drawn(random_rows(4000), seed=1) != found


def test_rows_that_are_added_removed_or_reordered_move_no_others() -> None:
    rows = random_rows(2000)
    found = drawn(rows)
    more = rows + [(f"another {row}", "a", None) for row in range(1500)]
    for others in (more, more[::-1], rows[:700], rows[300:]):
        again = drawn(others)
        assert all(again[row] == split for row, split in found.items() if row in again)


def test_a_draw_by_position_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_sides", lambda rows: np.arange(len(rows), dtype=np.uint64))
    with pytest.raises(AssertionError):
        test_rows_that_are_added_removed_or_reordered_move_no_others()
    with pytest.raises(AssertionError):
        test_equal_prompts_go_the_same_way_and_shares_are_about_what_they_say()


def test_groups_stay_together_over_prompts_that_they_share() -> None:
    draw = random.Random(1)
    rows: list[Row] = [
        (f"prompt {draw.randrange(1500)}", f"{row}", f"g{row // 3}" if row % 4 else None) for row in range(1200)
    ]
    found = drawn(rows)
    for key in (0, 2):
        sides: dict[str | None, set[str]] = {}
        for row, split in found.items():
            sides.setdefault(row[key], set()).add(split)
        sides.pop(None, None)
        assert max(map(len, sides.values())) == 1
    assert set(found.values()) == {"train", "validation", "test"}
    more: list[Row] = [(f"new {row}", "a", rows[row][2]) for row in range(600)]  # of the same groups, other prompts
    again = drawn(rows + more)
    assert all(again[row] == split for row, split in found.items())


@pytest.mark.parametrize("shares", [{"validation": 0.0001, "test": 0.0001}, {"validation": 0.9, "test": 0.0999}])
def test_each_split_has_a_row_and_so_has_the_training(shares: dict[str, float]) -> None:
    for number in (50, 53, 200):
        assert set(drawn(random_rows(number), shares).values()) == {"train", "validation", "test"}


def test_where_all_rows_ask_the_same_none_is_held_out_and_it_is_said() -> None:
    said: list[str] = []
    rows = Likenesses.of(
        (likeness_of(Conversation((Message("user", f"{row % 2}"), Message("assistant", str(row))))), "")
        for row in range(60)
    )
    assert not np.any([*drawn_rows(rows, SHARES, 0, said.append).values()])
    assert said[0] == "data.validation: no rows are held out, since the 60 rows have only 2 prompts"
    assert drawn_rows(rows, {"test": 0.5}, 0, said.append)["test"].sum() == 30


def test_the_order_of_splits_is_that_of_the_pieces() -> None:
    rows = random_rows(3000)
    one, both = drawn(rows, {"validation": 0.1}), drawn(rows, SHARES)
    assert [row for row, split in one.items() if split == "validation"] == [
        row for row, split in both.items() if split == "validation"
    ]
    grown = [
        {row for row, split in drawn(rows, {"validation": share}).items() if split != "train"}
        for share in (0.05, 0.1, 0.3)
    ]
    assert all(small < large for small, large in pairwise(grown))


@pytest.mark.parametrize("system", [(), (Message("system", "Be kind."),)])
def test_rows_that_open_with_the_same_greeting_are_told_apart_by_what_is_asked_then(
    system: tuple[Message, ...],
) -> None:
    opening = (*system, Message("assistant", "How may I help?"))
    rows = [Conversation((*opening, Message("user", f"q{row}"), Message("assistant", "a"))) for row in range(1000)]
    likenesses = Likenesses.of((likeness_of(row), "") for row in rows)
    held = drawn_rows(likenesses, {"validation": 0.1}, 0, lambda line: None)["validation"]
    assert held.mean() == pytest.approx(0.1, abs=0.03)
    assert {len(likeness_of(Conversation(opening)).prompts), len(likeness_of(rows[0]).prompts)} == {1}


def test_a_row_without_a_reply_has_a_prompt_of_its_own() -> None:
    learned = [Message("user", "q"), Message("tool", "seen", loss=True)]
    rows = [Conversation((Message("user", "p"), Message("assistant", "a"))), Conversation(tuple(learned))]
    likenesses = Likenesses.of((likeness_of(row), "") for row in rows)
    assert likenesses.first_prompt.tolist() == [likeness_of(row).prompts[0] for row in rows]
    assert len({*likenesses.last_prompt.tolist()}) == 2


def test_one_prompt_of_many_rows_that_is_held_out_is_told() -> None:
    rows = [("Hi", f"answer {row}", None) for row in range(300)] + random_rows(700)
    said: list[tuple[int, list[str]]] = []
    likenesses = Likenesses.of(
        (likeness_of(Conversation((Message("user", prompt), Message("assistant", answer)))), "")
        for prompt, answer, _ in rows
    )
    for seed in range(60):
        lines: list[str] = []
        held = drawn_rows(likenesses, {"validation": 0.1}, seed, lines.append)["validation"]
        said.append((int(held.sum()), lines))
    assert any(number >= 300 for number, _ in said)
    for number, lines in said:
        assert [f"{number:,} of 1,000 rows are held out, since 300 of them" in line for line in lines] == (
            [True] if number >= 300 else []
        )
