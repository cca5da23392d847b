"""Where things that can be made again are kept for the user, between runs and outside any run directory."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock, Timeout

from chatlora.disk import PARTIAL, name_beside, sweep, write_json
from chatlora.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Found = TypeVar("Found", bound="DataclassInstance")

GIB = 2**30
DEFAULT_LIMIT = 20.0  # GiB
IN_USE = 3600.0  # seconds since a folder was last opened in which nobody removes it


def cache_root() -> Path:
    """`CHATLORA_CACHE`, else `$XDG_CACHE_HOME/chatlora`, else `~/.cache/chatlora`. Not created here.

    An empty variable counts as unset, and so does a relative `XDG_CACHE_HOME` (XDG Base Directory Specification).
    """
    named = os.environ.get("CHATLORA_CACHE", "")
    if named:
        return Path(named).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "chatlora"


@contextmanager
def written_cache(folder: Path) -> Iterator[None]:
    """Within, a folder of the cache is there and can be written; else one sentence names the variable to set."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno is None:  # not of the file system: transformers raises such ones too
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some room, or set CHATLORA_CACHE to another disk"
            if full
            else "set CHATLORA_CACHE to a folder that can be"
        )
        raise ConfigError(
            f"the cache folder {folder} cannot be written ({os.strerror(error.errno)}): {remedy}"
        ) from error


def found_once(path: Path, form: Callable[..., Found], look: Callable[[], Found]) -> Found:
    """What `look` finds, a dataclass of plain values, kept in `path`: one process looks while the others wait."""

    def recalled() -> Found | None:
        try:
            return form(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not there yet, or broken
            return None

    found = recalled()
    if found is not None:
        return found
    with written_cache(path.parent), FileLock(f"{path}.lock"):
        found = recalled()  # another process may have looked while this one waited
        if found is None:
            found = look()
            write_json(path, asdict(found))
    return found


def cache_limit() -> int:
    """`CHATLORA_CACHE_GIB` in bytes, 20 GiB where it is not set: what rendered rows may take."""
    named = os.environ.get("CHATLORA_CACHE_GIB", "")
    try:
        limit = float(named or DEFAULT_LIMIT)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise ConfigError(f"CHATLORA_CACHE_GIB is {named!r}; it is a number of GiB, e.g. 20")
    return int(limit * GIB)


def mark_used(file: Path) -> None:
    """Whoever makes room goes by the time of this file, of which a folder of the cache has one."""
    with suppress(OSError):  # a cache that cannot be written is not cleared either
        os.utime(file)


def keep_within(limit: int, folder: Path, marker: str, say: Callable[[str], None]) -> None:
    """Remove folders in `folder`, those first that were opened longest ago, until the rest take no more than `limit`.

    marker: the file in each of them that was marked whenever it was opened. One that was opened within the last hour
    stays, whatever it takes. What killed processes were writing goes as well.
    """
    _sweep_left_over(folder)
    used = sorted(_used(folder, marker))
    excess, freed = sum(size for _, _, size in used) - limit, 0
    for when, each, size in used:
        if excess <= freed or when > time.time() - IN_USE:
            break
        with suppress(OSError):  # another process was faster, or it may not be removed
            going = each.rename(name_beside(each))  # at once, for whoever opens it
            shutil.rmtree(going)
            freed += size
    if freed:
        say(
            f"{freed / GIB:.1f} GiB of rendered rows that were not used lately are removed from {folder}, to keep it "
            f"under {limit / GIB:,.0f} GiB (CHATLORA_CACHE_GIB)"
        )


def _used(folder: Path, marker: str) -> Iterator[tuple[float, Path, int]]:
    """Of each folder when it was opened last, and its size in bytes."""
    for file in folder.glob(f"*/{marker}"):
        with suppress(OSError):  # another process removed it meanwhile
            yield file.stat().st_mtime, file.parent, sum(each.stat().st_size for each in file.parent.iterdir())


def _sweep_left_over(folder: Path) -> None:
    """Remove half-written folders whose lock nobody holds: nobody may ask for the same rows again, and sweep them."""
    for name in {left.name[1:].split(".")[0] for left in folder.glob(f".*{PARTIAL}") if left.is_dir()}:
        with suppress(OSError, Timeout), FileLock(folder / f"{name}.lock", timeout=0):
            sweep(folder, name)
