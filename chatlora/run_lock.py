"""Who may train in a run directory, and whether it is still the same run."""

import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from chatlora.checkpoint_names import MANIFEST, published, step_of
from chatlora.config import Config, changed_settings, trajectory_hash, with_absolute_paths
from chatlora.config_files import config_from_file
from chatlora.errors import ConfigError, LaunchError
from chatlora.run_directory import read_status

# What a run was begun with besides its settings: environment.json's name -> how it is told.
INPUTS = {
    "data": "the contents of data.train or data.validation",
    "base_model": "the base model under model.name_or_path",
    "init_from": "the adapter under lora.init_from",
    "rendering": "the tokenizer, the chat template or what it is told",
    "precision": "the precision that run.precision stands for on this machine",
}


Contents = Callable[[Config], Mapping[str, Any]]  # setting -> what stands in the files that it names


class Opened(NamedTuple):
    """What rank 0 found out about a run's directory, for all ranks."""

    config: Config  # with output_dir, chat_template_date and what the template is told filled in
    finished: bool


def lock_run(config: Config, name: str, contents_of: Contents) -> tuple[Opened, FileLock]:
    """Settle the run's directory and lock it against a second run. For rank 0 alone.

    `run.output_dir: null` means runs/NAME-HASH, so that the same config goes on with its own run. Raises ConfigError
    where it would go on with a run of another trajectory, or `checkpoint.resume` asks for what cannot be, LaunchError
    where another process trains in the directory.
    """
    path = config.run.output_dir or Path("runs") / f"{name}-{trajectory_hash(config)}"
    config = with_absolute_paths(config.with_values("run", output_dir=path))
    _refuse_resume(config.checkpoint.resume, path)
    begun, finished = resume_source(config), False
    if begun is not None and (begun / "config.yaml").is_file():
        before = config_from_file(begun / "config.yaml")
        config = _as_settled(config, before)
        _refuse_changes(before, config, begun)
        finished = begun == path and _is_finished(path) and _ends(before) == _ends(config)
        if finished:
            _refuse_other_contents(contents_of(config), path)
        elif begun == path:
            _refuse_to_begin_again(path)
    if config.model.chat_template_date is None:
        config = config.with_values("model", chat_template_date=date.today())
    return Opened(config, finished), _locked(path)


def resume_source(config: Config) -> Path | None:
    """The run directory that this run goes on from: its own, that of the checkpoint in `checkpoint.resume`, or none.

    A run that is neither finished nor has a checkpoint starts at step 0 in any case, so that nothing holds it to what
    it was begun with.
    """
    own, resume = config.run.output_dir, config.checkpoint.resume
    assert own is not None, "lock_run() settles it"
    if _checkpoints_in(own) or _is_finished(own):
        return own
    return None if resume in ("auto", "never") else Path(resume).absolute().parent.parent


def _is_finished(path: Path) -> bool:
    # Without its adapter, a finished run exports it again from its last checkpoint.
    return (path / "adapter" / "adapter_config.json").is_file() and read_status(path).get("state") == "done"


def _refuse_to_begin_again(path: Path) -> None:
    """Raise ConfigError where a finished run would go on, longer than it was, and its checkpoints are gone."""
    if not _checkpoints_in(path):
        raise ConfigError(
            f"the run in {path} is finished, and without its checkpoints it cannot go on: it would begin again at step "
            "0 and overwrite its adapter. Put checkpoints/ back, or give this run a folder of its own with "
            "--run.output_dir (lora.init_from takes the adapter along)"
        )


def _locked(path: Path) -> FileLock:
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise LaunchError(
            f"another process is training in {path}: wait for it, or give this run a folder with --run.output_dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"run.output_dir is {path}, where no run can be written ({error.strerror or error}): give it another "
            "folder with --run.output_dir"
        ) from None
    return lock


def _environment_of(path: Path) -> dict[str, Any]:
    try:
        environment: dict[str, Any] = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return environment


def _refuse_other_contents(now: Mapping[str, Any], path: Path) -> None:
    before = _environment_of(path).get("contents")
    if before is None:  # of an older version
        return
    changed = [setting for setting, contents in before.items() if now.get(setting) != contents]
    if changed:
        raise ConfigError(
            *(f"the contents of {setting} changed since the run in {path} was finished" for setting in changed),
            "Put them back as they were, or give this run a folder of its own with --run.output_dir",
        )


def refuse_other_inputs(config: Config, environment: Mapping[str, Any]) -> None:
    """Raise ConfigError, by name, where a run would go on with other data, model or template under the same paths."""
    path = resume_source(config)
    if path is None:
        return
    before = _environment_of(path)
    if not before:
        return
    changed = [what for name, what in INPUTS.items() if before.get(name) != environment.get(name)]
    if changed:
        raise ConfigError(
            *(f"{what} changed since the run in {path} was begun" for what in changed),
            "Put it back as it was, or give this run a folder of its own with --run.output_dir",
        )


def refuse_shorter(config: Config, num_steps: int, stalled_at: int | None) -> None:
    """Raise ConfigError where a run would go on that is longer already than it shall become.

    stalled_at: the step with which its validations, as logged, end it.
    """
    path = resume_source(config)
    if path is None:
        return
    own = published(path / "checkpoints")
    done = step_of(own[-1]) if path == config.run.output_dir and own else 0
    end = min(num_steps, num_steps if stalled_at is None else stalled_at)
    if done > end:
        raise ConfigError(
            f"the run in {path} has {done:,} steps already, and with these settings it ends after step {end:,}: give "
            "this run a folder of its own with --run.output_dir"
        )


def _checkpoints_in(path: Path) -> list[Path]:
    """Of a run, oldest first."""
    return published(path / "checkpoints")


def _refuse_resume(resume: str, path: Path) -> None:
    """Raise ConfigError where checkpoints would come to stand in the way of each other, or there is none."""
    own = _checkpoints_in(path)
    elsewhere = "give this run a folder of its own with --run.output_dir"
    if resume == "auto":
        return
    if resume == "never":
        if own or _is_finished(path):
            held = "checkpoints" if own else "a finished run"
            raise ConfigError(f"checkpoint.resume is never, but {path} holds {held}: {elsewhere}")
        return
    home = Path(resume)
    if not (home / MANIFEST).is_file():
        raise ConfigError(f"checkpoint.resume is {resume}, which is no checkpoint: auto, never, or a step-... folder")
    if home.resolve() in [other.resolve() for other in own[:-1]]:
        raise ConfigError(
            f"checkpoint.resume is {home}, but {own[-1]} is newer: move what is newer away, or {elsewhere}"
        )


def _ends(config: Config) -> tuple[Any, ...]:
    """What decides when a run is over."""
    return config.optim.epochs, config.optim.max_steps, config.checkpoint.stop_after_no_gain


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
