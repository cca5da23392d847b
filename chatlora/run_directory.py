"""One run on disk: who may write, what it was begun with, how it stands, what happened in each step."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from filelock import FileLock, Timeout

from chatlora.config import Config, changed_settings, trajectory_hash
from chatlora.config_files import config_from_file, write_config
from chatlora.errors import ConfigError, LaunchError
from chatlora.progress import TrainingProgress, clock

State = Literal["running", "done", "stopped", "failed"]


class Counted(Protocol):
    """What the log says of a batch."""

    @property
    def epoch(self) -> float: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


class Claim(NamedTuple):
    """What rank 0 found out about a run's directory, for all ranks."""

    config: Config  # with output_dir and chat_template_date filled in
    finished: bool


def claim(config: Config, name: str) -> tuple[Claim, FileLock]:
    """Settle the run's directory and lock it against a second run. For rank 0 alone.

    `run.output_dir: null` means runs/NAME-HASH, so that the same config goes on with its own run. Raises ConfigError
    where a named directory holds a run with another trajectory, LaunchError where another process trains in it.
    """
    path = config.run.output_dir or Path("runs") / f"{name}-{trajectory_hash(config)}"
    config = config.with_values("run", output_dir=path)
    stored = path / "config.yaml"
    day = config.model.chat_template_date or date.today()
    if stored.is_file():
        before = config_from_file(stored)
        _refuse_changes(before, config, path)
        day = config.model.chat_template_date or before.model.chat_template_date or day
    config = config.with_values("model", chat_template_date=day)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LaunchError(
            f"another process is training in {path}: wait for it, or give this run a folder with --run.output_dir"
        ) from None
    return Claim(config, finished=read_status(path).get("state") == "done"), lock


class RunDirectory:
    """The files of a run. On other ranks than 0 every method does nothing, so that the loop need not ask."""

    def __init__(self, path: Path, *, lock: FileLock | None, peak_memory: Callable[[], int]) -> None:
        self.path = path
        self.lock = lock  # held until the process ends
        self.writes = lock is not None
        self.peak_memory = peak_memory
        self.progress: TrainingProgress | None = None
        self.step = 0
        self.last_time = time.monotonic()

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def begin(self, config: Config, environment: Mapping[str, Any], ledger: Mapping[str, Any], num_steps: int) -> None:
        """Write what the run is, and empty what a run that did not finish has left."""
        if not self.writes:
            return
        write_config(config, self.path / "config.yaml")
        write_json(self.path / "environment.json", environment)
        write_json(self.path / "ledger.json", ledger)
        for name in ("log.jsonl", "validation.jsonl"):
            (self.path / name).write_text("", encoding="utf-8")
        self.progress = TrainingProgress(num_steps)
        self.last_time = time.monotonic()

    def log(
        self,
        done: int,
        *,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        batch: Counted,
    ) -> None:
        """One line of log.jsonl and one move of the progress bar. seconds: since the last step ended."""
        if not self.writes:
            return
        now = time.monotonic()
        seconds, self.last_time, self.step = now - self.last_time, now, done
        memory = self.peak_memory()
        line = {
            "step": done,
            "epoch": round(batch.epoch, 6),
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "num_targets": batch.num_targets,
            "num_tokens": batch.num_tokens,
            "seconds": round(seconds, 4),
            "peak_memory_bytes": memory,
        }
        self._append("log.jsonl", line)
        if self.progress is not None:
            self.progress.update(done, loss=loss, num_tokens=batch.num_tokens, seconds=seconds, memory=memory)

    def log_validation(self, done: int, loss: float, num_targets: int) -> None:
        """One line of validation.jsonl. loss: nats a target, summed over all targets and divided once."""
        if not self.writes or not num_targets:
            return
        self._append("validation.jsonl", {"step": done, "loss": loss, "num_targets": num_targets})
        self.say(f"step {done}: validation loss {loss:.4f} (perplexity {math.exp(min(loss, 99)):.2f})")
        self.last_time = time.monotonic()  # the next step does not pay for the validation

    def say(self, line: str) -> None:
        """A line on standard error, above the bar where there is one."""
        if self.progress is not None:
            self.progress.say(line)
        elif self.writes:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """status.json says how the block ended."""
        self.set_status("running", "")
        try:
            yield
        except KeyboardInterrupt:
            self.set_status("stopped", "interrupted")
            raise
        except BaseException as error:
            self.set_status("failed", str(error))
            raise
        else:
            self.set_status("done", self.summary() if self.writes else "")
        finally:
            self.close()

    def set_status(self, state: State, message: str) -> None:
        """status.json, the contract for scripts: launchers turn every non-zero exit status into 1."""
        if self.writes:
            write_json(self.path / "status.json", {"state": state, "step": self.step, "message": message})

    def summary(self) -> str:
        """A sentence on how the run went, from its log."""
        steps = read_log(self.path / "log.jsonl")
        seconds = sum(step["seconds"] for step in steps)
        tokens = sum(step["num_tokens"] for step in steps)
        return (
            f"{len(steps)} steps, {tokens:,} tokens in {clock(seconds)} ({tokens / seconds:,.0f} tokens/s), "
            f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}"
        )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_status(path: Path) -> dict[str, Any]:
    """{"state", "step", "message"}; empty where there is no run."""
    try:
        status: dict[str, Any] = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return status


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Written beside and renamed: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl or validation.jsonl."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _refuse_changes(before: Config, after: Config, path: Path) -> None:
    changes = changed_settings(before, after)
    if changes:
        raise ConfigError(
            *(
                f"{name} is {new!r}, but the run in {path} was begun with {old!r}"
                for name, (old, new) in changes.items()
            ),
            "Change these settings back, or give this run a folder of its own with --run.output_dir",
        )
