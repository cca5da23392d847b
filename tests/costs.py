"""What a function costs, counted: whatever else the machine does, it comes out the same."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


def calls_of(function: Callable[[], object]) -> int:
    """Calls that it makes, of functions in Python and in C."""
    calls = 0

    def counting(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counting)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def bytes_touched_by(function: Callable[[], object]) -> int:
    """Bytes that it reads from files, and pages of memory that it is the first to touch, those of mapped files too."""
    before = _bytes_touched()
    function()
    return _bytes_touched() - before


def _bytes_touched() -> int:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    read = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"]
    return int(read) + faults * resource.getpagesize()
