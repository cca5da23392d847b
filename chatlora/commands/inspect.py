"""`chatlora inspect CONFIG | DATA`: what is trained on, to be seen before it costs anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chatlora.config_files import HELP, PRESETS, Loaded, load_config, split_words
from chatlora.errors import ConfigError
from chatlora.training.named_files import refuse_missing_files

if TYPE_CHECKING:
    from rich.console import Console

    from chatlora.inspection.lengths import Lengths
    from chatlora.inspection.prepare import Inspected
    from chatlora.inspection.rows import Chosen

USAGE = """usage: chatlora inspect CONFIG | DATA [--model M] [--section.field VALUE ...]

Renders and proves the rows that a config would train on, or those of a file, folder or data set, and shows them:
what became of every row, how long they are, what each data.max_length would cost, and a few as the model sees them,
with what it learns in colour (without colours: between ⟦ and ⟧). Loads no model and makes no run directory.
  --model M        a model's tokenizer and chat template: a folder, a model of the hub, or an embedded one
  --row N          show row N of each source; FILE:N for one of them
  --longest        show the longest rows
  --risky          show the rows that are most likely not what was meant
  --strict         exit status 1 if anything was set aside, cut, altered, leaked or wrongly decoded"""
SWITCHES = ("longest", "risky", "strict")


class Asked(NamedTuple):
    loaded: Loaded
    row: str | None
    switches: frozenset[str]


def run(argv: Sequence[str]) -> None:
    if set(HELP) & set(argv):
        print(USAGE)
        return
    asked = parse(argv)
    config = asked.loaded.config
    refuse_missing_files(config)

    from rich.console import Console

    from chatlora.inspection.account import account_lines, faults
    from chatlora.inspection.console import show_lengths
    from chatlora.inspection.prepare import inspected
    from chatlora.progress import print_line
    from chatlora.terminal import harmless, printable

    found = inspected(config, print_line)
    console = Console()
    for line in account_lines(found.data.ledger):
        console.print(printable(line), soft_wrap=True)
    lengths = found.lengths()
    show_lengths(console, lengths, config.data)
    show_chosen(console, found, lengths, asked)
    wrong = faults(found.data.ledger)
    if "strict" in asked.switches and wrong:
        print_line(harmless(f"--strict: {'; '.join(wrong)}"))
        sys.exit(1)


def parse(argv: Sequence[str]) -> Asked:
    switches = frozenset(name for name in SWITCHES if f"--{name}" in argv)
    others = [word for word in argv if word not in {f"--{name}" for name in switches}]
    words = split_words(others, own=("model", "row"))
    if words.problems:
        raise ConfigError(*words.problems)
    flags = [word for flag, value in words.flags.items() for word in (f"--{flag}", value)]
    if "model" in words.own:
        flags += ["--model.name_or_path", words.own["model"]]
    rows = [name for name in words.names if not is_config(name)]
    if rows and len(words.names) > 1:
        raise ConfigError(f"one config or one source of rows at a time, but there are {', '.join(words.names)}")
    given = ["--data.train", rows[0], "--data.validation", "0"] if rows else words.names
    return Asked(load_config([*given, *flags], default="demo"), words.own.get("row"), switches)


def is_config(name: str) -> bool:
    """Whether it names settings, and not rows."""
    path = Path(name)
    if name.endswith((".yaml", ".yml")) or (path / "config.yaml").is_file():
        return True
    return (PRESETS / f"{name}.yaml").is_file() and not path.exists()


def show_chosen(console: Console, found: Inspected, lengths: Lengths, asked: Asked) -> None:
    from chatlora.inspection.console import show_as_read, show_row
    from chatlora.inspection.prepare import as_read

    for each in chosen(found, lengths, asked):
        if each.row is None:
            show_as_read(console, each, as_read(found, each.place))
        else:
            show_row(console, each, found.rows, found.tokenizer, whole=asked.row is not None)


def chosen(found: Inspected, lengths: Lengths, asked: Asked) -> list[Chosen]:
    from chatlora.inspection import rows
    from chatlora.inspection.prepare import named_rows

    others = named_rows(found)
    shown = rows.named(asked.row, found.rows, others) if asked.row is not None else []
    shown += rows.longest(found.rows, lengths) if "longest" in asked.switches else []
    shown += rows.risky(found.rows, others) if "risky" in asked.switches else []
    return shown or rows.spread(found.rows)
