"""A long walk over rows, as a person watches it: a live bar in a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.2

Item = TypeVar("Item")


def watched(items: Iterable[Item], doing: str, total: int | None) -> Iterator[Item]:
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
