"""What a person sees of long work: at any width, in a terminal and in a log file, from any thread."""

import re
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from chatlora.data.batches import GlobalBatches
from chatlora.progress import Progress, track
from chatlora.run_directory import RunDirectory

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
Shown = pytest.CaptureFixture[str]


@pytest.fixture(params=[60])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Standard error counts as a terminal of so many columns."""
    for name, value in {"COLUMNS": request.param, "LINES": 40, "FORCE_COLOR": 1, "TERM": "xterm"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("NO_COLOR", raising=False)
    return int(request.param)


def seen(shown: Shown) -> list[str]:
    """All lines and states of lines that were shown."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", shown.readouterr().err)) if line.strip()]


class FakeBatch:
    epoch, num_targets, num_tokens = 1.0, 10, 12_345


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, lock=FileLock(tmp_path / ".lock"), peak_memory=lambda: 78 * 2**30)


def begin(run: RunDirectory, step: int, num_steps: int) -> None:
    import numpy as np

    lengths = np.full(num_steps, 5)
    run.resume_logs(0, num_steps, GlobalBatches(lengths, lengths, 1, 100, 0, 1, False))
    for done in range(1, step + 1):
        run.last_time -= 100
        run.log(done, loss=1.23456, grad_norm=1.0, learning_rate=1e-4, batch=FakeBatch())


@pytest.mark.parametrize("terminal", [24, 40, 60, 80, 200], indirect=True)
def test_the_step_count_is_the_last_thing_to_go(terminal: int, run: RunDirectory, capsys: Shown) -> None:
    begin(run, step=1234, num_steps=5000)
    run.close()
    last = seen(capsys)[-1]
    assert len(last) <= terminal
    assert "1,234/5,000" in last
    parts = ["1,234/5,000", "step", "━", "loss 1.2346", " left", " tokens/s", "78.0 GiB"]  # the last one goes first
    kept = [part in last for part in parts]
    assert kept == sorted(kept, reverse=True), last
    assert sum(kept) == {24: 2, 40: 4, 60: 5, 80: 7, 200: 7}[terminal], last


def test_a_long_step_tells_its_micro_batches_and_a_short_one_does_not(
    terminal: int, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run, step=11, num_steps=100)
    now = time.monotonic()
    told = []
    for index, _ in enumerate(run.watch_step(range(8))):
        monkeypatch.setattr(time, "monotonic", lambda after=now + 4 * (index + 1): after)
        assert run.progress is not None
        told.append(run.progress.within)
    assert told == ["", "", "", *(f"micro-batch {number}/8" for number in range(4, 9))]
    monkeypatch.undo()
    run.close()


def test_a_log_file_tells_a_line_now_and_then(
    run: RunDirectory, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run, step=11, num_steps=100)
    now = time.monotonic()
    for index, _ in enumerate(run.watch_step(range(8))):
        monkeypatch.setattr(time, "monotonic", lambda after=now + 6 * (index + 1): after)
    for lot in run.watch_validation([range(2), range(3)]):
        for _ in lot:
            now = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda after=now + 6: after)
    assert seen(capsys) == [
        *(f"step 12: micro-batch {number}/8" for number in (3, 5, 7)),
        *(f"step 11: validation {number}/5" for number in (1, 3, 5)),
    ]


def test_a_validation_shows_how_far_it_is(terminal: int, run: RunDirectory, capsys: Shown) -> None:
    begin(run, step=10, num_steps=100)
    assert run.progress is not None
    assert run.progress.live is not None
    for lot in run.watch_validation([range(2), range(1)]):
        for _ in lot:
            run.progress.live.refresh()
    run.progress.live.refresh()
    run.close()
    shown = seen(capsys)
    for number in (1, 2, 3):
        assert any(re.search(rf"10/100 +validation {number}/3", line) for line in shown), shown
    assert "validation" not in shown[-1]


def test_other_ranks_get_what_they_hand_in(tmp_path: Path) -> None:
    elsewhere = RunDirectory(tmp_path, lock=None, peak_memory=lambda: 0)
    assert list(elsewhere.watch_step(range(3))) == [0, 1, 2]
    assert [list(lot) for lot in elsewhere.watch_validation([range(2), range(1)])] == [[0, 1], [0]]


def test_lines_of_other_threads_stand_whole_above_the_bar(terminal: int, run: RunDirectory, capsys: Shown) -> None:
    begin(run, step=1, num_steps=100)

    def talk(who: int) -> None:
        for number in range(50):
            run.say(f"<thread {who} says {number:02}>")

    talking = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
    for thread in talking:
        thread.start()
    for done in range(2, 60):
        run.log(done, loss=1.0, grad_norm=1.0, learning_rate=1e-4, batch=FakeBatch())
    for thread in talking:
        thread.join()
    run.close()
    shown = seen(capsys)
    said = [line for line in shown if "thread" in line]
    assert sorted(said) == sorted(f"<thread {who} says {number:02}>" for who in range(4) for number in range(50))
    assert all(re.match(r"step  [━╸╺]+  \d+/100  ", line) for line in shown if "thread" not in line), shown


def test_lines_of_other_threads_stand_whole_in_a_log_file(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    run.say("a line")
    assert written == ["a line\n"]


@pytest.mark.parametrize("total", [None, 3])
def test_tracked_items_are_the_same_and_the_line_is_gone_afterwards(
    terminal: int, total: int | None, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatlora.progress.SECONDS_BETWEEN_LOOKS", 0.0)
    assert list(track("abc", "读取 /a/very/long/path/to/a/file/of/rows.jsonl", total)) == ["a", "b", "c"]
    shown = seen(capsys)
    assert all(len(line) <= terminal for line in shown)
    assert any(re.search(r"3/3" if total else r" 3 ", f"{line} ") for line in shown), shown


def test_time_left_goes_by_work_and_speed_by_amounts(capsys: Shown) -> None:
    progress = Progress("generating", 4, unit="tokens", work=100)
    progress.advance(2, amount=50, work=20, seconds=10)
    assert progress.numbers == ["0:40 left", "5 tokens/s"]
    progress.advance(2, amount=50, work=80, seconds=40)
    assert progress.numbers == ["0:00 left", "2 tokens/s"]
    assert seen(capsys) == ["generating 4/4  0:00 left  2 tokens/s"]
