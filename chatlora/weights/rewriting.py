"""A checkpoint's files, rewritten one by one: what a killed process has finished is not done again.

`target` is the folder in which the new files appear, each when it is whole. A receipt in it says which are, what they
hold, and what they were made of: the same command goes on with them, another one is refused.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from chatlora.disk import PARTIAL, sha256_of, sweep, write_json
from chatlora.errors import ModelError
from chatlora.progress import clock
from chatlora.weights.shards import Shard, known_sha256

SPARE = 64 * 2**20  # bytes of the disk that stay free

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Files -> files. write: makes a new one of an old one and returns its entry in the receipt, with its `size`.

    shards: the original's file -> the new one's name, in order. identity: of all that the new files are made of.
    """

    source: Path
    target: Path
    shards: Mapping[Path, str]
    receipt: str
    identity: Mapping[str, Any]
    what: str  # "conversion"
    doing: str  # "converting"
    write: Callable[[Path, str], dict[str, Any]]


@contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Within, no other process writes into `folder`. Raises ModelError where one does, or none can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder.parent} cannot be written ({error.strerror}); give another folder") from None
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            yield
    except Timeout:
        raise ModelError(f"{folder}: another process is {doing} into it; wait for it") from None


def receipt_in(rewriting: Rewriting) -> dict[str, Any]:
    """The receipt of what `target` holds, or a new one. Raises ModelError if it is of another rewriting."""
    folder, doing = rewriting.target, rewriting.doing
    fresh: dict[str, Any] = {"state": doing, "source": dict(rewriting.identity), "shards": {}}
    path = folder / rewriting.receipt
    if not path.is_file():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")
        if any(not name.endswith(PARTIAL) for name in others):
            raise ModelError(f"{folder}: is not empty ({few(others)}); give a new folder")
        return fresh
    try:
        receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = receipt["source"] == fresh["source"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: cannot be read; delete {folder} and begin again") from None
    if not same:
        raise ModelError(
            f"{folder}: holds a {rewriting.what} of other files than those of {rewriting.source}; remove it, or "
            "give a new folder"
        )
    return receipt


def rewrite(rewriting: Rewriting, receipt: dict[str, Any], say: Say) -> set[str]:
    """Every file that is not there yet. Returns the names of those that an earlier process made."""
    target, total = rewriting.target, len(rewriting.shards)
    sweep(target)
    done = {name for name, entry in receipt["shards"].items() if _size(target / name) == entry["size"]}
    left = {file: name for file, name in rewriting.shards.items() if name not in done}
    check_room(target, sum(file.stat().st_size for file in left))
    to_do, began = sum(file.stat().st_size for file in left), time.monotonic()
    written = 0
    for number, (file, name) in enumerate(rewriting.shards.items(), start=1):
        place = f"shard {number}/{total}"
        if name in done:
            say(f"{place}: {name} is there already")
            continue
        refuse_damaged_download(file)
        at = time.monotonic()
        receipt["shards"][name] = rewriting.write(file, name)
        write_json(target / rewriting.receipt, receipt)
        size, now = receipt["shards"][name]["size"], time.monotonic()
        written += file.stat().st_size
        rest = (now - began) * (to_do - written) / written
        eta = f", {clock(rest)} left" if rest >= 1 else ""
        say(f"{place}: {file.name} -> {name}, {size / 1e9:.2f} GB in {now - at:.1f} s{eta}")
    return done


def check_room(folder: Path, needed: int) -> None:
    """Raises ModelError where the disk of `folder` has not `needed` bytes and some to spare."""
    free = shutil.disk_usage(folder).free
    if needed and free < needed + SPARE:
        raise ModelError(
            f"{folder}: has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed; make room or "
            "give a folder on a larger disk"
        )


def refuse_damaged_download(file: Path) -> None:
    """Raises ModelError where the model hub gives another hash for the file than it has."""
    expected = known_sha256(file)
    if expected is not None and sha256_of(file) != expected:
        raise ModelError(f"{file}: is damaged: its sha256 is not the model hub's; fetch it again")


def hashed(pieces: Iterable[bytes | memoryview], name: str, hashes: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The same pieces; once they are through, their sha256 is in `hashes`."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    hashes[name] = digest.hexdigest()


def sha256_in(shard: Shard, names: Iterable[str]) -> str:
    """The hash of the tensors' bytes, one after the other."""
    digest = hashlib.sha256()
    for name in names:
        for piece in shard.read(name):
            digest.update(piece)
    return digest.hexdigest()


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def index_of(weight_map: Mapping[str, str], total_size: int) -> dict[str, Any]:
    """`model.safetensors.index.json` of tensors by the file that each is in."""
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
