"""Long work, as a person watches it: a live bar in a terminal, a line now and then in a log file."""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.2
WINDOW = 20  # steps over which the speed is taken


Item = TypeVar("Item")


class TrainingProgress:
    """`update` once a step. Speed and time left come from the last `WINDOW` steps, since the first ones are slow."""

    def __init__(self, num_steps: int, first_step: int = 0) -> None:
        self.num_steps = num_steps
        self.done = first_step
        self.recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds, tokens
        self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=num_steps, completed=first_step)
            self.bar.start()

    def update(self, done: int, *, loss: float, num_tokens: int, seconds: float, memory: int) -> None:
        self.done = done
        self.recent.append((seconds, num_tokens))
        spent = sum(seconds for seconds, _ in self.recent)
        speed = sum(tokens for _, tokens in self.recent) / spent
        left = (self.num_steps - done) * spent / len(self.recent)
        numbers = f"loss {loss:.4f}  {speed:,.0f} tokens/s  {memory / 2**30:.1f} GiB  {clock(left)} left"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, description=numbers)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES or done == self.num_steps:
            self.last_line = time.monotonic()
            self.say(f"step {done}/{self.num_steps}  {numbers}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """`75` -> `1:15`; hours where there are any."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def track(items: Iterable[Item], doing: str, total: int | None) -> Iterator[Item]:
    """The same items. Standard error tells how far it is, how fast, and how long still, whatever process runs it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.monotonic()
    last_look = last_line = began
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=total)
        for number, item in enumerate(items):
            yield item
            now = time.monotonic()
            if now - last_look < SECONDS_BETWEEN_LOOKS:
                continue
            last_look, rate = now, (number + 1) / (now - began)
            bar.update(task, completed=number + 1, description=f"{doing}  {rate:,.0f} rows/s")
            if not console.is_terminal and now - last_line > SECONDS_BETWEEN_LINES:
                last_line = now
                print(_line(doing, number + 1, total, rate), file=sys.stderr, flush=True)


def _line(doing: str, done: int, total: int | None, rate: float) -> str:
    if total is None:
        return f"{doing}: {done:,} rows, {rate:,.0f} rows/s"
    left = max(0, total - done) / rate
    return f"{doing}: {done:,} of {total:,} rows, {rate:,.0f} rows/s, {left / 60:.1f} minutes left"
