"""`chatlora evaluate RUN_DIR ...`: evaluate.py on every GPU here, from any folder."""

from collections.abc import Sequence

from chatlora.commands.processes import parse, start
from chatlora.evaluation import command_line


def run(argv: Sequence[str]) -> None:
    asked = parse(argv)
    # Mistakes are told once, not by every process.
    request = None if asked.is_help else command_line.parse(asked.words)
    start("evaluate", asked, alone=request is not None and request.predictions is not None)
