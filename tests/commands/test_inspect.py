"""`chatlora inspect`: what is shown of rows, from the tokenizer alone."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatlora.commands import dispatch
from chatlora.commands.inspect import parse
from chatlora.errors import ConfigError, DataError

Inspect = Callable[..., str]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world's tokenizer without its model, and its first rows; the working directory."""
    monkeypatch.setenv("CHATLORA_CACHE", str(world / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:9]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def told(*words: str, model: str = "model") -> str:
        dispatch(["inspect", *words, "--model", model])
        return capsys.readouterr().out

    return told


def test_a_file_of_rows_is_shown_without_a_model_and_without_a_run(folder: Path, inspect: Inspect) -> None:
    before = sorted(folder.iterdir())
    told = inspect("rows.jsonl")
    assert "rows.jsonl: rows read 9, rows used 9" in told
    assert "lengths of 9 rows" in told
    assert re.search(r"512 +0 +0 \(0.0 %\)", told)
    assert "<|im_start|>assistant\n⟦北京 is number 0.<|im_end|>⟧" in told
    assert told.count("\n── rows") == 3
    assert sorted(folder.iterdir()) == before


def test_a_config_is_inspected_as_it_would_be_trained(folder: Path, inspect: Inspect) -> None:
    (folder / "my.yaml").write_text("data: {train: rows.jsonl, max_length: 35, over_length: cut, validation: 0}\n")
    told = inspect("my.yaml", "--row", "rows.jsonl:2")
    assert "cut at max_length" in told
    (line,) = [line for line in told.splitlines() if "data.max_length, cut" in line]
    lost = re.search(r"35\s+[\d,]+\s+([\d,]+) \(", line)
    assert lost is not None
    full = inspect("my.yaml", "--data.max_length", "512", "--row", "2")
    targets = [int(found) for told in (told, full) for found in re.findall(r"targets (\d+)", told)[:1]]
    assert targets[1] - targets[0] == int(lost[1])  # what the table says is what the cut really cost
    assert "rows.jsonl:2" in full
    assert full.count("\n── rows") == 1


def test_rows_are_found_by_number_place_length_and_risk(folder: Path, inspect: Inspect) -> None:
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    garbled = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "cafÃ©s, certainly, as always"}]
    shut = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "loss": False}]
    more = [json.dumps({"messages": messages}) for messages in (other, garbled, shut)]
    (folder / "rows.jsonl").write_text("\n".join([*rows, *more]), encoding="utf-8")
    assert "北京 is number 0" in inspect("rows.jsonl", "--row", "1")
    assert "── rows.jsonl:3: " in inspect("rows.jsonl", "--longest")
    risky = inspect("rows.jsonl", "--risky")
    assert re.search(r"── rows.jsonl:10: .*the reply is empty", risky)
    assert re.search(r"── rows.jsonl:11: .*wrong encoding", risky)
    assert re.search(r"── rows.jsonl:12: not trained \(set aside, .*\)\nuser: x\nassistant: y", risky)
    assert "── rows.jsonl:12: not trained" in inspect("rows.jsonl", "--row", "12")
    with pytest.raises(DataError, match=r"--row 99: no row stands there; the last is rows.jsonl:11"):
        inspect("rows.jsonl", "--row", "99")


def test_the_longest_rows_are_those_that_max_length_cuts_or_leaves_nothing_of(folder: Path, inspect: Inspect) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Oslo. " * 40}]
    longest = [{"role": "user", "content": "Bergen? " * 80}, {"role": "assistant", "content": "a"}]
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": each}) + "\n" for each in (turns, longest))
    told = inspect("rows.jsonl", "--longest", "--data.max_length", "60", "--data.over_length", "cut")
    shown = re.findall(r"── (rows.jsonl:\d+): (not trained|60 tokens)?", told)
    assert shown[:2] == [("rows.jsonl:11", "not trained"), ("rows.jsonl:10", "60 tokens")]


def test_rows_are_shown_where_most_of_them_leak(folder: Path, inspect: Inspect) -> None:
    shutil.copy(folder / "rows.jsonl", folder / "test.jsonl")
    (folder / "my.yaml").write_text(
        "data: {train: rows.jsonl, validation: 0, test: test.jsonl, on_leak: drop}\n", encoding="utf-8"
    )
    assert "9 x the row leaks into held-out rows" in inspect("my.yaml")


def test_strict_passes_thoughts_that_stay_where_the_rows_have_them(folder: Path, inspect: Inspect) -> None:
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nNorth."}
    row = {"messages": [{"role": "user", "content": "q"}, thought]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert "a thought is kept at the head of the reply's text" in inspect("rows.jsonl", "--strict")
    with pytest.raises(SystemExit):
        inspect("rows.jsonl", "--strict", "--data.reasoning", "drop")


def test_strict_passes_clean_rows_only(folder: Path, inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    inspect("rows.jsonl", "--strict")
    with pytest.raises(SystemExit) as left:
        inspect("rows.jsonl", "--strict", "--data.max_length", "25")
    assert left.value.code == 1
    assert "--strict: rows.jsonl: set aside" in capsys.readouterr().err


def test_nothing_that_stands_in_rows_acts_on_the_terminal(folder: Path, inspect: Inspect) -> None:
    hostile = "\x1b]0;title\x07 \u202e[bold]\r"
    turns = [("user", hostile), ("assistant", hostile), ("assistant", hostile)]
    rows = [[dict[str, object](role=role, content=content) for role, content in turns[:n]] for n in (2, 3)]
    for message in rows[1][1:]:
        message["loss"] = False
    (folder / "\x1b[2Jrows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    told = inspect("\x1b[2Jrows.jsonl", "--risky")
    assert told.count(r"\x1b]0;title\x07 \u202e[bold]\r") >= 4
    assert {each for each in told if not each.isprintable()} == {"\n"}


def test_targets_are_coloured_on_a_terminal(folder: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    told = inspect("rows.jsonl", "--row", "1")
    assert "\x1b[1;32m北京 is number 0.<|im_end|>\x1b[0m" in told
    assert "⟦" not in told


def test_what_is_a_config_and_what_are_rows(folder: Path) -> None:
    assert parse(["demo"]).loaded.origin == "preset demo"
    loaded = parse(["rows.jsonl", "--model", "m", "--data.supervise", "last"]).loaded
    assert (loaded.config.model.name_or_path, loaded.config.data.supervise) == ("m", "last")
    assert [source.path for source in loaded.config.data.train] == ["rows.jsonl"]
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("data: {train: rows.jsonl, validation: 0.5}\n")
    assert parse(["run"]).loaded.config.data.validation == 0.5
    with pytest.raises(ConfigError, match="one config or one source"):
        parse(["rows.jsonl", "demo"])


def test_the_readme_shows_what_is_printed(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```\n(embedded:demo/train\.jsonl: rows read.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    dispatch(["inspect", "demo", "--row", "4"])
    told = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    missing = [line for line in shown.splitlines() if line not in [*told, "..."]]
    assert not missing
