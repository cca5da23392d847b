"""A folder of examples is built once, by one of several processes, and whole or not at all."""

import errno
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from chatlora.data.store import ExampleStore, Stored, built_once, count_targets, write_examples
from chatlora.errors import ConfigError
from chatlora.rendering.examples import IGNORE_INDEX, Example


def test_the_first_token_is_no_target_since_nothing_predicts_it() -> None:
    assert count_targets([5, IGNORE_INDEX, 5, 5]) == 2
    assert count_targets([IGNORE_INDEX, 5]) == 1


def build_three(folder: Path) -> dict[str, Any]:
    write_examples(folder, [Stored(Example([7, number], [-100, number]), f"t:{number}", 0, 1) for number in range(3)])
    return {}


def test_of_several_that_start_at_once_one_builds(tmp_path: Path) -> None:
    start, together = threading.Barrier(4), threading.Barrier(2)
    built, stores = [], []

    def build(folder: Path) -> dict[str, Any]:
        built.append(folder)
        with suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.5)  # two builders at once would meet here
        return build_three(folder)

    def run() -> None:
        start.wait()
        stores.append(built_once(tmp_path / "key", build))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert together.broken
    assert [store.lengths.tolist() for store in stores] == [[2, 2, 2]] * 4


def die_while_building(folder: Path) -> dict[str, Any]:
    build_three(folder)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_builder_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    builder = multiprocessing.get_context("fork").Process(
        target=built_once, args=(tmp_path / "key", die_while_building)
    )
    builder.start()
    builder.join()
    assert builder.exitcode == -signal.SIGKILL
    assert not (tmp_path / "key").exists()
    store: ExampleStore = built_once(tmp_path / "key", build_three)
    assert store.fetch([2, 0]) == [Example([7, 2], [-100, 2]), Example([7, 0], [-100, 0])]
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_is_told_with_the_setting_to_change(tmp_path: Path) -> None:
    def build(_: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ConfigError, match="free some room, or set CHATLORA_CACHE"):
        built_once(tmp_path / "key", build)


def test_a_folder_that_cannot_be_written_is_told_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "key.lock").mkdir()
    for folder in (tmp_path / "file" / "data" / "key", tmp_path / "key"):
        with pytest.raises(ConfigError, match=r"cannot be written .*set CHATLORA_CACHE to a folder that can be"):
            built_once(folder, build_three)
