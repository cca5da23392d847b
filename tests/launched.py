"""`accelerate launch`, as one types it.

    told = launched("train", ["my.yaml"], cwd, config="zero3", processes=2, planted="PYTHON")

What is planted is run first, in every process: this file is then what accelerate launches, with the script's name in
front of its arguments.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def launch_command(
    script: str, argv: Sequence[str], config: str | None = None, processes: int = 1, words: Sequence[str] = ()
) -> list[str]:
    """config: a file of accelerate_configs/; words: more of accelerate's own."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config is not None:
        command += ["--config_file", str(REPOSITORY / "accelerate_configs" / f"{config}.yaml")]
    if processes > 1:
        command += ["--num_processes", str(processes), "--main_process_port", "0"]  # any port that is free
    return [*command, *words, str(REPOSITORY / script), *argv]


def launched(
    script: str,
    argv: Sequence[str],
    cwd: Path,
    *,
    config: str | None = None,
    processes: int = 1,
    words: Sequence[str] = (),
    planted: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    if planted is None:
        command = launch_command(f"{script}.py", argv, config, processes, words)
    else:
        command = launch_command("tests/launched.py", [script, *argv], config, processes, words)
    variables = {**os.environ, **(environment or {}), "PLANTED": planted or ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=variables)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    from chatlora.errors import run_as_script

    exec(os.environ["PLANTED"], {})
    run_as_script(importlib.import_module(sys.argv.pop(1)).main)
