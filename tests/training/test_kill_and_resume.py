"""Killed at any moment and started again, a run ends as it would have ended: bit for bit, line by line."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from chatlora.checkpoint_names import published, step_of
from chatlora.run_directory import read_status
from chatlora.run_log import LOG, read_log
from tests.engine_runs import environment_of
from tests.fork_server import At, ForkServer
from tests.runs import SEED_DRAWS, STEP, STEPS, WRITE, Whole, differences, newest

Count = Callable[[str], None]


def reached(folder: Path) -> str:
    """How far a killed run had come."""
    status = read_status(folder / "run")
    if not status:
        return "before the run began"
    logged = read_log(folder / "run" / LOG)
    saved = [step_of(home) for home in published(folder / "run" / "checkpoints")]
    assert not saved or logged[-1]["step"] >= saved[-1], "the log is behind the checkpoint"
    if not logged:
        return "while it was set up"
    if saved and saved[-1] == STEPS:
        return "while the adapter was exported" if status["state"] == "running" else "when it was done"
    return "after a checkpoint" if saved else "before the first checkpoint"


def kill_at_random(
    server: ForkServer, argv: list[str], folder: Path, ranks: int, under: Mapping[str, str], moment: float
) -> str:
    pids = server.start(argv, folder, ranks=ranks, environment=under)
    time.sleep(moment)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.wait(pids)
    return reached(folder)


def random_kills(
    server: ForkServer,
    argv: list[str],
    folder: Path,
    whole: Whole,
    *,
    runs: int,
    ranks: int,
    seed: int,
    config: str | None = None,
) -> Counter[str]:
    """Runs that are killed one to three times each and then left to end. Where the kills fell."""
    draws, fell, under = random.Random(seed), Counter[str](), environment_of(config)
    for number in range(runs):
        here = folder / str(number)
        here.mkdir()
        for _ in range(draws.choice([1, 1, 2, 3])):
            fell[kill_at_random(server, argv, here, ranks, under, draws.uniform(0, 1.1 * whole.seconds))] += 1
            if (here / "run" / "checkpoints").exists() and published(here / "run" / "checkpoints"):
                newest(here / "run")  # at least one good one, from the first on
        assert server.run(argv, here, ranks=ranks, environment=under) == [0] * ranks
        assert differences(here / "run", whole.outcome) == []
        shutil.rmtree(here)
    return fell


@pytest.mark.parametrize(("ranks", "runs"), [(1, 4), (2, 1)])
def test_killed_at_random_moments_a_run_ends_the_same(
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], tmp_path: Path, ranks: int, runs: int
) -> None:
    random_kills(server, argv, tmp_path, whole(ranks), runs=runs, ranks=ranks, seed=ranks)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "runs"), [(1, 300), (2, 30)])
def test_killed_at_random_moments_three_hundred_runs_end_the_same(
    server: ForkServer,
    argv: list[str],
    whole: Callable[..., Whole],
    tmp_path: Path,
    ranks: int,
    runs: int,
    count: Count,
) -> None:
    fell = random_kills(server, argv, tmp_path, whole(ranks), runs=runs, ranks=ranks, seed=100 + ranks)
    count(f"{runs} runs of {ranks} process(es), {fell.total()} kills: {dict(fell)}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_killed_at_random_moments_under_every_engine_a_run_ends_the_same(
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], tmp_path: Path, config: str, count: Count
) -> None:
    fell = random_kills(server, argv, tmp_path, whole(2, config), runs=10, ranks=2, seed=200, config=config)
    count(f"10 runs under {config}, {fell.total()} kills: {dict(fell)}")


@pytest.mark.parametrize(
    ("place", "call"),
    [
        (STEP, 2),  # before anything was saved
        (WRITE, 2),  # after the validation, before its checkpoint
        ("chatlora.training.state:rotate", 3),
        ("chatlora.training.state:rotate", 4),  # the last save is published, what it replaces is still there
        ("chatlora.training.export:save_adapter", 2),  # adapter is there, adapter-best is not
        ("chatlora.run_directory:RunDirectory.summary", 1),  # both are there, status.json does not say done
    ],
)
def test_killed_at_a_chosen_moment_a_run_ends_the_same(
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], tmp_path: Path, place: str, call: int
) -> None:
    assert server.run(argv, tmp_path, at=At("SIGKILL", place, call)) == [-signal.SIGKILL]
    assert read_status(tmp_path / "run")["state"] == "running"
    assert server.run(argv, tmp_path) == [0]
    assert differences(tmp_path / "run", whole(1).outcome) == []


def test_where_one_process_of_two_is_killed_the_other_ends_and_both_go_on(
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], tmp_path: Path
) -> None:
    statuses = server.run(argv, tmp_path, ranks=2, at=At("SIGKILL", STEP, 6, rank=1))
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, 2, 75)
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert server.run(argv, tmp_path, ranks=2) == [0, 0]
    assert differences(tmp_path / "run", whole(2).outcome) == []


BROKEN = {
    "dropout is drawn from wherever the generator stands": "Runtime.seed_draws = lambda *arguments: None",
    "Adam's step begins anew": (
        "scatter = state._scatter\n"
        "def broken(runtime, model, optimizer, step, found, filler):\n"
        "    scatter(runtime, model, optimizer, step, found, filler)\n"
        "    for moments in optimizer.state.values(): moments['step'].fill_(1)\n"
        "state._scatter = broken"
    ),
    "the moments are lost": (
        "scatter = state._scatter\n"
        "def broken(runtime, model, optimizer, step, found, filler):\n"
        "    scatter(runtime, model, optimizer, step, found, filler)\n"
        "    for moments in optimizer.state.values(): moments['exp_avg'].zero_()\n"
        "state._scatter = broken"
    ),
    "the rows come in another order": (
        "from chatlora.data.batches import GlobalBatches\n"
        "order = GlobalBatches._order\n"
        "GlobalBatches._order = lambda batches, epoch: order(batches, epoch + 1)"
    ),
    "the logs are not cut back": "run_directory.cut_back = lambda path, step: path.touch()",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_broken_resumes_are_caught(
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], killed: Path, tmp_path: Path, broken: str
) -> None:
    rooms = "from chatlora import run_directory\nfrom chatlora.training import state\n"
    rooms += "from chatlora.distributed.runtime import Runtime\n"
    shutil.copytree(killed, tmp_path / "run")
    assert server.run(argv, tmp_path, broken=rooms + broken) == [0]
    assert differences(tmp_path / "run", whole(1).outcome) != []


# ---- which examples


Trace = dict[tuple[int, int, int], list[int]]


def trace_of(folder: Path) -> Trace:
    """(step, rank, micro-batch) -> examples. What was done twice was done alike."""
    trace: Trace = {}
    for path in sorted(folder.iterdir()):
        rank = int(path.stem.removeprefix("rank-"))
        for line in path.read_text().splitlines():
            step, micro_batch, examples = json.loads(line)
            assert trace.setdefault((step, rank, micro_batch), examples) == examples
    return trace


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_between_micro_batches_a_run_sees_the_same_examples(
    server: ForkServer, argv: list[str], tmp_path: Path, ranks: int
) -> None:
    """65 examples in batches of 16: the fifth step of an epoch has one. Killed in the second epoch, then after that."""
    argv += ["--optim.max_tokens_per_micro_batch", "300"]
    traces = []
    for name, kills in (("whole", ()), ("killed", (23, 9) if ranks == 1 else (14,))):
        here = tmp_path / name
        (here / "trace").mkdir(parents=True)
        for call in kills:
            at = At("SIGKILL", SEED_DRAWS, call)
            assert -signal.SIGKILL in server.run(argv, here, ranks=ranks, at=at, trace=here / "trace")
        assert server.run(argv, here, ranks=ranks, trace=here / "trace") == [0] * ranks
        traces.append(trace_of(here / "trace"))
    assert traces[0] == traces[1]
    steps_per_epoch = STEPS // 2
    for epoch in range(2):
        seen = [
            example for (step, _, _), ids in traces[0].items() if step // steps_per_epoch == epoch for example in ids
        ]
        assert sorted(seen) == list(range(65))
    assert max(micro_batch for _, _, micro_batch in traces[0]) >= 2


# ---- other engines and sizes


def test_a_run_goes_on_under_another_number_of_processes(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """Stopped after step 4; the eight steps after that are within 1e-5 of the uninterrupted run's."""
    argv += ["--lora.dropout", "0", "--optim.max_steps", "12"]
    folders = [tmp_path / name for name in ("whole", "one then two", "two then one")]
    for folder, ranks in zip(folders, (1, 1, 2), strict=True):
        folder.mkdir()
        at = None if folder == folders[0] else At("SIGTERM", STEP, 4, rank=0)
        assert server.run(argv, folder, ranks=ranks, at=at) == [75 if at else 0] * ranks
    for folder, ranks in zip(folders[1:], (2, 1), strict=True):
        assert step_of(published(folder / "run" / "checkpoints")[-1]) == 4
        assert server.run(argv, folder, ranks=ranks) == [0] * ranks
        assert json.loads((folder / "run" / "environment.json").read_text())["num_processes"] == ranks
        mine, theirs = read_log(folder / "run" / LOG), read_log(folders[0] / "run" / LOG)
        assert [line["step"] for line in mine] == list(range(1, 13))
        for one, other in zip(mine, theirs, strict=True):
            assert one["num_targets"] == other["num_targets"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        continued, whole = newest(folder / "run").adapter, newest(folders[0] / "run").adapter
        assert max(float((continued[name] - whole[name]).abs().max()) for name in whole) <= 1e-5
