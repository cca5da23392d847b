"""Where things that can be made again are kept for the user, between runs and outside any run directory."""

import os
from pathlib import Path


def cache_root() -> Path:
    """`CHATLORA_CACHE`, else `$XDG_CACHE_HOME/chatlora`, else `~/.cache/chatlora`. Not created here.

    An empty variable counts as unset, and so does a relative `XDG_CACHE_HOME` (XDG Base Directory Specification).
    """
    named = os.environ.get("CHATLORA_CACHE", "")
    if named:
        return Path(named).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "chatlora"
