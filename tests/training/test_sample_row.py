"""A training shows one row as the model sees it, in three lines, and only to a person."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., Path]
Shown = pytest.CaptureFixture[str]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_a_terminal_shows_a_row(run: Run, capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    run("--optim.max_steps", "1")
    told = capsys.readouterr().err
    lines = [line.rstrip() for line in ESCAPES.sub("", told).splitlines()]
    first = next(number for number, line in enumerate(lines) if "as the model sees it" in line)
    assert re.fullmatch(r"rows.jsonl:\d+ as the model sees it, the targets in colour", lines[first])
    assert lines[first + 1].endswith("<|im_start|>assistant↵")
    assert re.fullmatch(r"\S+ is number \d+\.<\|im_end\|>", lines[first + 2])
    assert re.search(r"\x1b\[1;32m\S+ is number", told)


def test_a_log_file_does_not(run: Run, capsys: Shown) -> None:
    run("--optim.max_steps", "1")
    assert "as the model sees it" not in capsys.readouterr().err
