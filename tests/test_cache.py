"""What is kept between runs stays within a size: what was used longest ago goes first, and it is told."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

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


def test_a_folder_that_another_process_removes_meanwhile_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"old": 9, "older": 10})
    listed = Path.iterdir

    def removed_before_it_is_listed(folder: Path) -> Iterator[Path]:
        if folder.name == "older":
            shutil.rmtree(folder)
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", removed_before_it_is_listed)
    keep_within(0, tmp_path, "record", lambda line: None)
    assert not any(path.is_dir() for path in listed(tmp_path))


def test_what_a_killed_process_was_writing_goes_unless_somebody_writes_it(tmp_path: Path) -> None:
    for key in ("dead", "written"):
        (tmp_path / f".{key}.host.1.partial").mkdir()
    with FileLock(tmp_path / "written.lock"):
        keep_within(GIB, tmp_path, "record", lambda line: None)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [".written.host.1.partial"]


def test_the_limit_is_a_number_of_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATLORA_CACHE_GIB", raising=False)
    assert cache_limit() == 20 * GIB
    monkeypatch.setenv("CHATLORA_CACHE_GIB", "0.5")
    assert cache_limit() == GIB // 2
    for wrong in ("much", "-1", "inf", "nan"):
        monkeypatch.setenv("CHATLORA_CACHE_GIB", wrong)
        with pytest.raises(ConfigError, match="it is a number of GiB"):
            cache_limit()
