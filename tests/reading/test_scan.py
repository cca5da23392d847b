"""What the first look found is kept in the cache, and recalled from one that nobody can write to."""

from pathlib import Path

import pytest

from chatlora.config import Source
from chatlora.errors import ConfigError
from chatlora.reading.scan import Input, inputs_of, scan


@pytest.fixture
def inputs(tmp_path: Path) -> list[Input]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "completion": "c"}\n')
    return inputs_of([Source(path=str(rows))], "train")


def test_what_was_found_is_recalled_without_writing(inputs: list[Input], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = scan(inputs, cache)
    (lock,) = cache.glob("*.lock")
    lock.unlink()
    lock.mkdir()  # whoever would write cannot lock now, not even root
    assert scan(inputs, cache) == found


def test_a_cache_that_is_a_file_is_told_with_its_variable(inputs: list[Input], tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    for folder in (tmp_path / "cache", tmp_path / "cache" / "data"):
        with pytest.raises(ConfigError, match=r"cannot be written .*set CHATLORA_CACHE to a folder that can be"):
            scan(inputs, folder)
