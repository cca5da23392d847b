"""`chatlora train [PRESET | FILE.yaml] [--section.field VALUE ...]`: train.py on every GPU here, from any folder."""

from collections.abc import Sequence

from chatlora.commands.processes import parse, start
from chatlora.config_files import load_config
from chatlora.training.named_files import refuse_missing_files


def run(argv: Sequence[str]) -> None:
    asked = parse(argv)
    if not asked.is_help:
        # Mistakes are told once, not by every process.
        refuse_missing_files(load_config(asked.words, default="demo").config)
    start("train", asked)
