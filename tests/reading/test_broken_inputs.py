"""Each broken file and row, given to train.py: told with its place, reason and remedy, exit status 2, no traceback.

Run: pytest tests/reading/test_broken_inputs.py
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from chatlora.config import Source
from chatlora.errors import SHOWN, DataError, run_as_script
from chatlora.reading.noted import Unread
from chatlora.reading.sources import read_conversations
from tests.broken_inputs import EVERY, GOOD, LINES, RENDERED, ROWS, STRICT_TEMPLATE, Broken

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """train.py on `t.jsonl` and the like, in this process: its exit status, and what it says on standard error.

    The folder in which it runs is taken out of what is said.
    """
    monkeypatch.setenv("CHATLORA_CACHE", str(world / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strict.jinja").write_text(STRICT_TEMPLATE)

    def run(file: str, *flags: str) -> tuple[int, str]:
        command = ["train.py", str(world / "my.yaml"), "--run.output_dir", "run", "--data.train", file, *flags]
        monkeypatch.setattr(sys, "argv", command)
        try:
            run_as_script(train.main)
        except SystemExit as left:
            return int(left.code or 0), here(capsys.readouterr().err)
        return 0, here(capsys.readouterr().err)

    return run


def here(text: str) -> str:
    return text.replace(f"{Path.cwd()}/", "")


def places(account: dict[str, Any]) -> list[str]:
    return [here(entry["place"]) for entry in account["set_aside"]]


def test_there_are_at_least_sixty_each_under_a_name_of_its_own() -> None:
    assert len(EVERY) == len({broken.name for broken in EVERY}) >= 60


@pytest.mark.parametrize("broken", EVERY, ids=lambda broken: broken.name)
def test_broken_input_ends_with_status_2_and_its_place_reason_and_remedy(train_on: Train, broken: Broken) -> None:
    Path(broken.file).write_bytes(broken.content)
    status, told = train_on(broken.file, *broken.flags)
    assert status == 2, told
    assert "Traceback" not in told
    sentences = [line.strip() for line in told.splitlines() if broken.said in line]
    place = broken.place.format(broken.file)
    assert any(place in sentence and broken.remedy in sentence for sentence in sentences), told
    if not broken.readable:
        assert any(sentence.startswith(place) for sentence in sentences), told
    assert json.loads(Path("run/status.json").read_text())["state"] == "failed"
    assert not Path("run/adapter").exists()


@pytest.mark.parametrize("name", ["empty", ".hidden"])
def test_a_folder_without_data(train_on: Train, name: str) -> None:
    Path("data").mkdir()
    if name != "empty":
        Path("data/.hidden.jsonl").write_text(GOOD)
    status, told = train_on("data")
    assert status == 2
    assert "data: no data file is there; files are known by their endings: .jsonl" in told


def test_another_kind_of_file(train_on: Train) -> None:
    Path("t.txt").write_text("rows")
    status, told = train_on("t.txt")
    assert status == 2
    assert "data.train: t.txt: not a data file that chatlora reads; the endings are .jsonl" in told


def test_the_way_on_without_bad_rows_is_told_last_where_other_rows_are_good(train_on: Train) -> None:
    way_on = "To train without such rows: --data.on_bad_row set_aside"
    Path("t.jsonl").write_text(f"{GOOD}\n" + '{"messages": 5}\n' * 50 + '{"prompt": 1}\n' * 50)
    status, told = train_on("t.jsonl")
    assert status == 2
    assert told.splitlines()[-1].startswith(way_on)
    Path("t.jsonl").write_text('{"messages": 5}\n' * 2)  # nothing would be left
    assert way_on not in train_on("t.jsonl")[1]


def test_all_of_a_file_are_told_at_once_the_first_twenty_and_how_many(train_on: Train) -> None:
    lines = [
        line for broken in LINES + ROWS[:20] for line in broken.content.splitlines()[1:2] if 0 < len(line) < 10_000
    ]
    Path("t.jsonl").write_bytes(b"\n".join([GOOD.encode(), *lines, GOOD.encode()]))
    status, told = train_on("t.jsonl")
    assert status == 2
    told_lines = [line.strip() for line in told.splitlines() if line.strip().startswith("t.jsonl:")]
    assert len(told_lines) == SHOWN
    assert told_lines[0].startswith("t.jsonl:2: ")
    assert f"... and {len(lines) - SHOWN} more of {len(lines)}" in told


# ---- set aside instead


def lines_that_can_be_set_aside() -> list[bytes]:
    """The one broken line of each file of JSON Lines that has one."""
    single = [broken for broken in LINES + ROWS if broken.place == "{}:2" and not broken.flags]
    return [broken.content.splitlines()[1] for broken in single if len(broken.content.splitlines()) == 2]


def test_rows_that_cannot_be_read_are_set_aside_by_name_and_the_rest_is_trained_on(train_on: Train) -> None:
    broken = lines_that_can_be_set_aside()
    assert len(broken) > 40
    rows = [
        json.dumps({"prompt": f"Where is number {number}?", "completion": "There."}).encode() for number in range(60)
    ]
    mixed = [line for pair in zip(rows, [*broken, *[b""] * 60], strict=False) for line in pair if line]
    Path("t.jsonl").write_bytes(b"\n".join(mixed))
    flags = ("--data.on_bad_row", "set_aside", "--optim.max_steps", "1", "--data.validation", "0")
    status, told = train_on("t.jsonl", *flags)
    assert status == 0, told
    (account,) = json.loads(Path("run/ledger.json").read_text())["sources"]
    assert account["rows_read"] == len(mixed) == account["rows_used"] + len(account["set_aside"])
    assert account["rows_used"] == 60
    assert places(account) == [f"t.jsonl:{number}" for number, line in enumerate(mixed, start=1) if line in broken]
    assert {entry["reason"].split(":")[0] for entry in account["set_aside"]} == {"the row cannot be read"}
    assert any("did you mean 'assistant'?" in entry["detail"] for entry in account["set_aside"])


def test_rows_that_cannot_be_rendered_are_set_aside_by_name_among_good_ones(train_on: Train) -> None:
    bad = [broken.content for broken in RENDERED if broken.readable and "--model.chat_template" not in broken.flags]
    rows = [GOOD.encode()] * 20
    Path("t.jsonl").write_bytes(b"\n".join([*bad, *rows]))
    status, told = train_on("t.jsonl", "--optim.max_steps", "1", "--data.reasoning", "field")
    assert status == 0, told
    (account,) = json.loads(Path("run/ledger.json").read_text())["sources"]
    assert places(account) == [f"t.jsonl:{n + 1}" for n in range(len(bad))]
    assert len({entry["reason"] for entry in account["set_aside"]}) >= 5
    assert account["rows_read"] == 20 + len(bad) == account["rows_used"] + len(account["set_aside"])


def test_most_rows_set_aside_is_a_mistake_all_the_same(train_on: Train) -> None:
    Path("t.jsonl").write_text("\n".join([GOOD, "{", "{"]))
    status, told = train_on("t.jsonl", "--data.on_bad_row", "set_aside")
    assert status == 2
    assert "t.jsonl: 2 of 3 rows were set aside: 2 x the row cannot be read (e.g. t.jsonl:2" in told
    assert "data.on_bad_row: error tells all that is wrong" in told


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("t.json", f"[{GOOD}, {{'a': 1}}, {GOOD}]".encode()),
        ("t.csv", b'prompt,completion\np,c\np,"c\np,c\n'),
        ("t.csv", b"prompt,completion\np,c\n\xff,c\np,c\n"),
        ("t.jsonl", b""),
        ("t.parquet", b"PAR1 broken"),
    ],
)
def test_where_nothing_behind_it_can_be_read_no_row_is_set_aside(tmp_path: Path, file: str, content: bytes) -> None:
    """Or rows would be lost without being counted."""
    (tmp_path / file).write_bytes(content)
    unread: list[Unread] = []
    with pytest.raises(DataError):
        list(read_conversations(Source(path=str(tmp_path / file)), set_aside=unread))
    assert not unread
