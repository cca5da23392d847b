"""Where things that can be made again are kept for the user, between runs and outside any run directory."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock

from chatlora.disk import write_json
from chatlora.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Found = TypeVar("Found", bound="DataclassInstance")


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
