"""`reader: my_rows.py:read`: a function of the user's own that turns a row of the file into a row of a known form.

It takes the row and gives a row (a dict), or None for a row that is to be left out, which the ledger counts. It is
run from the user's own file, by the process that reads the rows; the file's sha256 is part of what the rows are.
"""

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

from chatlora.disk import sha256_of
from chatlora.errors import DataError, did_you_mean, similar_beside

LEFT_OUT = "the reader leaves the row out"


@dataclass(frozen=True, slots=True)
class OwnReader:
    path: Path
    function: Callable[[Mapping[str, Any]], Any]

    def read(self, row: Mapping[str, Any], place: str) -> Mapping[str, Any] | None:
        """What the function makes of a row; None where it leaves it out. Raises DataError, with the place, where it
        fails."""
        try:
            made = self.function(dict(row))  # what it takes out of its row, group_by still finds
        except (Exception, SystemExit) as error:  # the user's own code may fail in any way, and may not end the run
            told = _told(error, self.path)
            raise DataError(f"{place}: the reader raised {told}; mend it, or return None for such rows") from error
        if made is None or isinstance(made, Mapping):
            return made
        raise DataError(
            f"{place}: the reader gave a {type(made).__name__}; it gives one row, a dict such as "
            '{"messages": [...]}, or None to leave the row out'
        )


def own_reader(named: str | None) -> OwnReader | None:
    """What `FILE.py:FUNCTION` names. Raises DataError where it is not there or does not load."""
    if named is None:
        return None
    path, name = _parts_of(named)
    if not path.is_file():
        raise DataError(f"reader: {path}: no such file{similar_beside(path)}")
    return _loaded(path, name, sha256_of(path))


def sha256_of_reader(named: str) -> str:
    return sha256_of(_parts_of(named)[0])


def _parts_of(named: str) -> tuple[Path, str]:
    file, _, name = named.rpartition(":")
    return Path(file).expanduser().absolute(), name


@cache
def _loaded(path: Path, name: str, sha256: str) -> OwnReader:
    module = ModuleType(f"chatlora_reader_{sha256[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        # Not imported: Python would keep it compiled beside the file, and take that for the file's next version.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        told = _told(error, path)
        raise DataError(f"reader: {told}; all that it needs has to be in this file, or installed") from error
    function = vars(module).get(name)
    if not callable(function):
        functions = [other for other, value in vars(module).items() if isfunction(value)]
        hint = did_you_mean(name, functions) or f"; it has {', '.join(functions) or 'none'}"
        raise DataError(f"reader: {path} has no function {name}{hint}")
    return OwnReader(path, function)


def _told(error: BaseException, path: Path) -> str:
    """The error's kind and words, and the line of the user's file where it arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    at = f"{path}, line {lines[-1]}" if lines else str(path)
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({at})"
