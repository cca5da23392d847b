"""Files and folders on disk: there whole or not at all, synced, and as readable as the umask says.

What is written stands beside its place until it is whole, under `.NAME.HOST.PID.partial`: a reader sees the old one or
the new one, never a part, and `sweep` knows what a killed process left. For an instant in which one folder takes the
place of another, neither is there.
"""

import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Within, a name beside `path`, free for a file or a folder, which takes the place of `path` once the block ends.

    Where the block fails, `path` stays as it was.
    """
    beside = name_beside(path)
    _remove(beside)
    try:
        yield beside
        settle(beside)
        if path.is_dir() and not path.is_symlink():  # no folder is renamed onto one that holds something
            old = path.with_name(f".{path.name}.old{PARTIAL}")
            _remove(old)
            path.rename(old)
            beside.rename(path)
            _remove(old)
        else:
            beside.replace(path)
        sync(path.parent)
    finally:
        _remove(beside)


def name_beside(path: Path) -> Path:
    """A name beside `path` that no other process uses, and that `sweep` knows."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}{PARTIAL}")


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed processes were writing to `name` in `folder`. For whoever holds its lock."""
    pattern = name if name == "*" else glob.escape(name)
    for left_over in folder.glob(f".{pattern}.*{PARTIAL}"):
        _remove(left_over)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def settle(path: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk, and let the umask say who reads it."""
    if path.is_dir():
        wanted = path.stat().st_mode & 0o666
        for inside in path.iterdir():
            mode = inside.stat().st_mode & 0o777
            if wanted & ~mode:  # safetensors writes through a temporary file of 0600, whatever the umask
                inside.chmod(mode | wanted)
            settle(inside)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that a process of ours appends to; the last one, where a kill cut it short, left out."""
    text, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in text.split(b"\n") if line]
