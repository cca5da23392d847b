"""Duplicates, contradictions and leaks that were planted are found, all and nothing else; what is told is obeyed."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatlora.config import DataConfig
from chatlora.data import leaks
from chatlora.data.alike import alike_lines
from chatlora.data.dataset import PreparedData, prepare_training_data
from chatlora.data.leaks import Alike, find_alike
from chatlora.data.ledger import LEAKS
from chatlora.data.likenesses import Likenesses, sketches_of
from chatlora.errors import DataError
from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.likeness import likeness_of
from chatlora.rendering.renderer import Renderer
from tests.tiny_tokenizers import tiny_tokenizer

Pair = tuple[str, str]
PLANTED = 10
PLAIN = Renderer(tiny_tokenizer())


def likenesses(rows: list[Pair], name: str) -> Likenesses:
    return Likenesses.of(
        (likeness_of(Conversation((Message("user", prompt), Message("assistant", answer)))), f"{name}:{number}")
        for number, (prompt, answer) in enumerate(rows)
    )


def grams(row: Pair) -> set[str]:
    text = " ".join(" ".join(row).split()).casefold()
    return {text[at : at + 5] for at in range(max(1, len(text) - 4))}


def real_rows(folder: Path) -> Iterator[Pair]:
    """Prompts and replies, English and Chinese."""
    for line in (folder / "kdconv_travel.jsonl").read_text(encoding="utf-8").splitlines():
        turns = [turn["content"] for turn in json.loads(line)["conversations"]]
        yield from zip(turns[::2], turns[1::2], strict=False)
        yield from zip(turns[1::2], turns[2::2], strict=False)
    for row in json.loads((folder / "identity.json").read_text(encoding="utf-8")):
        yield row["instruction"], row["output"]
    for line in (folder / "e2e.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["prompt"], json.loads(line)["completion"]


@pytest.fixture(scope="module")
def clean(shared: Path) -> list[Pair]:
    """2,000 real rows, no two of which share a prompt or, counted exactly, 0.65 of their five-grams."""
    kept: list[Pair] = []
    prompts: set[str] = set()
    holders: dict[str, list[int]] = {}
    sizes: list[int] = []
    for row in real_rows(shared / "data"):
        own, prompt = grams(row), " ".join(row[0].split())
        common = Counter(holder for gram in own for holder in holders.get(gram, ())) if prompt not in prompts else None
        prompts.add(prompt)
        if common is None or any(
            same > 0.65 * (len(own) + sizes[holder] - same) for holder, same in common.most_common(20)
        ):
            continue
        for gram in own:
            holders.setdefault(gram, []).append(len(kept))
        kept.append(row)
        sizes.append(len(own))
    return random.Random(0).sample(kept, 2000)


def nearly(row: Pair) -> Pair:
    """The row with a letter changed here and there, its prompt too; 0.9 of all five-grams are in both."""
    text = list(row[0] + "\0" + row[1])
    draw = random.Random(str(row))
    while True:
        place = draw.randrange(len(text))
        before = list(text)
        text[place] = "\0" if text[place] == "\0" else "变" if text[place] != "变" else "改"
        other = tuple("".join(text).split("\0"))
        assert len(other) == 2
        own, theirs = grams(row), grams(other)
        if len(own & theirs) < 0.9 * len(own | theirs):
            text = before
            break
    prompt, answer = "".join(text).split("\0")
    return (prompt if prompt != row[0] else "改" + prompt[1:], answer)


def found_in(train: list[Pair], **held_out: list[Pair]) -> Alike:
    sets = {name: likenesses(rows, name) for name, rows in held_out.items()}
    return find_alike(likenesses(train, "train"), sets, [("validation", "test")] if "test" in sets else [])


def test_clean_rows_raise_no_alarm(clean: list[Pair]) -> None:
    told = found_in(clean[:1600], validation=clean[1600:1800], test=clean[1800:]).told()
    none: dict[str, Any] = {"rows": 0, "examples": []}
    assert told == {
        "duplicates": none,
        "near_duplicates": none,
        "contradictions": {"prompts": 0, "rows": 0, "examples": []},
        "leaks": {},
        "overlaps": {},
    }


@pytest.fixture(scope="module")
def planted(clean: list[Pair]) -> tuple[dict[str, list[Pair]], dict[str, set[int]]]:
    """The clean rows with ten of each kind among them, and where they stand."""
    draw = random.Random(3)
    long = [row for row in clean if len(row[0]) + len(row[1]) > 60]
    picked = iter(draw.sample(long, 7 * PLANTED))
    take: Callable[[], list[Pair]] = lambda: [next(picked) for _ in range(PLANTED)]  # noqa: E731
    sources = {
        name: take() for name in ("duplicate", "near", "contradiction", "leak", "near leak", "test leak", "both")
    }
    held = {row for name in ("leak", "near leak", "test leak", "both") for row in sources[name]}
    train = [row for row in clean if row not in held][:1500]
    train += [row for name in ("duplicate", "near", "contradiction") for row in sources[name] if row not in train]
    added = {
        "duplicate": [(f" {prompt}\n", answer.replace(" ", "  ")) for prompt, answer in sources["duplicate"]],
        "near": [nearly(row) for row in sources["near"]],
        "contradiction": [(prompt, f"不对，{answer[::-1]}") for prompt, answer in sources["contradiction"]],
        "leak": [(prompt, answer[::-1]) for prompt, answer in sources["leak"]],
        "near leak": [nearly(row) for row in sources["near leak"]],
        "test leak": sources["test leak"],
    }
    where: dict[str, set[int]] = {}
    rows = [(name, row) for name, each in added.items() for row in each]
    train = [*train[:1000], *(row for _, row in rows), *train[1000:]]
    for place, (name, _) in enumerate(rows, start=1000):
        where.setdefault(name, set()).add(place)
    rest = [row for row in clean if row not in held and row not in train]
    sets = {
        "train": train,
        "validation": [*rest[:100], *sources["leak"], *sources["near leak"], *sources["both"]],
        "test": [*sources["both"], *sources["test leak"], *rest[100:200]],
    }
    return sets, where


def test_what_was_planted_is_found_and_nothing_else(
    planted: tuple[dict[str, list[Pair]], dict[str, set[int]]],
) -> None:
    sets, where = planted
    found = found_in(**sets)
    assert found.duplicates["rows"] == found.near_duplicates["rows"] == PLANTED
    assert found.contradictions["prompts"] == PLANTED
    assert found.contradictions["rows"] == 2 * PLANTED
    for kind, told in (("duplicate", found.duplicates), ("near", found.near_duplicates)):
        pairs = [[int(place.rpartition(":")[2]) for place in pair] for pair in told["examples"]]
        assert all(later > earlier for later, earlier in pairs)
        assert len(where[kind] & {row for pair in pairs for row in pair}) == PLANTED
    assert {row for row, _ in found.leaking} == where["leak"] | where["near leak"] | where["test leak"]
    validation, test = found.leaks["validation"], found.leaks["test"]
    assert (validation["rows"], validation["near"], validation["training_rows"]) == (PLANTED, PLANTED, 2 * PLANTED)
    assert (test["rows"], test["near"], test["training_rows"]) == (PLANTED, 0, PLANTED)
    assert found.overlaps["validation and test"]["rows"] == PLANTED


def test_without_one_of_its_steps_the_search_misses_some(
    planted: tuple[dict[str, list[Pair]], dict[str, set[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "SIMILAR", 0.999)
    with pytest.raises(AssertionError):
        test_what_was_planted_is_found_and_nothing_else(planted)


def test_a_prompt_is_shared_at_any_turn() -> None:
    """Rows that were made by cutting one conversation after each of its turns."""
    turns = [Message(role, f"{role} {turn}") for turn in range(3) for role in ("user", "assistant")]

    def cut_after(turn: int) -> Likenesses:
        return Likenesses.of([(likeness_of(Conversation(tuple(turns[: 2 * turn]))), f"{turn}")])

    for here, there in ((1, 3), (3, 1), (2, 3)):
        (told,) = find_alike(cut_after(here), {"validation": cut_after(there)}, []).leaks.values()
        assert (told["rows"], told["examples"]) == (1, [[str(there), str(here)]])


def test_other_tools_and_other_systems_make_other_prompts_but_the_given_system_makes_none() -> None:
    user, reply = Message("user", "q"), Message("assistant", "a", reasoning="hm")
    plain = likeness_of(Conversation((user, reply)))
    system = (Message("system", "be  brief"), user, reply)
    assert likeness_of(Conversation((user, reply), tools=({"name": "f"},))).prompts != plain.prompts
    assert likeness_of(Conversation(system)).prompts != plain.prompts
    assert likeness_of(Conversation(system), "be  brief") == plain
    other_thought = likeness_of(Conversation((user, Message("assistant", "a"))))
    assert (other_thought.answer, other_thought.prompts) == (plain.answer, plain.prompts)
    assert other_thought.whole != plain.whole


def test_rows_that_are_all_alike_cost_no_more_than_others() -> None:
    text = " ".join(f"word{number}" for number in range(200))
    rows = [(f"{text}{number}", "yes") for number in range(3000)]
    sketches = sketches_of([likenesses(rows, "t")])
    pairs = leaks._neighbours(np.zeros(len(rows), np.uint64))
    assert len(pairs) <= (2 + leaks.NEIGHBOURS) * len(rows)
    found = leaks._near_pairs(sketches, np.zeros(len(rows), np.int64))
    assert len(found) <= (leaks.ENOUGH + 2 + leaks.NEIGHBOURS) * len(rows)
    assert found_in(rows).near_duplicates["rows"] == len(rows) - 1


# ---- in a run


def write(path: Path, rows: list[Pair], **columns: Any) -> str:
    path.write_text(
        "".join(
            json.dumps(
                {"prompt": prompt, "completion": answer, **{name: value(number) for name, value in columns.items()}}
            )
            + "\n"
            for number, (prompt, answer) in enumerate(rows)
        )
    )
    return str(path)


def prepare(folder: Path, **data: Any) -> PreparedData:
    return prepare_training_data(DataConfig(**data), 0, lambda _: PLAIN, cache=folder / "cache", say=lambda line: None)


@pytest.fixture
def leaking(tmp_path: Path, clean: list[Pair]) -> dict[str, Any]:
    """Training rows 1 to 3 leak into validation, row 4 into test."""
    rows = clean[1000:1100]
    return {
        "train": write(tmp_path / "t.jsonl", rows),
        "validation": write(tmp_path / "v.jsonl", [*rows[:2], (rows[2][0], "other"), *clean[1100:1110]]),
        "test": write(tmp_path / "test.jsonl", [*clean[1110:1120], rows[3]]),
    }


def test_by_default_leaks_are_told_and_trained_on(tmp_path: Path, leaking: dict[str, Any]) -> None:
    data = prepare(tmp_path, **leaking)
    train, validation, test = leaking.values()
    assert data.train.num_rows == 100
    assert alike_lines(data.ledger["alike"]) == [
        "WARNING: validation shares with the training rows: the prompts of 3 rows "
        f"(e.g. {validation}:1 and {train}:1); data.on_leak: drop leaves 3 training rows out",
        "WARNING: test shares with the training rows: the prompt of 1 row "
        f"(e.g. {test}:11 and {train}:4); data.on_leak: drop leaves 1 training row out",
    ]
    again = prepare(tmp_path, **leaking)
    assert (again.ledger, again.fingerprint) == (data.ledger, data.fingerprint)


def test_drop_leaves_the_training_rows_out_and_the_held_out_rows_whole(tmp_path: Path, leaking: dict[str, Any]) -> None:
    plain, data = prepare(tmp_path, **leaking), prepare(tmp_path, **leaking, on_leak="drop")
    train, validation, test = leaking.values()
    assert set(data.train.places(range(len(data.train)))) == {f"{train}:{line}" for line in range(5, 101)}
    assert data.validation["validation"].num_rows == 13
    source = data.ledger["sources"][0]
    assert source["rows_used"] == 96
    assert source["set_aside"] == [
        {"place": f"{train}:{line}", "reason": LEAKS, "detail": place}
        for line, place in enumerate([f"{validation}:1", f"{validation}:2", f"{validation}:3", f"{test}:11"], start=1)
    ]
    assert data.fingerprint != plain.fingerprint


def test_error_stops_with_the_leaks(tmp_path: Path, leaking: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, **leaking, on_leak="error")
    assert [problem.split(":")[1] for problem in caught.value.problems] == [
        " validation shares with the training rows",
        " test shares with the training rows",
    ]


def test_dropping_all_rows_is_an_error(tmp_path: Path, clean: list[Pair]) -> None:
    path, same = write(tmp_path / "t.jsonl", clean[:60]), write(tmp_path / "v.jsonl", clean[:60])
    with pytest.raises(DataError, match=r"all 60 rows were set aside: 60 x the row leaks into held-out rows"):
        prepare(tmp_path, train=path, validation=same, on_leak="drop")


def test_a_share_of_real_rows_shares_no_prompt_with_the_training(tmp_path: Path, shared: Path) -> None:
    lines = (shared / "data" / "e2e.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "e2e.jsonl").write_text("".join(random.Random(0).sample(lines, 1000)), encoding="utf-8")
    data = prepare(tmp_path, train=str(tmp_path / "e2e.jsonl"), validation=0.1, test=0.1)
    alike = data.ledger["alike"]
    assert [told["rows"] for told in alike["leaks"].values()] in ([0, 0], [0], [])
    assert alike["contradictions"]["prompts"] > 200  # its prompts have several references each
    assert data.held_out["validation"].num_rows > 50


def test_groups_of_a_column_are_held_out_whole(tmp_path: Path, clean: list[Pair]) -> None:
    path = write(tmp_path / "t.jsonl", clean[:300], conversation_id=lambda number: number // 5)
    source = {"path": path, "group_by": "conversation_id"}
    data = prepare(tmp_path, train=[source], validation=0.2)
    held_out = {
        (int(place.rpartition(":")[2]) - 1) // 5
        for place in data.validation["validation"].places(range(len(data.validation["validation"])))
    }
    trained = {(int(place.rpartition(":")[2]) - 1) // 5 for place in data.train.places(range(len(data.train)))}
    assert len(held_out) > 3
    assert not held_out & trained
    ungrouped = prepare(tmp_path, train=path, validation=0.2)
    assert len(ungrouped.validation["validation"]) != len(held_out) * 5
    with pytest.raises(DataError, match=r"which group_by names, is missing.*'conversation_id'"):
        prepare(tmp_path, train=[{"path": path, "group_by": "conversation"}])
