"""`reader: my_rows.py:read`: a function of the user's own, in the file that the config names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from chatlora.config import Config, Source, with_absolute_paths
from chatlora.errors import ConfigError, DataError
from chatlora.reading.noted import Noted, Unread
from chatlora.reading.own_reader import LEFT_OUT
from chatlora.reading.scan import inputs_of
from chatlora.reading.sources import read_conversations
from chatlora.training.named_files import refuse_missing_files

READ = """
from dataclasses import dataclass

@dataclass
class Turn:
    who: str
    said: str

def read(row):
    if row["lang"] != "en":
        return None
    turns = [Turn(*turn) for turn in row["talk"]]
    return {"messages": [{"role": turn.who, "content": turn.said} for turn in turns], "rated": 3}

def wrong(row):
    return [row]

def broken(row):
    return {"messages": row["nowhere"]}
"""
ROWS = [
    {"lang": "en", "talk": [["user", "Where is Oslo?"], ["assistant", "In Norway."]]},
    {"lang": "de", "talk": [["user", "Wo?"], ["assistant", "Dort."]]},
    {"lang": "en", "talk": [["user", "And Bergen?"], ["assistant", "Too."]]},
]


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Source]:
    (tmp_path / "my_rows.py").write_text(READ)
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return lambda name: Source(path=str(tmp_path / "talks.jsonl"), reader=f"{tmp_path / 'my_rows.py'}:{name}")


def problems_of(source: Source, set_aside: list[Unread] | None = None) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        list(read_conversations(source, set_aside=set_aside))
    return caught.value.problems


def test_a_function_makes_rows_of_a_known_form_and_leaves_others_out(source: Callable[[str], Source]) -> None:
    noted = Noted()
    found = list(read_conversations(source("read"), noted=noted))
    assert [message.content for each in found for message in each.messages] == [
        text for row in (ROWS[0], ROWS[2]) for _, text in row["talk"]
    ]
    assert [str(each.place).rpartition(":")[2] for each in found] == ["1", "3"]
    assert [(row.place.rpartition(":")[2], row.reason) for row in noted.left_out] == [("2", LEFT_OUT)]
    assert noted.not_used == {"rated": 2}


def test_what_goes_wrong_in_it_is_told_with_the_rows_place_and_the_line(source: Callable[[str], Source]) -> None:
    first, *_ = problems_of(source("broken"))
    assert "talks.jsonl:1: the reader raised KeyError: 'nowhere' (" in first
    assert "my_rows.py, line 19)" in first
    assert "talks.jsonl:1: the reader gave a list; it gives one row, a dict such as" in problems_of(source("wrong"))[0]
    set_aside: list[Unread] = []
    assert list(read_conversations(source("broken"), set_aside=set_aside)) == []
    assert len(set_aside) == 3


def test_a_function_or_file_that_is_not_there_is_told(source: Callable[[str], Source], tmp_path: Path) -> None:
    assert "has no function reed; did you mean 'read'?" in problems_of(source("reed"))[0]
    (tmp_path / "my_rows.py").write_text("import nothing_of_that_name\n")
    assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in problems_of(source("read"))[0]
    (tmp_path / "my_rows.py").write_text("def read(row:\n")
    assert "SyntaxError" in problems_of(source("read"))[0]
    assert "my_rows.py, line 1)" in problems_of(source("read"))[0]
    (tmp_path / "my_rows.py").unlink()
    assert "my_rows.py: no such file" in problems_of(source("read"))[0]


def test_another_function_or_file_is_other_data(source: Callable[[str], Source], tmp_path: Path) -> None:
    (before,) = inputs_of([source("read")], "train")
    assert len(list(read_conversations(source("read")))) == 2
    (other,) = inputs_of([source("broken")], "train")
    assert before.identity != other.identity
    (tmp_path / "my_rows.py").write_text(READ.replace('"en"', '"de"'))
    (after,) = inputs_of([source("read")], "train")
    assert before.sha256 != after.sha256
    assert len(list(read_conversations(source("read")))) == 1


def test_a_function_that_is_not_there_is_told_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").touch()
    (tmp_path / "my_rows.py").write_text(READ)
    readers = (f"{tmp_path}/a.py:read", f"{tmp_path}/my_rows.py:reed")
    train = [{"path": str(tmp_path / "talks.jsonl"), "reader": reader} for reader in readers]
    with pytest.raises(ConfigError) as caught:
        refuse_missing_files(Config.model_validate({"data": {"train": train}, "model": {"name_or_path": "owner/name"}}))
    missing, misspelled = caught.value.problems
    assert missing.startswith("data.train: reader: ")
    assert "a.py: no such file" in missing
    assert "did you mean 'read'?" in misspelled


def test_its_file_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_rows.py").touch()
    given = Config.model_validate({"data": {"train": [{"path": "talks.jsonl", "reader": "my_rows.py:read"}]}})
    (source,) = with_absolute_paths(given).data.train
    assert source.reader == f"{tmp_path / 'my_rows.py'}:read"
    with pytest.raises(ValidationError):
        Config.model_validate({"data": {"train": [{"path": "talks.jsonl", "reader": "my_rows"}]}})


LOOSE = """
import sys
import numpy

def ends(row):
    sys.exit(0)

def loose(row):
    row.pop("lang")
    turns = tuple({"role": who, "content": said} for who, said in row.pop("talk"))
    return {"messages": turns, "embedding": numpy.zeros(3)}
"""


def test_a_reader_can_neither_end_the_run_nor_take_a_group_away(
    source: Callable[[str], Source], tmp_path: Path
) -> None:
    (tmp_path / "my_rows.py").write_text(LOOSE)
    assert "the reader raised SystemExit: 0" in problems_of(source("ends"))[0]
    noted = Noted()
    rows = list(read_conversations(source("loose").model_copy(update={"group_by": "lang"}), noted=noted))
    assert [row.group for row in rows] == ['"en"', '"de"', '"en"']
    assert noted.not_used == {"embedding": 3}


def test_a_group_that_is_null_is_not_taken_for_a_slip(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c", "id": null}\n')
    with pytest.raises(DataError, match="id, which group_by names, is missing or null; the row has prompt"):
        list(read_conversations(Source(path=str(tmp_path / "a.jsonl"), group_by="id")))
