"""Who may train in a run directory, and whether it is still the same run."""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from chatlora.config import Config, changed_settings, trajectory_hash
from chatlora.config_files import config_from_file
from chatlora.errors import ConfigError, LaunchError
from chatlora.run_directory import read_status

# What a run was begun with besides its settings: environment.json's name -> how it is told.
INPUTS = {
    "data": "the contents of data.train or data.validation",
    "base_model": "the base model under model.name_or_path",
    "rendering": "the tokenizer, the chat template or what it is told",
    "precision": "the precision that run.precision stands for on this machine",
}


class Claim(NamedTuple):
    """What rank 0 found out about a run's directory, for all ranks."""

    config: Config  # with output_dir, chat_template_date and what the template is told filled in
    finished: bool


def claim(config: Config, name: str) -> tuple[Claim, FileLock]:
    """Settle the run's directory and lock it against a second run. For rank 0 alone.

    `run.output_dir: null` means runs/NAME-HASH, so that the same config goes on with its own run. Raises ConfigError
    where a named directory holds a run with another trajectory, LaunchError where another process trains in it.
    """
    path = config.run.output_dir or Path("runs") / f"{name}-{trajectory_hash(config)}"
    config = config.with_values("run", output_dir=path)
    finished = False
    if (path / "config.yaml").is_file():
        before = config_from_file(path / "config.yaml")
        config = _as_settled(config, before)
        _refuse_changes(before, config, path)
        same_length = before.optim.epochs == config.optim.epochs and before.optim.max_steps == config.optim.max_steps
        finished = same_length and read_status(path).get("state") == "done"
    if config.model.chat_template_date is None:
        config = config.with_values("model", chat_template_date=date.today())
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LaunchError(
            f"another process is training in {path}: wait for it, or give this run a folder with --run.output_dir"
        ) from None
    return Claim(config, finished), lock


def refuse_other_inputs(path: Path, environment: Mapping[str, Any]) -> None:
    """Raise ConfigError, by name, where a run would go on with other data, model or template under the same paths."""
    try:
        before = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    changed = [what for name, what in INPUTS.items() if before[name] != environment[name]]
    if changed:
        raise ConfigError(
            *(f"{what} changed since the run in {path} was begun" for what in changed),
            "Put it back as it was, or give this run a folder of its own with --run.output_dir",
        )


def _as_settled(config: Config, before: Config) -> Config:
    """What a run settles by itself when it begins stays as it was settled."""
    told, then = config.model.chat_template_kwargs, before.model.chat_template_kwargs
    if "enable_thinking" in then:
        told = {"enable_thinking": then["enable_thinking"], **told}
    day = config.model.chat_template_date or before.model.chat_template_date
    return config.with_values("model", chat_template_kwargs=told, chat_template_date=day)


def _refuse_changes(before: Config, after: Config, path: Path) -> None:
    changes = changed_settings(before, after)
    if changes:
        raise ConfigError(
            *(
                f"{name} is {new!r}, but the run in {path} was begun with {old!r}"
                for name, (old, new) in changes.items()
            ),
            "Change these settings back, or give this run a folder of its own with --run.output_dir",
        )
