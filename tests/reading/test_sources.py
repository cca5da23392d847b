"""Files, folders, globs, package data and hub sets are found, or the way on is told; rows are read one at a time."""

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from chatlora.config import Source
from chatlora.errors import DataError
from chatlora.reading import sources
from chatlora.reading.noted import Noted
from chatlora.reading.sources import fingerprint, read_conversations, read_rows

GOOD = '{"prompt": "p", "completion": "c"}'


def read(path: Path | str, **settings: Any) -> list[tuple[str, str, str]]:
    """(place, question, answer) of every row."""
    rows = read_conversations(Source(path=str(path), **settings))
    return [(row.place or "", row.messages[0].content, row.messages[1].content) for row in rows]


def problems_of(path: Path | str, **settings: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    return caught.value.problems


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- which files


def test_folders_and_globs_are_read_in_order(here: Path) -> None:
    (here / "rows" / "more").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "more/c.jsonl", ".hidden.jsonl", "README.md"):
        (here / "rows" / name).write_text(GOOD)
    assert [place for place, *_ in read("rows")] == ["rows/a.jsonl:1", "rows/b.jsonl:1", "rows/more/c.jsonl:1"]
    assert [place for place, *_ in read("rows/[ab].jsonl")] == ["rows/a.jsonl:1", "rows/b.jsonl:1"]
    assert [place for place, *_ in read(f"{here}/rows/**/c.jsonl")] == [f"{here}/rows/more/c.jsonl:1"]


def test_names_that_are_no_text_crash_nothing(here: Path) -> None:
    (here / "rows.jsonl").write_text('{"prompt": "p", "completion": "c", "\\ud800": 1}\n')
    noted = Noted()
    list(read_conversations(Source(path="rows.jsonl"), noted=noted))
    assert noted.not_used == {"\\ud800": 1}
    (here / "rows").mkdir()
    Path(os.fsdecode(os.fsencode(here) + b"/rows/caf\xe9.jsonl")).write_text(GOOD)
    assert "a name that is not UTF-8" in problems_of("rows")[0]
    assert "caf\\udce9.jsonl" in problems_of("rows/*.jsonl")[0]


def test_package_data_is_named_independently_of_the_working_directory(here: Path) -> None:
    rows = read("embedded:demo/train.jsonl")
    assert rows[0][0] == "embedded:demo/train.jsonl:1"
    assert len(rows) >= 200
    assert "did you mean 'embedded:demo/train.jsonl'?" in problems_of("embedded:demo/trian.jsonl")[0]
    assert "not in the package" in problems_of("embedded:../errors.py")[0]


def test_paths_that_lead_nowhere_are_told_without_asking_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", no_network)
    (here / "data").mkdir()
    (here / "data" / "train.jsonl").write_text(GOOD)
    (here / "data" / "notes.txt").write_text("")
    assert problems_of("data/trian.jsonl") == (
        f"data/trian.jsonl: no such file or folder under {here}/data; did you mean 'train.jsonl'?",
    )
    for path in ("data/training", "./train", "/nowhere/at/all", "a/b/c", "nowhere/train.jsonl", "train.json.gz"):
        assert "no such file or folder" in problems_of(path)[0]
    assert "no data file is there" in problems_of("data/*.csv")[0]
    assert "not a data file that chatlora reads" in problems_of("data/notes.txt")[0]
    assert "is for folders and hub data sets" in problems_of("data/train.jsonl", split="train")[0]


def test_where_no_hub_can_be_reached_the_ways_on_are_told() -> None:
    code = (
        "from chatlora.config import Source; from chatlora.reading.sources import read_conversations\n"
        "list(read_conversations(Source(path='owner/name')))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert all(way in done.stderr for way in ("DataError", "owner/name", "HF_ENDPOINT", "local file", "built-in demo"))


def test_rows_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": [{"role": "user", "content": "q", "name": None}], "id": 1}]
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, subset: str | None, split: str) -> Dataset:
        asked.append((name, subset, split))
        return Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(sources, "why_unreachable", lambda: None)
    read_back = list(read_rows(Source(path="owner/name:main"), split="test"))
    assert read_back == [({"messages": [{"role": "user", "content": "q"}], "id": 1}, "owner/name:main[test]: row 1")]
    next(read_rows(Source(path="owner/name", split="train[:10]"), split="test"))
    assert asked == [("owner/name", "main", "test"), ("owner/name", None, "train[:10]")]


# ---- the rest


def test_nothing_is_given_out_after_the_first_mistake(here: Path) -> None:
    (here / "t.jsonl").write_text(f"{GOOD}\nnonsense\n{GOOD}\n")
    for read_all in (read_rows, read_conversations):
        given: list[Any] = []
        with pytest.raises(DataError):
            given.extend(read_all(Source(path="t.jsonl")))
        assert len(given) == 1


def test_a_system_prompt_is_given_to_conversations_without_one(here: Path) -> None:
    (here / "t.jsonl").write_text(f'{GOOD}\n{{"messages": [{{"role": "system", "content": "own"}}]}}')
    rows = list(read_conversations(Source(path="t.jsonl"), system="given"))
    assert [[message.content for message in row.messages] for row in rows] == [["given", "p", "c"], ["own"]]


def test_fingerprints_follow_the_contents_alone(here: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (here / name).write_text(GOOD)
    same = fingerprint(Source(path="a.jsonl"))
    assert fingerprint(Source(path="b.jsonl", repeat=3)) == same
    (here / "b.jsonl").write_text(GOOD + " ")
    assert fingerprint(Source(path="b.jsonl")) != same


def test_rows_are_not_held_in_memory(here: Path) -> None:
    (here / "t.jsonl").write_text((json.dumps({"prompt": "x" * 500, "completion": "x" * 500}) + "\n") * 10_000)
    tracemalloc.start()
    count = sum(1 for _ in read_conversations(Source(path="t.jsonl")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 500_000  # the file has 10 MB


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("kdconv_travel.jsonl", 150),
        ("e2e.jsonl", 4672),
        ("glaive_toolcall_en_demo.json", 300),
        ("glaive_toolcall_zh_demo.json", 300),
        ("identity.json", 91),
    ],
)
def test_real_files_are_read_to_the_last_row(shared: Path, name: str, rows: int) -> None:
    path = shared / "data" / name
    conversations = list(read_conversations(Source(path=str(path))))
    assert len(conversations) == rows
    assert len({row.place for row in conversations}) == rows
    text = path.read_text(encoding="utf-8")
    for row in conversations[:: max(1, rows // 50)]:
        assert all(json.dumps(message.content, ensure_ascii=False)[1:-1] in text for message in row.messages)
    last_line = int((conversations[-1].place or "").rpartition(":")[2])
    assert text.splitlines()[last_line - 1].lstrip().startswith("{")
