"""`chatlora schema`: the JSON schema of a config file."""

import json
from collections.abc import Sequence

from chatlora.config import Config


def run(argv: Sequence[str]) -> None:
    del argv  # takes no arguments
    print(json.dumps(Config.model_json_schema(), indent=2))
