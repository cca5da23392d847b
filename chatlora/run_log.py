"""What happened in each step and each validation of a run: a JSON line each, cut back where it goes on."""

import json
import mmap
import os
from pathlib import Path
from typing import Any

from chatlora.disk import whole_lines

LOG, VALIDATION = LOGS = ("log.jsonl", "validation.jsonl")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log.jsonl or validation.jsonl; none where there is no file."""
    return whole_lines(path) if path.is_file() else []


def cut_back(path: Path, step: int) -> None:
    """Drop a log's lines after `step` and what a kill left of one. Costs what is dropped, however long the log is."""
    with path.open("a+b") as file:
        if not file.tell():
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            end = _end_of(text, step)
        file.truncate(end)
        os.fsync(file.fileno())


def _end_of(text: mmap.mmap, step: int) -> int:
    """Where the last whole line of a step up to `step` ends."""
    end = text.rfind(b"\n") + 1
    while end:
        start = text.rfind(b"\n", 0, end - 1) + 1
        if _is_of(text[start:end], step):
            break
        end = start
    return end


def _is_of(line: bytes, step: int) -> bool:
    """Whether it is a whole line of a step up to `step`. Where the power failed, the last ones may hold anything."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
