"""What is kept between runs stays within a size: what was used longest ago goes first, and it is told."""

import os
import time
from pathlib import Path

import pytest

from chatlora.cache import GIB, cache_limit, keep_within, mark_used
from chatlora.errors import ConfigError

DAY = 86_400


def fill(folder: Path, days: dict[str, float], size: int = 1000) -> None:
    """A folder of this size for each name, last opened so many days ago."""
    for name, ago in days.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "rows").write_bytes(b"x" * size)
        (folder / name / "record").touch()
        os.utime(folder / name / "record", (time.time() - ago * DAY,) * 2)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_opened_longest_ago_goes_first_until_the_rest_fits(tmp_path: Path) -> None:
    said: list[str] = []
    fill(tmp_path, {"new": 1, "oldest": 9, "old": 5, "middle": 3})
    (tmp_path / "scan-1.json").touch()
    keep_within(4000, tmp_path, "record", said.append)
    assert (len(left(tmp_path)), said) == (5, [])
    keep_within(2500, tmp_path, "record", said.append)
    assert left(tmp_path) == {"new", "middle", "scan-1.json"}
    (line,) = said
    assert "not used lately are removed from" in line
    assert "CHATLORA_CACHE_GIB" in line


def test_what_is_in_use_stays_and_opening_marks_it(tmp_path: Path) -> None:
    fill(tmp_path, {"opened": 9, "old": 5, "now": 0})
    mark_used(tmp_path / "opened" / "record")
    keep_within(0, tmp_path, "record", lambda line: None)
    assert left(tmp_path) == {"opened", "now"}


def test_the_limit_is_a_number_of_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATLORA_CACHE_GIB", raising=False)
    assert cache_limit() == 20 * GIB
    monkeypatch.setenv("CHATLORA_CACHE_GIB", "0.5")
    assert cache_limit() == GIB // 2
    for wrong in ("much", "-1", "inf", "nan"):
        monkeypatch.setenv("CHATLORA_CACHE_GIB", wrong)
        with pytest.raises(ConfigError, match="it is a number of GiB"):
            cache_limit()
