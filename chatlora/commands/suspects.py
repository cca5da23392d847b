"""`chatlora suspects RUN [--top 40]`: training rows that are most likely mislabelled, foreign or garbled."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatlora.distributed.signals import StopSignals

NUMBERS = ("suspicion", "loss", "usual_loss", "loss_behind_other_prompts", "base_loss")


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="chatlora suspects",
        description="Rank a finished run's training rows. Suspicious is a loss under the adapter that is high beside "
        "the other rows of its source, and hardly higher behind other rows' prompts. Writes RUN/suspects.jsonl.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory with its adapter/")
    parser.add_argument("--top", metavar="N", type=int, default=40, help="how many rows are named (40)")
    given = parser.parse_args(list(argv))
    if given.top < 1:
        parser.error("--top is at least 1")
    with StopSignals() as signals:
        from chatlora.distributed.runtime import start
        from chatlora.progress import print_line
        from chatlora.training.suspects import SUSPECTS, config_of_run, find_suspects

        config = config_of_run(given.run)
        records = find_suspects(given.run, config, start(config, signals), given.top, print_line)
    show(records)
    print_line(f"{len(records):,} rows are in {given.run / SUSPECTS}")


def show(records: Sequence[Mapping[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from chatlora.terminal import printable

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("suspicion", "loss", "usual", "other prompts", "base", "row", "worst tokens"):
        is_text = column in ("row", "worst tokens")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    for record in records:
        worst = [token["token"].replace("\n", "↵") for token in record["worst_tokens"]]
        numbers = [record[name] for name in NUMBERS]
        table.add_row(
            f"{numbers[0]:.1f}",
            *(f"{number:.2f}" for number in numbers[1:]),
            printable(Path(record["place"]).name),
            printable(" ".join(f"'{token}'" for token in worst)),
        )
    Console().print(table)
