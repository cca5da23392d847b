"""One run on disk: what it is, how it stands, what happened in each step."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from filelock import FileLock

from chatlora.config import BestBy, Config
from chatlora.config_files import config_text
from chatlora.config_rows import UNNAMED
from chatlora.disk import sweep, sync, write_json, write_text
from chatlora.errors import CheckpointError, Stopped, this_rank
from chatlora.progress import Progress, clock, print_line
from chatlora.run_log import LOG, LOGS, VALIDATION, cut_back, read_log

LONG_STEP = 10.0  # seconds after which a step tells its micro-batches
STEPS_FOR_SPEED = 20  # speed and time left come from the last ones, since the first are slow

State = Literal["running", "done", "stopped", "failed"]


Item = TypeVar("Item")
Each = TypeVar("Each", covariant=True)


class Batched(Protocol[Each]):
    """Micro-batches made one at a time, whose number is known before."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Each]: ...


class Counted(Protocol):
    """What the log says of a batch."""

    @property
    def epoch(self) -> float: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


class Batches(Protocol):
    """What is said of a run that goes on."""

    def examples_before(self, step: int) -> int: ...
    def epochs_before(self, step: int) -> float: ...


class RunDirectory:
    """The files of a run. On other ranks than 0 every method does nothing, so that the loop need not ask."""

    def __init__(self, path: Path, *, lock: FileLock | None, peak_memory: Callable[[], int]) -> None:
        self.path = path
        self.lock = lock  # held until the process ends
        self.writes = lock is not None
        self.peak_memory = peak_memory
        self.progress: Progress | None = None
        self.step = 0
        self.last_time = time.monotonic()
        self.last_seconds: deque[float] = deque(maxlen=5)  # that steps took

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def describe(self, config: Config, environment: Mapping[str, Any], ledger: Mapping[str, Any]) -> None:
        """Write what the run is."""
        if self.writes:
            sweep(self.path)
            write_text(self.path / "config.yaml", config_text(config))
            write_json(self.path / "environment.json", environment)
            write_json(self.path / "ledger.json", ledger)
            if self._is_decided("done"):
                self._tell("running", "")

    def resume_logs(self, step: int, num_steps: int, batches: Batches) -> None:
        """Cut the logs back to the checkpoint, or empty them on a fresh run, and show the progress."""
        self.step = step
        if not self.writes:
            return
        for name in LOGS:
            cut_back(self.path / name, step)
        if step:
            seen = f"{batches.examples_before(step):,} examples, {batches.epochs_before(step):.2f} epochs"
            self.say(f"going on after step {step:,} of {num_steps:,}: {seen} are done")
        self.progress = Progress("step", num_steps, done=step, unit="tokens", window=STEPS_FOR_SPEED)
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
        self.last_seconds.append(seconds)
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
        self._append(LOG, line)
        if self.progress is not None:
            self.progress.advance(
                amount=batch.num_tokens,
                seconds=seconds,
                first=f"loss {loss:.4f}",
                last=f"{memory / 2**30:.1f} GiB",
            )

    def watch_step(self, micro_batches: Batched[Item]) -> Iterable[Item]:
        """The same micro-batches. Where a step takes long, the person sees which of them it is at."""
        if self.progress is None:
            return micro_batches
        where, total = f"step {self.step + 1}", len(micro_batches)
        return self.progress.watcher(where, "micro-batch", total, patience=LONG_STEP)(micro_batches)

    def watch_validation(self, lots: Sequence[Batched[Item]]) -> Iterable[Iterable[Item]]:
        """The same lots of micro-batches. The person sees how far the validation is."""
        if self.progress is None:
            return lots
        return map(self.progress.watcher(f"step {self.step}", "validation", sum(map(len, lots))), lots)

    def log_validation(self, done: int, sums: Mapping[str, tuple[float, int]], best_by: BestBy) -> None:
        """One line of validation.jsonl. sums: of each set, its summed loss in nats and its targets.

        The line's `loss`, in nats a target, decides what is best.
        """
        if not self.writes:
            return
        sets = {name: {"loss": total / targets, "num_targets": targets} for name, (total, targets) in sums.items()}
        num_targets = sum(targets for _, targets in sums.values())
        mean = sum(total for total, _ in sums.values()) / num_targets
        loss = mean if best_by == "mean" else next(iter(sets.values()))["loss"]
        line: dict[str, Any] = {"step": done, "loss": loss, "num_targets": num_targets}
        told = f"step {done}: validation loss {loss:.4f} (perplexity {math.exp(min(loss, 99)):.2f})"
        if list(sets) != [UNNAMED]:
            line["sets"] = sets
            told += "".join(f", {name} {each['loss']:.4f}" for name, each in sets.items())
        self._append(VALIDATION, line)
        self.say(told)
        self.last_time = time.monotonic()  # the next step does not pay for the validation

    def validated(self, step: int) -> bool:
        """Whether the validation after this step has been logged."""
        return any(line["step"] == step for line in read_log(self.path / VALIDATION))

    def best_step(self) -> int | None:
        """The step with the best validation loss so far, the earliest of equals."""
        lines = read_log(self.path / VALIDATION)
        return int(min(lines, key=lambda line: (math.isnan(line["loss"]), line["loss"]))["step"]) if lines else None

    def stalled_at(self, patience: int | None) -> int | None:
        """The step of the first validation with which `patience` of them had brought no better loss. From the log."""
        best, since = math.nan, 0
        for line in read_log(self.path / VALIDATION):
            better = line["loss"] < best or math.isnan(best)
            best, since = (line["loss"], 0) if better else (best, since + 1)
            if since == patience:
                return int(line["step"])
        return None

    def has_stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought no better loss. Told from the log, as a resume does."""
        stalled = self.stalled_at(patience) is not None
        if stalled:
            self.say(f"no better validation loss in {patience} validations since step {self.best_step()}: it ends here")
        return stalled

    def sync_logs(self) -> None:
        """Wait until the logs are on the disk: they are never behind a checkpoint."""
        for name in LOGS:
            with (self.path / name).open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        sync(self.path)

    def say(self, line: str) -> None:
        """A line on standard error, above the bar where there is one. From any thread."""
        if self.progress is not None:
            self.progress.say(line)
        elif self.writes:
            print_line(line)

    def finishing(self) -> str:
        """`finishing step 12, about 40 s`, by the steps before it; where these tell no more, what it took so far."""
        spent = time.monotonic() - self.last_time
        left = sum(self.last_seconds) / max(1, len(self.last_seconds)) - spent
        told = f", about {left:,.0f} s" if left >= 0.5 else f", {spent:,.0f} s so far" if spent >= 0.5 else ""
        return f"finishing step {self.step + 1:,}{told}"

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """status.json, the contract for scripts, says how the block ended: launchers turn 75 and 2 into 1."""
        if self.writes and not self._is_decided("done"):  # else once describe() accepts what it goes on with
            self._tell("running", "")
        try:
            yield
        except Stopped as stop:
            if self.writes and not self._is_decided("done", "failed"):
                self._tell("stopped", str(stop))
            raise
        except SystemExit:  # rank 0 tells why
            raise
        except BaseException as error:
            # Of all ranks, the first that fails says why: what follows on the others is its doing.
            if self.path.is_dir() and not self._is_decided("done", "failed"):
                with suppress(OSError):  # a full disk does not hide the error that it caused
                    self._tell("failed", this_rank() + (str(error) or type(error).__name__))
            raise
        else:
            if self.writes:
                self._tell("done", self.summary())
        finally:
            self.close()

    def _tell(self, state: State, message: str) -> None:
        write_json(self.path / "status.json", {"state": state, "step": self.step, "message": message})

    def _is_decided(self, *states: State) -> bool:
        return read_status(self.path).get("state") in states

    def summary(self) -> str:
        """A sentence on how the run went, from its log."""
        steps = read_log(self.path / LOG)
        if not steps:
            return f"{LOG} is missing or empty"
        seconds = sum(step["seconds"] for step in steps)
        tokens = sum(step["num_tokens"] for step in steps)
        return (
            f"{len(steps)} steps, {tokens:,} tokens in {clock(seconds)} ({tokens / max(seconds, 1e-9):,.0f} tokens/s), "
            f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}"
        )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path / name} could not be written ({error}): free some space and start the run again to go on "
                "from the newest checkpoint"
            ) from error


def read_status(path: Path) -> dict[str, Any]:
    """{"state", "step", "message"}; empty where there is no run."""
    try:
        status: dict[str, Any] = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return status
