"""What `chatlora inspect` shows, and the one row at the start of a training."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from chatlora.config import DataConfig
from chatlora.data.dataset import ExampleSet
from chatlora.data.store import count_targets
from chatlora.inspection.lengths import Lengths
from chatlora.inspection.pieces import Piece, has_colours, marked, pieces
from chatlora.inspection.rows import Chosen, Rows
from chatlora.reading.conversation import Conversation
from chatlora.terminal import printable

MOST_CHARACTERS = 700  # of one piece of a row that nobody asked for by name
BAR = 32


def show_lengths(console: Console, lengths: Lengths, data: DataConfig) -> None:
    """A small histogram, and what each `max_length` would cost under the `over_length` chosen."""
    if not lengths.rows.size:
        return
    middle, most = np.percentile(lengths.rows, [50, 95], method="higher")
    console.print(
        f"\nlengths of {len(lengths.rows):,} rows, whole: half up to {middle:,} tokens, 95 % up to {most:,}, "
        f"the longest {lengths.rows.max():,}",
        highlight=False,
        soft_wrap=True,
    )
    bins = lengths.histogram()
    highest = max(rows for _, _, rows in bins)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right")
    grid.add_column(justify="right")
    for low, high, rows in bins:
        grid.add_row(f"{low:,} to {high:,}", f"{rows:,}", ProgressBar(highest, rows, width=BAR))
    console.print(grid)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("max_length", "rows that lose", "targets lost", ""):
        table.add_column(column, justify="right", no_wrap=bool(column))
    for limit in lengths.limits(data.max_length):
        rows, targets = lengths.lost(limit, data.over_length)
        share = f"{100 * targets / max(1, lengths.num_targets):.1f} %"
        chosen = f"data.max_length, {data.over_length}" if limit == data.max_length else ""
        table.add_row(f"{limit:,}", f"{rows:,}", f"{targets:,} ({share})", chosen)
    console.print(table)


def show_row(console: Console, chosen: Chosen, rows: Rows, tokenizer: Any, *, whole: bool) -> None:
    """A row's examples as the model sees them."""
    assert chosen.row is not None
    examples = rows.examples(chosen.row)
    for number, example in enumerate(examples, start=1):
        which = f", example {number} of {len(examples)}" if len(examples) > 1 else ""
        counts = f"{len(example.input_ids):,} tokens, {count_targets(example.labels):,} of them targets"
        _headline(console, chosen, f"{which}: {counts}")
        shown = pieces(tokenizer, example)
        text = marked(shown if whole else _shortened(shown), colours=has_colours(console))
        console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")


def show_as_read(console: Console, chosen: Chosen, conversation: Conversation | None) -> None:
    """A row of which nothing is trained: what was read of it."""
    _headline(console, chosen, ": not trained")
    for message in conversation.messages if conversation else ():
        console.print(printable(f"{message.role}: {message.content}"), soft_wrap=True)


def _headline(console: Console, chosen: Chosen, told: str) -> None:
    console.print()
    why = f" ({chosen.why})" if chosen.why else ""
    console.print(Text("── ", style="bold") + printable(f"{chosen.place}{told}{why}"), soft_wrap=True)


def show_one_row(console: Console, examples: ExampleSet, tokenizer: Any) -> None:
    """Three lines on a terminal: a row's place, what stands before its first reply, and that reply."""
    if not console.is_terminal or not len(examples):
        return
    (example,) = examples.fetch([0])
    (place,) = examples.places([0])
    colours = has_colours(console)
    how = "the targets in colour" if colours else "the targets marked"
    first = printable(f"{Path(place).name} as the model sees it, {how}")
    before, reply = _around_first_reply(pieces(tokenizer, example))
    room = console.width - 2
    lines = [marked([Piece(before[-room:], False)], colours=colours), marked([Piece(reply, True)], colours=colours)]
    for line in (first, *lines):
        line.truncate(console.width, overflow="ellipsis")
        console.print(line, no_wrap=True, highlight=False)


def _around_first_reply(shown: Sequence[Piece]) -> tuple[str, str]:
    reply = next((number for number, piece in enumerate(shown) if piece.is_target), 0)
    before = "".join(piece.text for piece in shown[:reply])
    return _one_line(before), _one_line(shown[reply].text)


def _one_line(text: str) -> str:
    return text.replace("\n", "↵")


def _shortened(shown: Iterable[Piece]) -> list[Piece]:
    """Long pieces without their middle."""
    half = MOST_CHARACTERS // 2
    return [
        piece
        if len(piece.text) <= MOST_CHARACTERS
        else Piece(f"{piece.text[:half]} … {piece.text[-half:]}", piece.is_target)
        for piece in shown
    ]
