"""`checkpoints/step-000100`: the names under a run's checkpoints, and what they say."""

import re
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"  # a checkpoint that holds it is whole, or was
NAME = re.compile(r"step-(\d{6,})")
BEING_WRITTEN, BEING_DELETED = ".writing-", ".deleting-"
LEFT_OVER = re.compile(rf"\.(writing|deleting)-{NAME.pattern}")


def home_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands under `folder`."""
    return folder / f"step-{step:06}"


def step_of(home: Path) -> int:
    return int(home.name.removeprefix("step-"))


def published(folder: Path) -> list[Path]:
    """The checkpoints under a folder, oldest first. Anything else in it is none of ours."""
    found = [path for path in _folders(folder) if NAME.fullmatch(path.name) and home_of(folder, step_of(path)) == path]
    return sorted(found, key=step_of)


def left_over(folder: Path) -> list[Path]:
    """What a killed process left half written or half deleted."""
    return [path for path in _folders(folder) if LEFT_OVER.fullmatch(path.name)]


def _folders(folder: Path) -> Iterator[Path]:
    """What is really a folder in `folder`: no file, no link."""
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
