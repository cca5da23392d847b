"""train.py or evaluate.py with something planted: `accelerate launch tests/launched.py SCRIPT ARGUMENTS`.

PLANTED holds Python that is run first, in every process.
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from chatlora.errors import run_as_script

    exec(os.environ.get("PLANTED", ""), {})
    script = sys.argv.pop(1)
    run_as_script(importlib.import_module(script).main)
