"""Everything a person can get wrong, and how it is told.

ChatLoraError            exit status 2: the user's mistake, told as one block without a traceback
├── ConfigError          a setting, a flag or a config file
├── DataError            a data file or a row in it
├── ModelError           a base model, tokenizer, chat template or adapter
├── MergeError           exit status 1: a merged model that is not base and adapter
├── CheckpointError      exit status 1: a checkpoint that cannot be written or read
├── LaunchError          the way the processes were started
├── PredictionsError     a predictions file handed to the evaluator
└── ChatError            a message or a command in a chat
SetAside                 not a mistake: one row that this template cannot render exactly
NonFiniteError           exit status 1: the run itself went wrong
OutOfMemoryError         exit status 1: the machine ran out, told with the setting to lower
Stopped                  exit status 75: a signal asked the run to stop
"""

import difflib
import faulthandler
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

PROCESSES = "CHATLORA_PROCESSES"  # names a file of process ids and exit statuses
SHOWN = 20  # problems of one kind that are spelled out; the rest are counted
REPEATED = 3  # rows of a file with the same problem, each of which is told
PLACE = re.compile(r"(?P<file>.+?):(\d+(: row \d+)?| row \d+| \w*\[\d+\]): (?P<sentence>.+)", re.DOTALL)


class ChatLoraError(Exception):
    """A mistake that the user can mend. `problems` are whole sentences, each with its place and remedy."""

    exit_status = 2
    title = "chatlora cannot go on"

    def __init__(self, *problems: str) -> None:
        assert problems, "an error without a sentence helps nobody"
        self.problems = problems
        super().__init__("\n".join(problems))

    def __str__(self) -> str:
        return block(self.title, self.problems)


class Problem(NamedTuple):
    """One thing that is wrong: the setting by the name its user knows, and a sentence with reason and remedy."""

    setting: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.sentence}"


class ConfigError(ChatLoraError):
    title = "The configuration has problems"


class DataError(ChatLoraError):
    """`way_on` is a sentence below all problems, however many there are."""

    title = "The data has problems"

    def __init__(self, *problems: str, way_on: str = "") -> None:
        super().__init__(*problems)
        self.way_on = way_on

    def __str__(self) -> str:
        return "\n".join(filter(None, (super().__str__(), self.way_on)))


class ModelError(ChatLoraError):
    title = "The model cannot be used as it is"


class LaunchError(ChatLoraError):
    title = "The launch has problems"


class PredictionsError(ChatLoraError):
    title = "The predictions cannot be scored"


class MergeError(ChatLoraError):
    exit_status = 1
    title = "The merged model is refused"


class ChatError(ChatLoraError):
    title = "The chat cannot go on"


class CheckpointError(ChatLoraError):
    exit_status = 1
    title = "The run's checkpoints have problems"


class NonFiniteError(ChatLoraError):
    exit_status = 1
    title = "The loss or its gradient is not finite; this step updated nothing"

    @classmethod
    def at(cls, step: int, loss: float, grad_norm: float, places: Sequence[str]) -> Self:
        """The error of step `step` (counted from 1), naming the rows of its batch."""
        shown = ", ".join(places[:SHOWN]) + (f" and {len(places) - SHOWN} more" if len(places) > SHOWN else "")
        return cls(
            f"step {step}: loss {loss}, gradient norm {grad_norm}",
            f"the rows of that batch: {shown}",
            "look at these rows, or lower optim.learning_rate",
        )


class OutOfMemoryError(ChatLoraError):
    exit_status = 1
    title = "Out of memory"


class SetAside(Exception):
    """A row that parses but cannot be trained exactly. It is counted in the ledger under `reason`, never repaired.

    `reason` is the same words for every row of its kind, so that rows can be counted by it; what is particular to this
    row (a length, what the template complained of) is in `detail`. `str()` gives both.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason} ({detail})" if detail else reason)


class Stopped(BaseException):
    """A signal asked the process to stop; everything finished so far is on the disk.

    No Exception, like KeyboardInterrupt: it may be raised inside any library, and many go on after an Exception.
    """

    exit_status = 75


def block(title: str, problems: Sequence[str]) -> str:
    """One readable block: the title, then a line a problem, the first `SHOWN` of them and how many more there are."""
    told = grouped(problems)
    lines = [f"{title}:", *(f"  {sentence}" for sentence, _ in told[:SHOWN])]
    if len(told) > SHOWN:
        rest = sum(count for _, count in told[SHOWN:])
        lines.append(f"  ... and {rest} more of {len(problems)}")
    return "\n".join(lines)


def grouped(problems: Sequence[str]) -> list[tuple[str, int]]:
    """Each sentence and for how many it stands. The same one in more than `REPEATED` rows of a file is told once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        found = PLACE.fullmatch(problem)
        groups.setdefault((found["file"], found["sentence"]) if found else ("", problem), []).append(problem)
    told = []
    for (_, sentence), same in groups.items():
        if len(same) <= REPEATED:
            told += [(problem, 1) for problem in same]
            continue
        place = same[0].removesuffix(f": {sentence}")
        told.append((f"{place} and {len(same) - 1} more rows: {sentence}", len(same)))
    return told


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'assistant'?"` where a known word is close, else the empty string."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def similar_beside(path: Path) -> str:
    """`did_you_mean` over the names in the folder in which a path was looked for."""
    return did_you_mean(path.name, (each.name for each in path.parent.iterdir())) if path.parent.is_dir() else ""


def this_rank() -> str:
    """`"rank 1 of 2: "` in front of what one of several processes tells, else the empty string."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    return "" if world_size == "1" else f"rank {os.environ.get('RANK', '?')} of {world_size}: "


def run_as_script(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and leave with the exit status that the outcome deserves.

    0 done, 2 the user's mistake (one block on standard error, no traceback), 75 stopped, 1 anything else.
    """
    faulthandler.enable(2)  # where native code crashes, the line that called it is told
    note_process()
    status = 1
    try:
        main(sys.argv[1:])
        status = 0
    except ChatLoraError as error:
        print(f"\n{this_rank()}{error}", file=sys.stderr)
        status = error.exit_status
    except Stopped as stop:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # launchers repeat themselves; the status is decided
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":  # all processes stop at the same step
            print(f"\n{stop}", file=sys.stderr)
        status = stop.exit_status
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        note_process(status)
    if status:
        sys.exit(status)


def note_process(status: int | None = None) -> None:
    """`PID`, and at the end `PID STATUS`, for the command that started a launcher, which hides both."""
    path = os.environ.get(PROCESSES)
    if path is None:
        return
    with suppress(OSError):  # there is none any more, or its disk is full: only the exit status is less exact
        line = f"{os.getpid()}\n" if status is None else f"{os.getpid()} {status}\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)
