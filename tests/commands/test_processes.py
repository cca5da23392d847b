"""How many processes a script gets, who is told of a signal, and which exit status stands for all of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from chatlora.commands import evaluate as evaluate_command
from chatlora.commands import train as train_command
from chatlora.commands.processes import launcher_flags, parse
from chatlora.errors import ConfigError
from chatlora.scripts import CONFIGS, launcher_file, load_script, script_path
from tests.fork_server import REPOSITORY
from tests.runs import is_alive, wait_until

# What `processes.run` starts: a launcher that starts two processes, waits for them and hides how they ended.
LAUNCHER = """
import subprocess, sys
children = [subprocess.Popen([sys.executable, "process.py", str(rank)], start_new_session=True) for rank in (0, 1)]
statuses = [child.wait() for child in children]
sys.exit(int(any(statuses)))
"""
PROCESS = """
import os, signal, sys, time
from pathlib import Path
from chatlora.errors import ConfigError, Stopped, run_as_script
rank = sys.argv[1]
def stop(number, frame):
    raise Stopped("stopped")
def main(argv):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    Path(f"ready-{rank}").write_text(str(os.getpid()))
    BODY
run_as_script(main)
"""
COMMAND = """
import sys
from pathlib import Path
from chatlora.commands.processes import Processes
from chatlora.errors import run_as_script
def main(argv):
    processes = Processes(Path("processes"))
    processes.leave(processes.run([sys.executable, "launcher.py"]))
run_as_script(main)
"""
WAITS = "[time.sleep(0.1) for _ in range(600)]"  # not in one: a signal just before a sleep begins does not end it


class Command:
    def __init__(self, folder: Path, body: str, *, launcher: str = LAUNCHER, before: Sequence[str] = ()) -> None:
        self.folder = folder
        (folder / "launcher.py").write_text(launcher)
        (folder / "process.py").write_text(PROCESS.replace("BODY", body))
        (folder / "command.py").write_text(COMMAND)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, "command.py"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def when_ready(self) -> list[int]:
        files = [self.folder / f"ready-{rank}" for rank in (0, 1)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    def ends(self) -> int:
        status = self.process.wait(timeout=60)
        assert "Traceback" not in (self.folder / "log").read_text()
        return status


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("pass", 0),
        ("raise ConfigError('no')", 2),
        ("sys.exit(1)", 1),
        # One fails, and the launcher's SIGTERM stops the others in good order.
        ("(time.sleep(0.5), sys.exit(2)) if rank == '1' else (time.sleep(2), stop(15, None))", 2),
        # One is killed: nobody asked the others to stop, and a scheduler must not take it for a stop.
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else (time.sleep(1), stop(15, None))", 1),
    ],
)
def test_the_exit_status_is_that_of_the_process_that_failed_first(tmp_path: Path, body: str, status: int) -> None:
    assert Command(tmp_path, body).ends() == status


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_goes_to_the_processes_and_once(tmp_path: Path, name: str) -> None:
    """Not to the launcher, which would kill them after 30 seconds."""
    command = Command(tmp_path, WAITS)
    processes = command.when_ready()
    command.process.send_signal(getattr(signal, name))
    assert command.ends() == 75
    assert not any(is_alive(pid) for pid in processes)


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path) -> None:
    command = Command(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN); " + WAITS)
    processes = command.when_ready()
    time.sleep(0.2)  # it has come to ignoring
    command.process.send_signal(signal.SIGINT)
    command.process.send_signal(signal.SIGTERM)  # a scheduler's; it changes nothing
    time.sleep(0.5)
    assert all(is_alive(pid) for pid in processes)
    command.process.send_signal(signal.SIGINT)
    assert command.ends() == -signal.SIGINT, "a shell sees what it sees of any program"
    wait_until(lambda: not any(is_alive(pid) for pid in processes))


def test_an_interrupt_before_there_are_processes_stops_the_launcher(tmp_path: Path) -> None:
    command = Command(tmp_path, WAITS, launcher="open('begun', 'w').close()\nimport time\ntime.sleep(60)")
    wait_until((tmp_path / "begun").exists)
    command.process.send_signal(signal.SIGINT)
    assert command.ends() == 75
    assert "stopped on SIGINT" in (tmp_path / "log").read_text()


def test_nohup_goes_for_the_processes_too(tmp_path: Path) -> None:
    command = Command(tmp_path, "time.sleep(1)", before=["nohup"])
    command.when_ready()
    command.process.send_signal(signal.SIGHUP)
    assert command.ends() == 0


def test_words_are_the_launchers_or_the_scripts() -> None:
    asked = parse(["my.yaml", "--num_processes=2", "--optim.epochs", "3", "--config_file", "zero2", "--split", "test"])
    assert asked.flags == {"num_processes": "2", "config_file": "zero2"}
    assert asked.words == ["my.yaml", "--optim.epochs", "3", "--split", "test"]
    for wrong in (["--num_processes"], ["--num_processes", "all"], ["--main_process_port", "-1"]):
        with pytest.raises(ConfigError, match=wrong[0]):
            parse(wrong)


def test_a_process_for_each_gpu_and_none_more(tmp_path: Path) -> None:
    ddp = {"config_file": str(CONFIGS / "multi_gpu.yaml"), "main_process_port": "0"}
    zero = {"config_file": str(CONFIGS / "zero2.yaml"), "main_process_port": "0"}
    assert launcher_flags({}, lambda: 0) is None
    assert launcher_flags({}, lambda: 1) is None
    assert launcher_flags({"num_processes": "1"}, lambda: 4) is None
    assert launcher_flags({"num_processes": "2"}, lambda: 0) == {**ddp, "num_processes": "2"}
    assert launcher_flags({}, lambda: 4) == {**ddp, "num_processes": "4"}
    assert launcher_flags({"config_file": "zero2"}, lambda: 4) == {**zero, "num_processes": "4"}
    assert launcher_flags({"config_file": "zero2"}, lambda: 16) == {**zero, "num_processes": "16"}
    assert launcher_flags({"config_file": "zero2"}, lambda: 0) == {**zero, "num_processes": "1"}
    assert launcher_flags({"config_file": "cpu"}, lambda: 4) == {**zero, "config_file": str(CONFIGS / "cpu.yaml")}
    (tmp_path / "mine.yaml").write_text("{num_processes: 2, main_process_port: 12345}")
    mine = {"config_file": str(tmp_path / "mine.yaml")}
    assert launcher_flags(mine, lambda: 4) == mine
    nodes = {"config_file": "multi_node", "machine_rank": "1", "main_process_ip": "host"}
    assert launcher_flags(nodes, lambda: 4) == {**nodes, "config_file": str(CONFIGS / "multi_node.yaml")}


def test_a_launchers_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("zero2", "zero2.yaml", "accelerate_configs/zero2.yaml"):
        assert launcher_file(name) == CONFIGS / "zero2.yaml"
    Path("zero2.yaml").touch()
    assert launcher_file("zero2.yaml") == Path("zero2.yaml"), "the user's own comes first"
    for name in ("zer2", "elsewhere/zero2.yaml", str(tmp_path / "zero3.yaml")):
        with pytest.raises(ConfigError, match=r"neither here nor in .*(did you mean|there is)"):
            launcher_file(name)


def test_a_script_is_loaded_once_under_a_name_of_its_own() -> None:
    before = sys.modules.get("evaluate")
    evaluate = load_script("evaluate")
    assert evaluate is load_script("evaluate")
    assert evaluate.__name__ == "chatlora_evaluate"
    assert sys.modules.get("evaluate") is before
    assert script_path("train").name == "train.py"


@pytest.mark.parametrize("name", ["num_processes", "num_machines"])
def test_numbers_of_processes_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name} is 0: at least 1"):
        parse([f"--{name}", "0"])
    file = tmp_path / "launcher.yaml"
    file.write_text(f"{name}: auto\n")
    with pytest.raises(ConfigError, match=rf"launcher\.yaml: {name} is 'auto'"):
        launcher_flags({"config_file": str(file)}, lambda: 2)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (train_command, ["--data.train", "nix.jsonl"]),
        (evaluate_command, ["--model", "owner/name", "--data", "nix.jsonl"]),
    ],
)
def test_what_is_not_there_is_told_before_any_process_begins(command: ModuleType, words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"nix\.jsonl: no such file"):
        command.run([*words, "--num_processes", "2"])
