"""`chatlora merge RUN|ADAPTER DST`: base and adapter in one model, checked against them before it gets its name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlora.merging.judgement import Distance, Verdict


TITLE = "Distance from base and adapter (logits: the largest; KL in nats; same best token, same text)"

MUCH = 0.1  # of the adapter's effect, that rounding may cost without a warning


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="chatlora merge",
        description="Write the base model with a trained adapter added to its weights, file by file, and check it, "
        "reopened from the disk, against base and adapter. The same command goes on after an interruption.",
    )
    parser.add_argument("given", metavar="RUN|ADAPTER", type=Path, help="a finished run, or an adapter's folder")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write; it must not be there yet")
    parser.add_argument("--base", metavar="M", help="where the base model is now, if not where it was in training")
    parser.add_argument("--data", metavar="F", help="rows to check on [the run's validation rows]")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the check's computing [fp32]")
    given = parser.parse_args(list(argv))

    import torch

    from chatlora.errors import MergeError
    from chatlora.merging.asked import asked_for
    from chatlora.merging.merge import merge
    from chatlora.progress import print_line

    precision = torch.float32 if given.precision == "fp32" else torch.bfloat16
    asked = asked_for(given.given, given.base, given.data, precision)
    verdict = merge(asked, given.target, print_line)
    show(verdict)
    if verdict.faults:
        raise MergeError(*verdict.faults, f"nothing was left at {given.target}")
    print_line(f"{given.target}: merged and checked; it loads as any model")
    if asked.base.chat_template_kwargs:
        told = json.dumps(asked.base.chat_template_kwargs, ensure_ascii=False)
        print_line(f"its template was told {told} in training, and a server has to be: see docs/merging.md")


def show(verdict: Verdict) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from chatlora.progress import print_line

    def row(name: str, of: Distance, texts: str) -> tuple[str, ...]:
        return name, f"{of.logits:.3g}", f"{of.kl:.3g}", f"{of.kl_max:.3g}", f"{of.same_best:.1%}", texts

    allowed = [f"{verdict.tolerance[name]:.3g}" for name in ("logits", "kl", "kl_max")]
    table = Table(box=SIMPLE_HEAD, title=TITLE, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("logits", "KL", "largest KL", "best token", "text"):
        table.add_column(column, justify="right")
    table.add_row(*row("merged, from the disk", verdict.merged, f"{verdict.same_texts}/{verdict.texts}"))
    table.add_row("allowed", *allowed, "", "")
    table.add_row(*row("rounding alone", verdict.rounding, f"{verdict.same_texts_rounded}/{verdict.texts}"))
    table.add_row(*row("base without adapter", verdict.base, ""))
    Console().print(table)
    share = verdict.rounding.kl / verdict.base.kl if verdict.base.kl else 1.0
    told = f"{100 * share:.2f} %" if share > 1e-4 else "less than 0.01 %"
    print_line(f"rounding costs {told} of what the adapter does (mean KL)")
    if share > MUCH:
        print_line(
            "warning: the adapter is small beside the steps of the checkpoint's type; served beside its base it loses "
            "nothing"
        )
