"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP, wherever they arrive: what is finished is saved, and told; exit status 75."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chatlora.distributed.signals import StopSignals, is_launched
from chatlora.errors import Stopped
from chatlora.run_directory import RunDirectory, read_status
from chatlora.run_log import LOG, VALIDATION, read_log
from tests.fork_server import At, ForkServer
from tests.runs import STEP, STEPS, WRITE, saved, wait_until

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
VALIDATES = "chatlora.data.loader:Loader.in_order"
BUILDS = "chatlora.rendering.renderer:Renderer.render"
RENDERS = "jinja2:Template.render"  # within whatever guards against what a template may raise
EXPORTS = "chatlora.training.export:export_adapter"
LOADS = "chatlora.training.setup:load_base_model"


def stops_and_goes_on(
    server: ForkServer, argv: list[str], folder: Path, ranks: int, at: At, step: int | None, validations: list[int]
) -> None:
    """step: after which the run stops, saved; None: before the first. validations: those that are logged by then."""
    before = server.log.stat().st_size if server.log.exists() else 0
    statuses = server.run(argv, folder, ranks=ranks, at=at)
    assert statuses == [75] * ranks
    status = read_status(folder / "run")
    assert (status["state"], status["step"]) == ("stopped", step or 0)
    assert saved(folder)[-1:] == ([] if step is None else [step])
    assert [line["step"] for line in read_log(folder / "run" / LOG)] == list(range(1, (step or 0) + 1))
    assert [line["step"] for line in read_log(folder / "run" / VALIDATION)] == validations
    told = server.log.read_bytes()[before:].decode()
    assert "Traceback" not in told
    assert status["message"] in told
    assert server.run(argv, folder, ranks=ranks) == [0] * ranks
    assert read_status(folder / "run")["state"] == "done"
    assert [line["step"] for line in read_log(folder / "run" / LOG)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in read_log(folder / "run" / VALIDATION)] == [3, 6, 9, 10]


# place, call -> the step after which the run stops, and the validations that are there by then
MOMENTS = {
    "loading": (LOADS, 1, None, []),
    "training": (STEP, 5, 5, [3]),
    "a step before a validation": (STEP, 6, 6, [3]),
    "validation": (VALIDATES, 2, 6, [3]),
    "saving": (WRITE, 2, 7, [3, 6]),  # noticed by the step after it
    "the last validation": (VALIDATES, 4, 10, [3, 6, 9]),
    "the last save": (WRITE, 4, 10, [3, 6, 9, 10]),
    "putting the adapter away": (EXPORTS, 1, 10, [3, 6, 9, 10]),
}
FAST = [
    ("SIGTERM", "loading", 1),
    ("SIGTERM", "training", 1),
    ("SIGINT", "training", 1),
    ("SIGUSR1", "training", 2),
    ("SIGHUP", "training", 1),
    ("SIGTERM", "validation", 2),
    ("SIGTERM", "the last save", 2),
]
ALL = [(name, moment, ranks) for name in SIGNALS for moment in MOMENTS for ranks in (1, 2)]


@pytest.mark.parametrize(("name", "moment", "ranks"), FAST)
def test_a_signal_stops_the_run_with_everything_saved(
    server: ForkServer, argv: list[str], tmp_path: Path, name: str, moment: str, ranks: int
) -> None:
    place, call, step, validations = MOMENTS[moment]
    # In the loop one rank is told, and the others learn it. Elsewhere the launcher tells all of them.
    rank = ranks - 1 if moment in ("training", "validation") else None
    stops_and_goes_on(server, argv, tmp_path, ranks, At(name, place, call, rank), step, validations)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "moment", "ranks"), [each for each in ALL if each not in FAST])
def test_every_signal_at_every_moment(
    server: ForkServer, argv: list[str], tmp_path: Path, name: str, moment: str, ranks: int
) -> None:
    if ranks == 2 and moment == "putting the adapter away":
        pytest.skip("the second process has nothing to put away and has ended by then")
    place, call, step, validations = MOMENTS[moment]
    stops_and_goes_on(server, argv, tmp_path, ranks, At(name, place, call), step, validations)


def test_a_signal_while_data_is_built(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """With a cache of its own, so that there is something to build; what is half built is built anew.

    The signal arrives inside a template, of which nearly every exception makes a row that is set aside.
    """
    mine: dict[str, Any] = {"environment": {"CHATLORA_CACHE": str(tmp_path / "cache")}}
    assert server.run(argv, tmp_path, at=At("SIGTERM", RENDERS, 20), **mine) == [75]
    assert read_status(tmp_path / "run") == {"state": "stopped", "step": 0, "message": "stopped on SIGTERM"}
    # One process builds while the other one waits for it; both are told, as launchers do.
    pids = server.start(argv, tmp_path, ranks=2, at=At("SIGSTOP", BUILDS, 20), **mine)
    wait_until(lambda: any(_is_stopped(pid) for pid in pids))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
    assert server.wait(pids) == [75, 75]
    assert read_status(tmp_path / "run")["state"] == "stopped"
    assert server.run(argv, tmp_path, **mine) == [0]
    (account,) = json.loads((tmp_path / "run" / "ledger.json").read_text())["sources"]
    assert account["set_aside"] == []


def test_a_stop_that_is_an_exception_like_others_is_caught(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """The broken variant: the row is set aside, and the run goes on."""
    ordinary = "from chatlora.distributed import signals\nclass Stopped(Exception): exit_status = 75\n"
    ordinary += "signals.Stopped = Stopped"
    mine: dict[str, Any] = {"environment": {"CHATLORA_CACHE": str(tmp_path / "cache")}}
    server.run(argv, tmp_path, at=At("SIGTERM", RENDERS, 20), broken=ordinary, **mine)
    assert read_status(tmp_path / "run")["step"] > 0
    (account,) = json.loads((tmp_path / "run" / "ledger.json").read_text())["sources"]
    assert account["set_aside"]


DROPS = f"""
import os, signal
from tests.fork_server import on_entry
class Signalled:
    def __del__(self): os.kill(os.getpid(), signal.SIGUSR1)
on_entry({BUILDS!r}, 20, Signalled)
"""


def test_a_stop_that_python_drops_is_sent_again(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """A signal may arrive while Python runs somebody's `__del__`, and what is raised there goes nowhere."""
    mine: dict[str, Any] = {"environment": {"CHATLORA_CACHE": str(tmp_path / "cache")}}
    assert server.run(argv, tmp_path, broken=DROPS, **mine) == [75]
    assert read_status(tmp_path / "run")["message"] == "stopped on SIGUSR1"
    deaf = "from chatlora.distributed.signals import StopSignals\nStopSignals._dropped = lambda *given: None"
    server.run(argv, tmp_path, broken=DROPS + deaf, **mine)
    assert read_status(tmp_path / "run")["step"] == 1, "the broken variant goes on and stops where the loop asks"


def test_a_stop_obeyed_on_the_spot_is_caught(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """The broken variant: what was done since the last checkpoint is lost."""
    on_the_spot = (
        "import contextlib\n"
        "from chatlora.distributed.signals import StopSignals\n"
        "StopSignals.noted = lambda *given: contextlib.nullcontext()"
    )
    assert server.run(argv, tmp_path, at=At("SIGTERM", STEP, 5), broken=on_the_spot) == [75]
    assert saved(tmp_path) == [3]


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_validation_cut_short_twice_is_made_in_the_end(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    for call in (2, 1):
        assert server.run(argv, tmp_path, at=At("SIGTERM", VALIDATES, call)) == [75]
        assert saved(tmp_path)[-1] == 6
        assert [line["step"] for line in read_log(tmp_path / "run" / VALIDATION)] == [3]
    assert server.run(argv, tmp_path) == [0]
    assert [line["step"] for line in read_log(tmp_path / "run" / VALIDATION)] == [3, 6, 9, 10]


@pytest.fixture
def evaluated(server: ForkServer, world: Path, argv: list[str], tmp_path: Path) -> Path:
    """A finished run with test rows."""
    lines = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv += ["--optim.max_steps", "2", "--data.test", "test.jsonl", "--evaluation.max_new_tokens", "8"]
    assert server.run(argv, tmp_path) == [0]
    return tmp_path


def test_a_signal_during_generation_is_told_by_status_json(server: ForkServer, evaluated: Path) -> None:
    for name, ranks in (("SIGTERM", 1), ("SIGINT", 1), ("SIGTERM", 2)):
        at = At(name, "transformers:GenerationMixin.generate", 1)
        assert server.run(["run"], evaluated, script="evaluate", ranks=ranks, at=at) == [75] * ranks
        status = json.loads((evaluated / "run" / "eval" / "test" / "status.json").read_text())
        assert status["state"] == "stopped"
        assert read_status(evaluated / "run")["state"] == "done", "evaluate.py never writes the run's own files"
    assert server.run(["run"], evaluated, script="evaluate") == [0]


# ---- a terminal

NOHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
# A process that reads what a terminal gets into a file, while it lives; its end closes the terminal.
TERMINAL = """
import fcntl, os, pty, signal, struct, termios
from pathlib import Path
from tests.fork_server import on_entry
master, slave = os.openpty()
fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
reader = os.fork()
if reader == 0:
    os.close(slave)
    with open("terminal", "ab", buffering=0) as file:
        while True:
            file.write(os.read(master, 4096))
os.close(master)
os.setsid()
fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
os.dup2(slave, 1), os.dup2(slave, 2), os.close(slave)
os.environ["TERM"] = "xterm"
def close():
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
def interrupt(seconds):
    import time
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(seconds)
"""


def test_nohup_is_respected(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    assert server.run(argv, tmp_path, at=At("SIGHUP", STEP, 5), broken=NOHUP) == [0]
    assert read_status(tmp_path / "run")["state"] == "done"


def test_a_terminal_that_closes_stops_the_run_with_everything_saved(
    server: ForkServer, argv: list[str], tmp_path: Path
) -> None:
    """Whatever is written to it from then on is an error, and must not be what ends the run."""
    closes = TERMINAL + f"on_entry({STEP!r}, 5, close)"
    assert server.run(argv, tmp_path, broken=closes) == [75]
    assert (read_status(tmp_path / "run")["state"], saved(tmp_path)[-1]) == ("stopped", 5)
    writes_on = (
        "\nfrom chatlora.distributed.signals import StopSignals\nStopSignals._leave_terminals = lambda given: None"
    )
    (tmp_path / "broken").mkdir()
    assert server.run(argv, tmp_path / "broken", broken=closes + writes_on) != [75]


def test_an_interrupt_is_told_at_once_and_each_second_above_the_bar(
    server: ForkServer, argv: list[str], tmp_path: Path
) -> None:
    interrupts = TERMINAL + f"on_entry({STEP!r}, 5, lambda: interrupt(3.5))"
    assert server.run(argv, tmp_path, broken=interrupts) == [75]
    wait_until(lambda: b"which is saved" in (tmp_path / "terminal").read_bytes())
    shown = screen((tmp_path / "terminal").read_bytes().decode())
    told = [line for line in shown if "SIGINT: " in line]
    # A line of its own each: the bar is not in it.
    assert all(line.startswith("SIGINT: finishing step 5") for line in told), shown
    assert all(line.endswith("; once more leaves it unsaved") for line in told), shown
    assert len(told) >= 3
    bars = [line for line in shown if line.startswith("step ") and "/10" in line]
    assert len(bars) == 1, "one bar, in one piece, below them"


def test_how_long_a_step_still_takes_is_told_by_the_ones_before_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, lock=None, peak_memory=lambda: 0)
    run.step, run.last_time = 11, time.monotonic() - 1000
    assert re.fullmatch(r"finishing step 12, 1,0\d\d s so far", run.finishing())
    run.last_seconds += [4000, 6000]
    assert re.fullmatch(r"finishing step 12, about (4,000|3,9\d\d) s", run.finishing())


def test_other_processes_than_the_first_are_silent(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    before = server.log.stat().st_size
    assert server.run(argv, tmp_path, ranks=2, at=At("SIGINT", STEP, 5)) == [75, 75]
    told = server.log.read_bytes()[before:].decode()
    assert told.count("SIGINT: finishing step 5") == told.count("stopped after step 5") == 1


def screen(output: str) -> list[str]:
    """The lines that a terminal shows after it got `output`: as much of one as rich's bar needs."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row, lines = row + 1, lines + [""] * (row + 2 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.endswith("K"):
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


# ---- what the handler does


def test_only_the_first_signal_interrupts() -> None:
    before, hook = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}, sys.unraisablehook
    with StopSignals() as signals:
        with pytest.raises(Stopped, match="stopped on SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher repeats itself: nothing is raised
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS} == before, "the process is as it was"
    assert sys.unraisablehook is hook


HANDLED = """
import ctypes, signal, sys
from chatlora.distributed.signals import SIGNALS, swap_death_signal
def state():
    before = swap_death_signal(0)
    swap_death_signal(before)
    return [signal.getsignal(getattr(signal, name)) for name in SIGNALS], sys.unraisablehook, sys.excepthook, before
def unchanged(main, *words):
    before = state()
    try:
        main(*words)
    finally:
        assert state() == before, (state(), before)
"""


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_main_leaves_the_process_as_it_found_it(
    server: ForkServer, evaluated: Path, argv: list[str], script: str
) -> None:
    """Whoever calls it from a program of his own has his handlers back, whatever came of it."""
    words = {"train": [*argv, "--run.output_dir", "other"], "evaluate": ["run"]}[script]
    wrapped = f"{HANDLED}\nimport {script}\nmain = {script}.main\n"
    wrapped += f"{script}.main = lambda *given: unchanged(main, *given)"
    starts = At("SIGTERM", "chatlora.distributed.runtime:start")
    # With a launcher's variable, the signal of a parent's death is asked for.
    for precision, at, status in (("no", starts, 75), ("fp16", None, 2), ("no", None, 0)):
        launched = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_DYNAMO_BACKEND": "NO"}
        assert server.run(words, evaluated, script=script, broken=wrapped, at=at, environment=launched) == [status]


def test_what_users_export_makes_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `nohup python train.py &` would end with the shell that has it."""
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert not is_launched()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert is_launched()


def test_no_library_swallows_the_stop() -> None:
    assert not issubclass(Stopped, Exception)


def test_a_second_interrupt_during_a_step_leaves_at_once(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    twice = (
        "import os, signal\n"
        "from chatlora.distributed.runtime import Runtime\n"
        "real = Runtime.backward\n"
        "def twice(runtime, loss):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    real(runtime, loss)\n"
        "Runtime.backward = twice"
    )
    assert server.run(argv, tmp_path, broken=twice) == [-signal.SIGINT]
