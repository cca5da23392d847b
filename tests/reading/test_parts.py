"""Folders, hub snapshots and saved data sets are read by part, and what is left is told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, SplitDict, SplitInfo

from chatlora.config import Source
from chatlora.data.evaluation_set import prepare_evaluation_data
from chatlora.data.held_out import held_out_rows, read_held_out
from chatlora.data.ledger import summary_lines
from chatlora.errors import DataError
from chatlora.reading.parts import part_of
from chatlora.reading.scan import inputs_of
from chatlora.reading.sources import read_conversations
from chatlora.rendering.renderer import Renderer
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(name: str) -> list[dict[str, str]]:
    """Two rows that name the file which they stand in."""
    return [{"prompt": "p", "completion": f"{name} {number}"} for number in range(2)]


def write(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows_of(name)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))


def read(path: str, use: str = "train", split: str | None = None) -> list[str]:
    """The files that the rows of a source come from."""
    rows = read_conversations(Source(path=path, split=split), split=use)
    answers = [row.messages[1].content.removeprefix(f"{path}/") for row in rows]
    return [answer.removesuffix(" 0") for answer in answers if answer.endswith(" 0")]


def problem_of(path: str, use: str = "train", split: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(path, use, split)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("train.jsonl", "train"),
        ("Training.jsonl.gz", "train"),
        ("train2.jsonl", "train"),
        ("sharegpt-train.json", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/train-00000-of-00001-a1b2c3d4.parquet", "train"),
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("valid.jsonl", "validation"),
        ("dev.csv", "validation"),
        ("val/a.jsonl", "validation"),
        ("en/validation/a.jsonl", "validation"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("eval.jsonl", "test"),
        ("my.test.jsonl.gz", "test"),
        ("test/train.jsonl", "test"),
        ("a.jsonl", None),
        ("trainer.jsonl", None),
        ("alpaca_test_2k.jsonl", "test"),
        ("testset.jsonl", "test"),
        ("corpus-00000-of-00002.parquet", None),
    ],
)
def test_names_say_which_part_a_file_is(path: str, part: str | None) -> None:
    assert part_of(Path(path)) == part


PARTED = {
    "files": ("train.jsonl", "valid.jsonl", "test.jsonl"),
    "folders": ("train/a.jsonl", "dev/a.jsonl", "eval/a.jsonl"),
    "snapshot": tuple(f"data/{part}-00000-of-00001.parquet" for part in ("train", "validation", "test")),
}


@pytest.mark.parametrize("form", PARTED)
def test_each_use_reads_its_part_and_split_chooses_another(here: Path, form: str) -> None:
    train, validation, test = PARTED[form]
    write(*(f"set/{name}" for name in PARTED[form]))
    assert read("set") == [train]
    assert read("set", "validation") == [validation]
    assert read("set", "test") == [test]
    assert read("set", "train", "test") == [test]
    assert read("set", "train", "dev") == [validation]
    assert problem_of("set", split="tst") == (
        "set has the parts test, train, validation, but no tst; did you mean 'test'? say which with `split`, "
        "or name the files"
    )


def test_a_folder_that_names_no_parts_or_one_is_read_whole(here: Path) -> None:
    write("plain/a.jsonl", "plain/b.jsonl", "one/data/train-00000-of-00002.parquet")
    write("one/data/train-00001-of-00002.parquet")
    assert read("plain") == read("plain", "test") == ["a.jsonl", "b.jsonl"]
    assert len(read("one")) == len(read("one", "test")) == 2
    assert "whose files name parts; name the file itself" in problem_of("plain", split="train")


def test_files_that_name_no_part_beside_those_that_do_are_left_and_told(here: Path) -> None:
    write("set/train.jsonl", "set/more.jsonl", "set/test.jsonl")
    (found,) = inputs_of([Source(path="set")], "train")
    assert (found.part, dict(found.left)) == ("train", {"test": 1, "files that name no part": 1})
    write("tests/a.jsonl", "tests/test.jsonl")
    assert problem_of("tests") == (
        "tests has the parts test, and files that name no part (1), but no train; say which with `split`, "
        "or name the files"
    )


def test_a_glob_is_read_by_part_too(here: Path) -> None:
    write("data/train-0.jsonl", "data/train-1.jsonl", "data/test.jsonl")
    assert read("data/*.jsonl") == ["data/train-0.jsonl", "data/train-1.jsonl"]
    assert read("data/*.jsonl", split="test") == ["data/test.jsonl"]


@pytest.mark.parametrize("pattern", ["set/*/*.jsonl", "set/**/*.jsonl", "s*/*/a.jsonl"])
def test_a_glob_over_folders_of_parts_mixes_none(here: Path, pattern: str) -> None:
    write("set/train/a.jsonl", "set/test/a.jsonl")
    (chosen,) = inputs_of([Source(path=pattern)], "train")
    assert (chosen.part, dict(chosen.left)) == ("train", {"test": 1})
    assert len(read("set/test/*.jsonl")) == 1


def test_folders_behind_links_are_read_once_and_a_link_to_nothing_is_an_error(here: Path) -> None:
    write("set/a.jsonl", "elsewhere/b.jsonl")
    (here / "set" / "linked").symlink_to(here / "elsewhere")
    (here / "elsewhere" / "back").symlink_to(here / "set")
    (chosen,) = inputs_of([Source(path="set")], "train")
    assert len([*chosen.conversations()]) == 4
    (here / "set" / "c.jsonl").symlink_to(here / "blobs" / "c")
    assert "set/c.jsonl: a link to" in problem_of("set")


@pytest.mark.parametrize("parts", [("train", "test"), ("train_sft", "train_gen", "test_sft")])
def test_saved_data_sets_are_read_by_part(here: Path, parts: tuple[str, ...]) -> None:
    saved = DatasetDict({part: Dataset.from_list(rows_of(part)) for part in parts})
    saved.save_to_disk("set", num_shards=dict.fromkeys(parts, 2))
    (here / "set" / parts[0] / "cache-0123.arrow").write_bytes(b"what map keeps")
    for part in parts:
        assert read("set", split=part) == [part]
    if "train" in parts:
        assert read("set") == ["train"]
    else:
        assert "has the parts test_sft, train_gen, train_sft, but no train" in problem_of("set")
    assert read(f"set/{parts[-1]}") == [parts[-1]]  # one of them, which is a saved data set itself


def test_a_saved_data_set_that_lost_a_file_is_refused(here: Path) -> None:
    Dataset.from_list(rows_of("set")).save_to_disk("set", num_shards=2)
    assert [row.place for row in read_conversations(Source(path="set"))] == [
        f"set/data-0000{number}-of-00002.arrow: row 1" for number in (0, 1)
    ]
    (here / "set" / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow is missing, which state.json names" in problem_of("set")
    (here / "set" / "state.json").write_text("{}")
    assert "does not name the files of the rows" in problem_of("set")


def test_an_evaluation_reads_the_part_of_its_split_and_says_what_is_left(here: Path) -> None:
    write("set/train.jsonl", "set/valid.jsonl", "set/test.jsonl")
    told: dict[str, Any] = {}
    for split in ("validation", "test"):
        samples, ledger = prepare_evaluation_data(
            [Source(path="set")], Renderer(tiny_tokenizer()), split=split, max_prompt_length=64, max_new_tokens=64
        )
        told[split] = [samples[0].place, summary_lines(ledger)[1]]
    assert told == {
        "validation": ["set/valid.jsonl:1", "  of its parts validation is read; left: test (1 file), train (1 file)"],
        "test": ["set/test.jsonl:1", "  of its parts test is read; left: train (1 file), validation (1 file)"],
    }


def test_rows_held_out_of_a_part_are_read_again_from_it(here: Path) -> None:
    write("set/train.jsonl", "set/test.jsonl")
    (found,) = inputs_of([Source(path="set")], "train")
    kept = held_out_rows(found, ["set/train.jsonl:2"]).model_dump(mode="json")
    (here / "held_out.json").write_text(json.dumps({"test": [kept]}))
    (rows,) = read_held_out(here, "test")
    assert rows.split == "train"
    assert [row.place for row in rows.among(read_conversations(rows, split="test"))] == ["set/train.jsonl:2"]


def test_of_a_hub_data_set_the_splits_that_are_left_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, subset: str | None, split: str) -> Dataset:
        found = Dataset.from_list(rows_of(split))
        found.info.splits = SplitDict({part: SplitInfo(part, num_examples=2) for part in ("train", "test")})
        return found

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("chatlora.reading.sources.why_unreachable", lambda: None)
    sources = [Source(path="owner/name"), Source(path="owner/name", split="train[:1]")]
    told = [(found.part, dict(found.left)) for found in inputs_of(sources, "train")]
    assert told == [("train", {"test": 0}), ("train[:1]", {"test": 0})]
