"""The processes that a script runs in: how many, what they are told when this one is, and how they ended.

A launcher turns every exit status into 1, and passes signals on to some processes, 30 seconds before it kills them. So
the processes write down who they are and how they ended (errors.note_process), and signals go to them directly.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple

from chatlora.config_files import HELP, read_yaml
from chatlora.distributed.signals import SIGNALS, StopSignals, is_launched
from chatlora.errors import PROCESSES, ConfigError, LaunchError, Stopped
from chatlora.scripts import CONFIGS, launcher_file, load_script, script_path

# What goes to `accelerate launch`; every other word is the script's.
NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
FLAGS = ("config_file", *NUMBERS, "main_process_ip", "rdzv_backend")
USAGE = """usage: chatlora {0} [--config_file FILE] [--num_processes N] ...

Starts {0}.py, with the words below, once for every GPU that it sees, once where there is none.
  --config_file FILE     a file for `accelerate launch`, or the name of one of accelerate_configs/: zero2
  --num_processes N      how many processes, on all machines together
  --num_machines, --machine_rank, --main_process_ip, --main_process_port, --rdzv_backend: as for `accelerate launch`
Exit status: 0 done, 2 a mistake to mend, 75 stopped with everything saved, 1 anything else.
"""


class Asked(NamedTuple):
    flags: Mapping[str, str]  # for the launcher, without dashes
    words: Sequence[str]  # for the script
    is_help: bool


def parse(argv: Sequence[str]) -> Asked:
    flags: dict[str, str] = {}
    rest, words = list(argv), []
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or flag not in FLAGS:
            words.append(word)
            continue
        if not equals and not rest:
            raise ConfigError(f"--{flag} needs a value")
        flags[flag] = value if equals else rest.pop(0)
        if flag in NUMBERS and not flags[flag].isdecimal():
            raise ConfigError(f"--{flag} is {flags[flag]!r}: a whole number is needed")
        if flag in ("num_processes", "num_machines") and int(flags[flag]) < 1:
            raise ConfigError(f"--{flag} is {flags[flag]}: at least 1 is needed")
    return Asked(flags, words, bool(set(HELP) & set(words)))


def start(script: str, asked: Asked, *, alone: bool = False) -> None:
    """Run a script, here where one process is enough. Leaves with the exit status that the processes had."""
    if asked.is_help:
        print(USAGE.format(script))
        load_script(script).main(["--help"])
        return
    inside = is_launched() or "LOCAL_RANK" in os.environ
    if inside and asked.flags:
        raise LaunchError(f"--{next(iter(asked.flags))}: this is a launcher's process already, which cannot launch")
    with StopSignals():  # torch is imported, to count
        launcher = None if alone or inside else launcher_flags(asked.flags)
    if launcher is None:
        load_script(script).main(asked.words)
        return
    command = [sys.executable, "-P", str(Path(__file__).with_name("launch.py"))]  # -P: nothing beside it is a module
    for flag, value in launcher.items():
        command += [f"--{flag}", value]
    with TemporaryDirectory(prefix="chatlora-") as folder:
        processes = Processes(Path(folder) / "processes")
        status = processes.run([*command, str(script_path(script)), *asked.words])
    processes.leave(status)


def num_gpus() -> int:
    import torch

    return torch.accelerator.device_count()


def launcher_flags(flags: Mapping[str, str], gpus: Callable[[], int] = num_gpus) -> dict[str, str] | None:
    """For `accelerate launch`; None where this process is enough. gpus: counts them, where that matters."""
    chosen = dict(flags)
    if "config_file" not in flags:
        machines = int(flags.get("num_machines", 1))
        chosen.setdefault("num_processes", str(machines * max(1, gpus())))
        if chosen == {"num_processes": "1"}:
            return None
    file = launcher_file(flags.get("config_file", "multi_gpu"))
    settings: Mapping[str, Any] = read_yaml(file)
    chosen["config_file"] = str(file)
    if int(chosen.get("num_machines", _count(settings, "num_machines", file))) > 1:
        return chosen
    if "main_process_port" not in settings:
        chosen.setdefault("main_process_port", "0")  # any that is free
    in_file = _count(settings, "num_processes", file)
    is_ours = file.parent == CONFIGS  # its number is that of an example
    if "num_processes" not in chosen and in_file > 1 and (is_ours or 0 < gpus() < in_file):
        chosen["num_processes"] = str(max(1, gpus()))
    return chosen


def _count(settings: Mapping[str, Any], name: str, file: Path) -> int:
    told = str(settings.get(name) or 1)
    if not told.isdecimal():
        raise ConfigError(f"{file}: {name} is {told!r}: a whole number is needed")
    return int(told)


class Processes:
    """Those of one launch. file: where each of them writes its id, and at its end its exit status."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.launcher: subprocess.Popen[bytes] | None = None
        self.signal: signal.Signals | None = None  # the first that this process got
        self.is_killed = False
        self.ids: list[int] = []
        self.statuses: dict[int, int] = {}  # in the order of their ends

    def run(self, command: Sequence[str]) -> int:
        """Returns the launcher's exit status."""
        self.file.touch()
        before = {}
        for name in SIGNALS:
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, self.pass_on)
        try:
            # A group of its own: the terminal's Ctrl-C is for this process alone.
            self.launcher = subprocess.Popen(command, env={**os.environ, PROCESSES: str(self.file)}, process_group=0)
            if self.signal is not None:  # it came before there was anybody to tell
                os.killpg(self.launcher.pid, signal.SIGTERM)
            status = self.launcher.wait()
            self.read()
            return status
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def read(self) -> None:
        lines = [line.split() for line in self.file.read_text().splitlines()]
        self.ids = [int(line[0]) for line in lines if len(line) == 1]
        self.statuses = {int(line[0]): int(line[1]) for line in lines if len(line) == 2}

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A first signal goes to the processes. Of more, schedulers repeat theirs; a second Ctrl-C ends all at once."""
        del frame
        again, self.signal = self.signal is not None, self.signal or signal.Signals(number)
        if self.launcher is None or (again and number != signal.SIGINT):
            return
        self.read()
        running = [each for each in self.ids if each not in self.statuses]
        self.is_killed = again
        for each in running:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL if again else number)
        if again or not running:  # in this case there is nothing yet that could be lost
            with suppress(ProcessLookupError):
                os.killpg(self.launcher.pid, signal.SIGKILL if again else signal.SIGTERM)

    def leave(self, launcher_status: int) -> None:
        """With the exit status of the process that failed first: what follows on the others is its doing."""
        if self.is_killed:
            from rich.console import Console

            Console(stderr=True).show_cursor()  # the bar of a process that was killed had hidden it
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        failed = [status for status in self.statuses.values() if status]
        if not failed and launcher_status and self.signal is not None:
            raise Stopped(f"stopped on {self.signal.name}")
        # The others stop in good order where one is killed; nobody asked for that.
        is_lost = self.signal is None and len(self.statuses) < len(self.ids)
        if failed and not (failed[0] == Stopped.exit_status and is_lost):
            sys.exit(failed[0])
        sys.exit(launcher_status if launcher_status >= 0 else 1)
