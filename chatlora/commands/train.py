"""`chatlora train [PRESET | FILE.yaml] [--section.field VALUE ...]`: train.py on every GPU here, from any folder."""

from collections.abc import Sequence

from chatlora.commands.processes import parse, start
from chatlora.config_files import load_config


def run(argv: Sequence[str]) -> None:
    asked = parse(argv)
    if not asked.is_help:
        load_config(asked.words, default="demo")  # its mistakes are told once, not by every process
    start("train", asked)
