"""`chatlora evaluate RUN_DIR ...`: evaluate.py on every GPU here, from any folder."""

from collections.abc import Sequence

from chatlora.commands.processes import parse, start
from chatlora.evaluation import command_line
from chatlora.evaluation.named_files import refuse_missing_files


def run(argv: Sequence[str]) -> None:
    asked = parse(argv)
    alone = False
    if not asked.is_help:  # mistakes are told once, not by every process
        request = command_line.parse(asked.words)
        alone = request.predictions is not None
        if not alone:
            refuse_missing_files(request)
    start("evaluate", asked, alone=alone)
