"""A save killed at every one of its writes and at random moments, on full disks, and what is on the disk when."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from chatlora import disk
from chatlora.checkpoint_names import published, step_of
from chatlora.config import CheckpointConfig
from chatlora.errors import CheckpointError
from chatlora.run_directory import RunDirectory
from chatlora.training import checkpoint as checkpoint_module
from chatlora.training import state as state_module
from chatlora.training.checkpoint import Checkpoint, newest_checkpoint, sweep, why_broken, write_checkpoint
from chatlora.training.state import publish
from tests.syscalls import AVAILABLE, Call, trace
from tests.training.test_checkpoint import KINDS, sign

SETTINGS = CheckpointConfig(every_steps=2, keep_last=1, keep_best=True)
BEST, LAST, NEW = 2, 4, 6

traced = pytest.mark.skipif(not AVAILABLE, reason="system calls are watched on Linux, x86-64 and arm64")


def state(step: int, size: int = 40) -> Checkpoint:
    """Another one for each step. size: of a matrix's sides."""
    draws = torch.Generator().manual_seed(step)
    names = [f"layers.{number}.lora_{half}" for number in range(3) for half in "AB"]
    matrices = lambda: {name: torch.randn(size, size, generator=draws) for name in names}  # noqa: E731
    return Checkpoint(step, matrices(), {kind: matrices() for kind in KINDS}, "AdamW")


def same(one: Checkpoint, other: Checkpoint) -> bool:
    def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        yield from checkpoint.adapter.items()
        yield from ((kind + name, t) for kind, named in checkpoint.optimizer.items() for name, t in named.items())

    mine, theirs = dict(tensors(one)), dict(tensors(other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def run_in(folder: Path) -> RunDirectory:
    folder.mkdir(parents=True, exist_ok=True)
    return RunDirectory(folder, lock=FileLock(folder / ".lock"), peak_memory=lambda: 0)


def begin(folder: Path) -> RunDirectory:
    """A run with a best checkpoint and a last one; the next save rotates the last one away."""
    run = run_in(folder)
    for step in (BEST, LAST):
        (folder / "validation.jsonl").open("a").write(f'{{"step": {step}, "loss": {step}, "num_targets": 9}}\n')
        (folder / "log.jsonl").open("a").write(f'{{"step": {step}}}\n')
        write_checkpoint(run.checkpoints, state(step))
    return run


def what_is_wrong(run: RunDirectory) -> list[str]:
    """With a run that was killed while it saved step NEW after LAST; the next process goes on and saves again."""
    said: list[str] = []
    steps = [step_of(home) for home in published(run.checkpoints)]
    wrong = [f"{home.name}: {why_broken(home)}" for home in published(run.checkpoints) if why_broken(home)]
    found = newest_checkpoint(run.checkpoints, said.append)
    if found is None or found.step < LAST or not same(found, state(found.step)):
        wrong.append(f"the newest good one of {steps} is {found and found.step}")
    if BEST not in steps:
        wrong.append("the best one is gone")
    sweep(run.checkpoints)
    publish(SETTINGS, run, state(NEW))
    left = sorted(path.name for path in run.checkpoints.iterdir())
    if left != [f"step-{BEST:06}", f"step-{NEW:06}"]:
        wrong.append(f"after the next save there is {left}")
    return wrong + said


def killed_at_every_write(folder: Path) -> Iterator[list[str]]:
    """For each of the writes of a save: what is wrong after the process has been killed at it."""
    whole = begin(folder / "whole")
    calls = trace(lambda: publish(SETTINGS, whole, state(NEW)), folder)
    assert [step_of(home) for home in published(whole.checkpoints)] == [BEST, NEW]
    for number in range(1, len(calls) + 1):
        run = begin(folder / str(number))
        seen = trace(lambda run=run: publish(SETTINGS, run, state(NEW)), folder, kill_at=number)  # type: ignore[misc]
        assert len(seen) == number
        yield what_is_wrong(run)


@traced
def test_a_kill_at_any_write_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    faults = list(killed_at_every_write(tmp_path))
    assert len(faults) > 30
    assert not any(faults), faults


@traced
def test_a_kill_at_any_write_of_the_first_save_leaves_that_one_or_none(tmp_path: Path) -> None:
    whole = run_in(tmp_path / "whole")
    calls = trace(lambda: publish(SETTINGS, whole, state(NEW)), tmp_path)
    found = []
    for number in range(1, len(calls) + 1):
        run = run_in(tmp_path / str(number))
        trace(lambda run=run: publish(SETTINGS, run, state(NEW)), tmp_path, kill_at=number)  # type: ignore[misc]
        newest = newest_checkpoint(run.checkpoints, pytest.fail)
        found.append(newest is not None)
        assert newest is None or same(newest, state(NEW))
        sweep(run.checkpoints)
        assert [path.name for path in run.checkpoints.glob("*")] == [home.name for home in published(run.checkpoints)]
    assert found == sorted(found)
    assert set(found) == {False, True}


def write_in_place(folder: Path, checkpoint: Checkpoint) -> None:
    home = folder / f"step-{checkpoint.step:06}"
    home.mkdir(exist_ok=True)
    save_file(checkpoint.adapter, home / "adapter.safetensors")
    kept = {f"{kind}.{name}": t for kind, tensors in checkpoint.optimizer.items() for name, t in tensors.items()}
    save_file(kept, home / "optimizer.safetensors")
    (home / "progress.json").write_text(f'{{"step": {checkpoint.step}}}')
    sign(home)


def make_room_first(settings: CheckpointConfig, run: RunDirectory, new: Checkpoint) -> None:
    for home in published(run.checkpoints):
        if step_of(home) != BEST:
            shutil.rmtree(home)
    write_checkpoint(run.checkpoints, new)


@traced
@pytest.mark.parametrize("broken", ["written in place", "room made first", "deleted in place"])
def test_broken_saves_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    if broken == "written in place":
        monkeypatch.setattr(state_module, "write_checkpoint", write_in_place)
    elif broken == "room made first":
        monkeypatch.setattr(f"{__name__}.publish", make_room_first)
    else:
        monkeypatch.setattr(checkpoint_module, "_delete", shutil.rmtree)
    assert any(killed_at_every_write(tmp_path))


# ---- what is on the disk when


def what_is_out_of_order(calls: list[Call], run: RunDirectory) -> list[str]:
    """A power cut keeps what was synced, in any order: so files before their folder, the new before the old goes."""
    folder = str(run.checkpoints)
    beside = f"{folder}/.writing-step-{NEW:06}"
    is_publication = [call.name.startswith("rename") and call.path == beside for call in calls]
    assert sum(is_publication) == 1
    at = is_publication.index(True)
    wrong = []
    for name in ("adapter.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"):
        synced = [i for i, call in enumerate(calls) if call == Call("fsync", f"{beside}/{name}")]
        written = [i for i, call in enumerate(calls) if call.name == "write" and name in call.path]
        if not synced or synced[-1] > at or (written and written[-1] > synced[-1]):
            wrong.append(f"{name} is not synced before it is published")
    for what, before in ((beside, True), (str(run.path), True), (f"{run.path}/log.jsonl", True), (folder, False)):
        synced = [i for i, call in enumerate(calls) if call == Call("fsync", what)]
        if not synced or (synced[-1] > at if before else synced[-1] < at):
            wrong.append(f"{what} is not synced {'before' if before else 'after'} the publication")
    deleted = [i for i, call in enumerate(calls) if f"step-{LAST:06}" in call.path]
    after = [i for i, call in enumerate(calls) if call == Call("fsync", folder)]
    if not after or min(deleted) < max(after):
        wrong.append("the old one goes before the new one is synced")
    return wrong


@traced
def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path) -> None:
    run = begin(tmp_path)
    calls = trace(lambda: publish(SETTINGS, run, state(NEW)), tmp_path)
    assert what_is_out_of_order(calls, run) == []


@traced
@pytest.mark.parametrize("forgotten", ["files", "the folder"])
def test_a_forgotten_sync_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    sync = disk.sync
    for module in (disk, checkpoint_module):
        monkeypatch.setattr(
            module, "sync", lambda path: None if path.is_file() == (forgotten == "files") else sync(path)
        )
    run = begin(tmp_path)
    calls = trace(lambda: publish(SETTINGS, run, state(NEW)), tmp_path)
    assert what_is_out_of_order(calls, run)


# ---- random moments


def random_kills(folder: Path, number: int, seed: int) -> int:
    """Kill processes at random moments until `number` were killed within a save. How many processes that took."""
    draws = random.Random(seed)
    states = {step: state(step, size=600) for step in range(1, 7)}  # 26 MB each
    run = run_in(folder)
    began = time.monotonic()
    write_checkpoint(run.checkpoints, states[1])
    duration = time.monotonic() - began
    processes, within = 0, 0
    while within < number:
        found = newest_checkpoint(run.checkpoints, pytest.fail)  # none of ours is ever broken
        assert found is not None
        assert same(found, states[found.step])
        sweep(run.checkpoints)
        if found.step == 6:
            shutil.rmtree(run.checkpoints)
            write_checkpoint(run.checkpoints, states[1])
        pid = os.fork()
        if pid == 0:
            publish(SETTINGS, run, states[2 if found.step == 6 else found.step + 1])
            os._exit(0)
        time.sleep(draws.uniform(0, 1.3 * duration))
        os.kill(pid, signal.SIGKILL)
        within += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        processes += 1
    return processes


def test_random_kills_during_saves(tmp_path: Path) -> None:
    random_kills(tmp_path, 8, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_random_kills_during_saves(tmp_path: Path, count: Callable[[str], None]) -> None:
    count(f"200 of {random_kills(tmp_path, 200, seed=1)} processes were killed within a save")


# ---- a full disk


def limited_to(num_bytes: int, function: Callable[[], object]) -> int:
    """The exit status of a process that calls the function and may write no file beyond a size; 7: CheckpointError."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
            function()
            status = 0
        except CheckpointError as error:
            status = 7 if f"{state(NEW).num_bytes:,} bytes" in str(error) and "free some space" in str(error) else 8
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("limit", [0, 10, 100, 20_000, 60_000])
def test_a_file_that_cannot_be_written_leaves_what_there_was(tmp_path: Path, limit: int) -> None:
    """20,000 bytes: not the adapter; 60,000: not the optimizer's state; less: no progress.json, no manifest.json."""
    run = begin(tmp_path)
    assert limited_to(limit, lambda: publish(SETTINGS, run, state(NEW))) == 7
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == [f"step-{BEST:06}", f"step-{LAST:06}"]
    assert what_is_wrong(run) == []


def small_disk(folder: Path, num_bytes: int) -> Path:
    folder.mkdir()
    told = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if told.returncode:
        pytest.skip("mounting a small disk needs to be root")
    return folder


def refusal(function: Callable[[], object]) -> str:
    try:
        function()
    except CheckpointError as error:
        return error.problems[0]
    return ""


def test_a_disk_that_fills_at_any_file_leaves_what_there_was(tmp_path: Path) -> None:
    """A tmpfs, fuller each time, so that the space ends in each of the files of a save, in its log, its folder."""
    disk = small_disk(tmp_path / "disk", 2**20)
    try:
        ended_at = set()
        for filled in range(0, 400_000, 8192):
            run = begin(disk / "run")
            (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - 400_000 + filled))
            told = refusal(lambda run=run: publish(SETTINGS, run, state(NEW)))  # type: ignore[misc]
            if told:
                ended_at.add(told[-60:])
                assert f"it needs {state(NEW).num_bytes:,} bytes" in told
                assert [home.name for home in published(run.checkpoints)] == [f"step-{BEST:06}", f"step-{LAST:06}"]
            (disk / "ballast").unlink()
            assert what_is_wrong(run) == []
            shutil.rmtree(disk / "run")
        assert ended_at
    finally:
        subprocess.run(["umount", str(disk)], check=True)
