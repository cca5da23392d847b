"""`accelerate launch -m chatlora invariance CONFIG`: one gradient, however it is computed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatlora.config_files import HELP, help_text, load_config
from chatlora.distributed.signals import StopSignals

if TYPE_CHECKING:
    from chatlora.training.invariance import Certificate

USAGE = """usage: accelerate launch [--config_file FILE] -m chatlora invariance [PRESET | FILE.yaml]
       [--section.field VALUE ...]

Computes the gradient of the first global batch in every way at hand (micro-batch splits, packed and padded,
checkpointing on and off, one process and all of them) and compares each with a plain reference. Trains nothing.
Exit status 1 if one of them is off."""


def run(argv: Sequence[str]) -> None:
    if set(HELP) & set(argv):
        print(help_text(USAGE))
        return
    with StopSignals() as signals:
        loaded = load_config(argv, default="demo")

        from chatlora.distributed.runtime import start
        from chatlora.progress import print_line
        from chatlora.training.invariance import certify, with_exact_draws

        config = with_exact_draws(loaded.config)
        runtime = start(config, signals)

        def say(line: str) -> None:
            if runtime.is_main:
                print_line(line)

        for line in loaded.lines():
            say(line)
        certificate = certify(config, runtime, say)
        if runtime.is_main:
            show(certificate)
    if not certificate.holds:
        sys.exit(1)


def show(certificate: Certificate) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = f"one batch of {certificate.num_examples} examples under {certificate.engine}, {certificate.precision}"
    table = Table(title=f"{title}: relative errors", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("processes", "tokens", "micro-batches", "layout", "recomputed", "loss", "gradient", ""):
        table.add_column(column, justify="right" if column in ("tokens", "loss", "gradient") else "left")
    for outcome in certificate.outcomes:
        way = outcome.way
        good = max(outcome.loss, outcome.gradient) <= certificate.tolerance
        table.add_row(
            str(way.num_processes),
            f"{way.token_budget:,}",
            str(outcome.micro_batches),
            "padded" if way.padded else "packed",
            "yes" if way.checkpointing else "no",
            f"{outcome.loss:.1e}",
            f"{outcome.gradient:.1e}",
            "ok" if good else "OFF",
        )
    console = Console()
    console.print(table)
    worst = max(max(outcome.loss, outcome.gradient) for outcome in certificate.outcomes)
    verdict = "the gradient is the same" if certificate.holds else "THE GRADIENT IS NOT THE SAME"
    console.print(f"{verdict}: off by {worst:.1e} at most, {certificate.tolerance:.0e} is allowed")
    console.print(f"a mean of the micro-batches' means would be off by {certificate.mean_of_means:.1e}")
