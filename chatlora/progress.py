"""Long work, as a person watches it: a live line in a terminal, a line now and then in a log file."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.2
ROOM_FOR_BAR, WIDEST_BAR, GAP = " " * 8, 40, 2  # cells; where there is less room, there is no bar

Item = TypeVar("Item")


class Progress:
    """`advance` as the work gets on; other threads may `say` something meanwhile.

    total: of items, None where nobody knows; done: of them at the start. unit: of the amounts whose speed is told.
    work: all that is to be done, in the unit of `advance`'s, where time left does not go by items. window: over how
    many advances speed and time left are taken, None: all. transient: the line goes when the work is done.
    """

    def __init__(
        self,
        doing: str,
        total: int | None,
        *,
        unit: str,
        done: int = 0,
        work: float | None = None,
        window: int | None = None,
        transient: bool = False,
    ) -> None:
        self.doing, self.total, self.done, self.unit = doing, total, done, unit
        self.work_left = work if work is not None or total is None else total - done
        self.paces: deque[tuple[float, int, float]] = deque(maxlen=window)  # seconds, amount, work
        self.transient = transient
        self.within, self.numbers = "", list[str]()
        self.began = self.last_advance = self.last_line = time.monotonic()
        console = Console(stderr=True)
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(self, console=console, transient=transient)
            self.live.start()

    def advance(
        self,
        items: int = 1,
        *,
        amount: int,
        work: float | None = None,
        seconds: float | None = None,
        first: str = "",
        last: str = "",
    ) -> None:
        """seconds: that it took, where that is not since the last advance. first, last: told before and after speed."""
        now = time.monotonic()
        self.paces.append((now - self.last_advance if seconds is None else seconds, amount, work or items))
        self.last_advance = now
        self.done += items
        spent, amounts, works = (max(sum(column), 1e-9) for column in zip(*self.paces, strict=True))
        left = ""
        if self.work_left is not None:
            self.work_left -= work or items
            left = f"{clock(max(0.0, self.work_left) * spent / works)} left"
        self.within = ""
        self.numbers = [number for number in (first, left, f"{amounts / spent:,.0f} {self.unit}/s", last) if number]
        self._log("  ".join([f"{self.doing} {self._count()}", *self.numbers]), is_last=self.done == self.total)

    def watcher(
        self, where: str, what: str, total: int, *, patience: float = 0.0
    ) -> Callable[[Iterable[Item]], Iterator[Item]]:
        """What gives the items handed to it, `total` in all, and tells at which of them the work is.

        `micro-batch 3/8`, and in a log file `step 12: micro-batch 3/8`. patience: seconds before anything is told.
        """
        began, number = time.monotonic(), 0

        def watched(items: Iterable[Item]) -> Iterator[Item]:
            nonlocal number
            for item in items:
                number += 1
                if time.monotonic() - began >= patience:
                    self.within = f"{what} {number:,}/{total:,}"
                    self._log(f"{where}: {self.within}")
                yield item
            if number == total:
                self.within = ""

        return watched

    def say(self, line: str) -> None:
        """A line that stays, above the live one where there is one."""
        if self.live is not None:
            self.live.console.print(line, highlight=False, markup=False)
        else:
            print_line(line)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _log(self, line: str, *, is_last: bool = False) -> None:
        now = time.monotonic()
        is_due = now - self.last_line > SECONDS_BETWEEN_LINES or (is_last and not self.transient)
        if self.live is None and is_due:
            self.last_line = now
            self.say(line)

    def _count(self) -> str:
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line. Where it is too narrow, the last numbers go first, then bar and title, and never the count."""
        title = Text(self.doing)
        title.truncate(max(8, options.max_width // 3), overflow="ellipsis")
        told = [self._count(), self.within] if self.within else [self._count()]
        more = [*self.numbers, clock(time.monotonic() - self.began)]
        ways = [[title.plain, ROOM_FOR_BAR, *told, *more[:kept]] for kept in range(len(more), -1, -1)]
        cells = next((way for way in [*ways, [title.plain, *told], told] if _width(way) <= options.max_width), told[:1])
        bar_width = min(WIDEST_BAR, len(ROOM_FOR_BAR) + options.max_width - _width(cells))
        bar = ProgressBar(self.total, self.done, width=bar_width)
        line = Table.grid(padding=(0, GAP, 0, 0))
        for _ in cells:
            line.add_column(no_wrap=True)
        line.add_row(*(bar if cell is ROOM_FOR_BAR else Text(cell) for cell in cells))
        yield line


def _width(cells: Sequence[str]) -> int:
    return sum(map(cell_len, cells)) + GAP * (len(cells) - 1)


def print_line(line: str) -> None:
    """A line on standard error: standard output belongs to what a command was asked for."""
    sys.stderr.write(line + "\n")  # in one piece: the lines of two threads do not mix
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """`75` -> `1:15`; hours where there are any."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def track(items: Iterable[Item], doing: str, total: int | None) -> Iterator[Item]:
    """The same items. Standard error tells how far it is, how fast, and how long still, whatever process runs it."""
    progress = Progress(doing, total, unit="rows", transient=True)
    seen, last_look = 0, time.monotonic()
    try:
        for item in items:
            yield item
            seen += 1
            if time.monotonic() - last_look >= SECONDS_BETWEEN_LOOKS:
                last_look = time.monotonic()
                progress.advance(seen, amount=seen)
                seen = 0
    finally:
        progress.close()
