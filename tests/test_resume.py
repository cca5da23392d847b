"""Killed at any moment and started again, a run ends as it would have ended: bit for bit, line by line."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from chatlora.errors import CheckpointError, ConfigError
from chatlora.run_directory import LOG, VALIDATION, cut_back, read_log, read_status
from chatlora.training.checkpoint import Checkpoint, newest_checkpoint, published, read_checkpoint, step_of
from tests.fork_server import At, ForkServer

Run = Callable[..., Path]
STEPS, SAVED = 10, [3, 6, 9, 10]
FLAGS = ["--checkpoint.every_steps", "3", "--optim.max_tokens_per_micro_batch", "600"]
DIFFERS = ("seconds", "peak_memory_bytes")  # from run to run, and may

SEED_DRAWS = "chatlora.training.runtime:Runtime.seed_draws"
STEP = "chatlora.training.runtime:Runtime.clip_gradients"  # once a step, before the optimizer's
PUBLISH = "chatlora.training.state:publish"
WRITE = "chatlora.training.state:write_checkpoint"


def lines(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in DIFFERS} for line in read_log(path)]


def newest(folder: Path) -> Checkpoint:
    found = newest_checkpoint(folder / "checkpoints", pytest.fail)
    assert found is not None
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves and that another must leave equal."""
    home = published(folder / "checkpoints")[-1]
    files = [home / "adapter.safetensors", home / "moments.safetensors", home / "progress.json"]
    files += [folder / name / "adapter_model.safetensors" for name in ("adapter", "adapter-best")]
    return {
        "state": read_status(folder)["state"],
        "checkpoints": [step_of(each) for each in published(folder / "checkpoints")],
        **{f"{path.parent.name}/{path.name}": path.read_bytes() for path in files},
        **{name: lines(folder / name) for name in (LOG, VALIDATION)},
    }


def differences(folder: Path, whole: dict[str, Any]) -> list[str]:
    found = outcome(folder)
    return [name for name, value in whole.items() if found.get(name) != value]


class Whole(NamedTuple):
    """An uninterrupted run."""

    outcome: dict[str, Any]
    seconds: float


@pytest.fixture(scope="module")
def whole(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Whole]:
    """`whole(2)`: the run under two processes that nobody disturbed."""
    known: dict[int, Whole] = {}

    def make(ranks: int) -> Whole:
        if ranks not in known:
            folder = tmp_path_factory.mktemp(f"whole-{ranks}")
            argv = [str(world / "my.yaml"), *FLAGS, "--run.output_dir", "run"]
            server.run(argv, folder, ranks=ranks)  # the first one renders the data
            shutil.rmtree(folder / "run")
            began = time.monotonic()
            assert server.run(argv, folder, ranks=ranks) == [0] * ranks
            known[ranks] = Whole(outcome(folder / "run"), time.monotonic() - began)
            assert [line["step"] for line in known[ranks].outcome[LOG]] == list(range(1, STEPS + 1))
            assert json.loads((folder / "run" / "environment.json").read_text())["num_processes"] == ranks
        return known[ranks]

    return make


@pytest.fixture
def argv(world: Path) -> list[str]:
    return [str(world / "my.yaml"), *FLAGS, "--run.output_dir", "run"]


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
        return "while the adapter was put away" if status["state"] == "running" else "when it was done"
    return "after a checkpoint" if saved else "before the first checkpoint"


def kill_at_random(server: ForkServer, argv: list[str], folder: Path, ranks: int, moment: float) -> str:
    pids = server.start(argv, folder, ranks=ranks)
    time.sleep(moment)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.wait(pids)
    return reached(folder)


def random_kills(
    server: ForkServer, argv: list[str], folder: Path, whole: Whole, *, runs: int, ranks: int, seed: int
) -> Counter[str]:
    """Runs that are killed one to three times each and then left to end. Where the kills fell."""
    draws, fell = random.Random(seed), Counter[str]()
    for number in range(runs):
        here = folder / str(number)
        here.mkdir()
        for _ in range(draws.choice([1, 1, 2, 3])):
            fell[kill_at_random(server, argv, here, ranks, draws.uniform(0, 1.1 * whole.seconds))] += 1
            if (here / "run" / "checkpoints").exists() and published(here / "run" / "checkpoints"):
                newest(here / "run")  # at least one good one, from the first on
        assert server.run(argv, here, ranks=ranks) == [0] * ranks
        assert differences(here / "run", whole.outcome) == []
        shutil.rmtree(here)
    return fell


@pytest.mark.parametrize(("ranks", "runs"), [(1, 4), (2, 1)])
def test_killed_at_random_moments_a_run_ends_the_same(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], tmp_path: Path, ranks: int, runs: int
) -> None:
    random_kills(server, argv, tmp_path, whole(ranks), runs=runs, ranks=ranks, seed=ranks)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "runs"), [(1, 300), (2, 30)])
def test_killed_at_random_moments_three_hundred_runs_end_the_same(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], tmp_path: Path, ranks: int, runs: int
) -> None:
    fell = random_kills(server, argv, tmp_path, whole(ranks), runs=runs, ranks=ranks, seed=100 + ranks)
    print(f"\n{runs} runs of {ranks} process(es), {fell.total()} kills: {dict(fell)}")


@pytest.mark.parametrize(
    ("place", "call"),
    [
        (STEP, 2),  # before anything was saved
        (WRITE, 2),  # after the validation, before its checkpoint
        ("chatlora.training.state:rotate", 3),
        ("chatlora.training.stage:save_adapter", 2),  # adapter is there, adapter-best is not
        ("chatlora.run_directory:RunDirectory.summary", 1),  # both are there, status.json does not say done
    ],
)
def test_killed_at_a_chosen_moment_a_run_ends_the_same(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], tmp_path: Path, place: str, call: int
) -> None:
    assert server.run(argv, tmp_path, at=At("SIGKILL", place, call)) == [-signal.SIGKILL]
    assert read_status(tmp_path / "run")["state"] == "running"
    assert server.run(argv, tmp_path) == [0]
    assert differences(tmp_path / "run", whole(1).outcome) == []


def test_where_one_process_of_two_is_killed_the_other_ends_and_both_go_on(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], tmp_path: Path
) -> None:
    began = time.monotonic()
    statuses = server.run(argv, tmp_path, ranks=2, at=At("SIGKILL", STEP, 6, rank=1))
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, 2, 75)
    assert time.monotonic() - began < 60
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert server.run(argv, tmp_path, ranks=2) == [0, 0]
    assert differences(tmp_path / "run", whole(2).outcome) == []


BROKEN = {
    "dropout is drawn from wherever the generator stands": "Runtime.seed_draws = lambda *arguments: None",
    "Adam's step begins anew": (
        "scatter = state._scatter\n"
        "def broken(runtime, model, optimizer, step, found):\n"
        "    scatter(runtime, model, optimizer, step, found)\n"
        "    for moments in optimizer.state.values(): moments['step'].fill_(1)\n"
        "state._scatter = broken"
    ),
    "the moments are lost": (
        "scatter = state._scatter\n"
        "def broken(runtime, model, optimizer, step, found):\n"
        "    scatter(runtime, model, optimizer, step, found)\n"
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


@pytest.fixture(scope="module")
def killed(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose process was killed in step 8, after the checkpoint of step 6."""
    folder = tmp_path_factory.mktemp("killed")
    argv = [str(world / "my.yaml"), *FLAGS, "--run.output_dir", "run"]
    assert server.run(argv, folder, at=At("SIGKILL", STEP, 8)) == [-signal.SIGKILL]
    return folder / "run"


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_broken_resumes_are_caught(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], killed: Path, tmp_path: Path, broken: str
) -> None:
    rooms = "from chatlora import run_directory\nfrom chatlora.training import state\n"
    rooms += "from chatlora.training.runtime import Runtime\n"
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


# ---- what may change between two processes, and what may not


def test_changed_contents_under_an_unchanged_path_are_refused_by_name(run: Run, world: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(world, mine, ignore=shutil.ignore_patterns("cache"))
    template = json.loads((mine / "model" / "tokenizer_config.json").read_text()).get("chat_template")
    template = template or (mine / "model" / "chat_template.jinja").read_text()
    (tmp_path / "t.jinja").write_text(template)
    flags = ["--model.name_or_path", str(mine / "model"), "--data.train", str(mine / "rows.jsonl")]
    flags += ["--model.chat_template", "t.jinja", "--optim.max_steps", "2"]
    run(*flags)
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "status.json").unlink()  # killed while it put its adapter away
    config = mine / "model" / "config.json"
    changes: dict[str, tuple[Path, str]] = {
        "data.train": (mine / "rows.jsonl", (mine / "rows.jsonl").read_text().replace("Oslo", "Riga")),
        "model.name_or_path": (config, config.read_text().replace('"rope_theta": 10000', '"rope_theta": 50000')),
        "chat template": (tmp_path / "t.jinja", template.replace("<|im_end|>\n", "<|im_end|>")),
    }
    for name, (path, content) in changes.items():
        before = path.read_text()
        assert content != before
        path.write_text(content)
        with pytest.raises(ConfigError, match=rf"{name}.* changed since the run in run was begun"):
            run(*flags)
        path.write_text(before)
    run(*flags)
    assert read_status(tmp_path / "run")["state"] == "done"


def test_a_run_without_a_checkpoint_is_held_to_nothing(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    assert server.run(argv, tmp_path, at=At("SIGKILL", STEP, 2)) == [-signal.SIGKILL]
    assert server.run([*argv, "--optim.learning_rate", "1e-3"], tmp_path) == [0]
    assert [line["step"] for line in read_log(tmp_path / "run" / LOG)] == list(range(1, STEPS + 1))


def test_a_finished_run_goes_on_to_more_steps_under_a_constant_schedule(run: Run) -> None:
    flags = ["--optim.schedule", "constant", "--optim.warmup_ratio", "0", "--checkpoint.every_steps", "2"]
    whole = outcome(run(*flags, "--optim.max_steps", "6", name="whole"))
    folder = run(*flags, "--optim.max_steps", "4")
    assert read_log(folder / LOG)[-1]["step"] == 4
    run(*flags, "--optim.max_steps", "6")
    assert differences(folder, whole) == []


@pytest.mark.parametrize("schedule", [["--optim.schedule", "cosine"], ["--optim.schedule", "constant"]])
def test_other_schedules_and_warm_ups_depend_on_the_number_of_steps(run: Run, schedule: list[str]) -> None:
    run(*schedule, "--optim.max_steps", "2")
    with pytest.raises(ConfigError, match=r"optim\.max_steps is 3, but the run in run was begun with 2"):
        run(*schedule, "--optim.max_steps", "3")


# ---- what checkpoint.resume says


def test_never_refuses_a_directory_with_checkpoints(run: Run) -> None:
    folder = run("--optim.max_steps", "2", "--checkpoint.resume", "never")
    before = (folder / LOG).read_bytes()
    with pytest.raises(ConfigError, match=r"checkpoint\.resume is never, but run holds checkpoints"):
        run("--optim.max_steps", "2", "--checkpoint.resume", "never")
    assert (folder / LOG).read_bytes() == before


def test_a_run_begins_at_the_checkpoint_of_another_and_goes_on_with_its_own(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    argv[-1] = "fork"
    argv += ["--checkpoint.resume", "run/checkpoints/step-000006"]
    assert server.run(argv, tmp_path, at=At("SIGTERM", STEP, 2)) == [75]
    assert [line["step"] for line in read_log(tmp_path / "fork" / LOG)] == [7, 8]
    assert server.run(argv, tmp_path) == [0]
    assert [line["step"] for line in read_log(tmp_path / "fork" / LOG)] == [7, 8, 9, 10]
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "fork" / adapter).read_bytes() == whole(1).outcome[adapter]
    assert [step_of(home) for home in published(tmp_path / "run" / "checkpoints")] == [3, 6], "nothing is deleted there"


def test_a_checkpoint_is_refused_where_it_cannot_be_gone_on_from(run: Run) -> None:
    folder = run("--checkpoint.every_steps", "4")
    (older, newer) = published(folder / "checkpoints")
    with pytest.raises(ConfigError, match="is newer: move what is newer away"):
        run("--checkpoint.every_steps", "4", "--checkpoint.resume", str(older))
    with pytest.raises(ConfigError, match="no checkpoint"):
        run("--checkpoint.resume", "run/checkpoints/step-000099")
    with pytest.raises(ConfigError, match=r"lora\.rank is 8, but the run in .*run was begun with 4"):
        run("--lora.rank", "8", "--checkpoint.resume", str(newer), name="other")
    (newer / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-000010 is broken: adapter\.safetensors is not what was written"):
        run("--checkpoint.resume", str(newer), "--optim.epochs", "2", "--checkpoint.stop_after_no_gain", "99")


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_used(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    newest_home = published(tmp_path / "run" / "checkpoints")[-1]
    content = bytearray((newest_home / "moments.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (newest_home / "moments.safetensors").write_bytes(content)
    before = server.log.stat().st_size
    assert server.run(argv, tmp_path) == [0]
    told = server.log.read_bytes()[before:].decode()
    assert "step-000006 is broken: moments.safetensors is not what was written" in told
    assert "going on after step 3 of 10: 48 examples, 0.74 epochs are done" in told
    assert differences(tmp_path / "run", whole(1).outcome) == []


def test_a_lost_best_checkpoint_is_said_and_ends_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("--optim.max_steps", "4", "--checkpoint.every_steps", "2")
    log = read_log(folder / VALIDATION)
    log[0]["loss"] = 0.0  # the best was that of step 2
    (folder / VALIDATION).write_text("".join(json.dumps(line) + "\n" for line in log))
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    (folder / "status.json").unlink()
    run("--optim.max_steps", "4", "--checkpoint.every_steps", "2")
    assert "there is no adapter-best" in capsys.readouterr().err
    assert read_status(folder)["state"] == "done"


# ---- a full disk, and who failed


LIMITED = """
import os, resource
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the limit is on every file
from chatlora.training.runtime import Runtime
real, calls = Runtime.clip_gradients, []
def limited(*arguments):
    calls.append(None)
    if len(calls) == {step}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return real(*arguments)
Runtime.clip_gradients = limited
"""


@pytest.mark.parametrize(
    ("step", "limit", "told"),
    [
        (5, "40_000", "the checkpoint of step 6 could not be written to run/checkpoints: it needs 98,304 bytes"),
        (5, "os.path.getsize('run/log.jsonl')", "run/log.jsonl could not be written"),
    ],
)
def test_a_full_disk_stops_the_run_with_its_checkpoints_whole(
    server: ForkServer, argv: list[str], whole: Callable[[int], Whole], tmp_path: Path, step: int, limit: str, told: str
) -> None:
    """40,000 bytes hold an adapter, but not its moments."""
    assert server.run(argv, tmp_path, broken=LIMITED.format(step=step, limit=limit)) == [1]
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert told in read_status(tmp_path / "run")["message"]
    assert newest(tmp_path / "run").step == 3
    assert server.run(argv, tmp_path) == [0]
    assert differences(tmp_path / "run", whole(1).outcome) == []


def test_the_process_that_fails_first_says_why(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """What the others die of is its doing."""
    unlucky = (
        "import os\n"
        "from chatlora.training.runtime import Runtime\n"
        "real = Runtime.backward\n"
        "def backward(runtime, loss):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('rank 1 is out of luck')\n"
        "    real(runtime, loss)\n"
        "Runtime.backward = backward"
    )
    assert server.run(argv, tmp_path, ranks=2, broken=unlucky) == [1, 1]
    status = read_status(tmp_path / "run")
    assert (status["state"], status["message"]) == ("failed", "rank 1 is out of luck")


# ---- early stopping


def test_early_stopping_is_decided_the_same_after_kills(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """A learning rate that soon does harm: the validations after the best one are counted over kills and resumes."""
    argv += ["--optim.learning_rate", "10", "--optim.epochs", "4", "--optim.schedule", "constant"]
    argv += ["--checkpoint.every_steps", "1", "--checkpoint.stop_after_no_gain", "3"]
    (tmp_path / "whole").mkdir()
    assert server.run(argv, tmp_path / "whole") == [0]
    whole = outcome(tmp_path / "whole" / "run")
    losses = [line["loss"] for line in whole[VALIDATION]]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 20
    assert len(whole[LOG]) == len(losses)
    killed_at = At("SIGKILL", PUBLISH, len(losses) - 1)  # after the last validation but one, before its checkpoint
    assert server.run(argv, tmp_path, at=killed_at) == [-signal.SIGKILL]
    assert server.run(argv, tmp_path) == [0]
    assert differences(tmp_path / "run", whole) == []
    assert (tmp_path / "run" / "adapter-best" / "adapter_model.safetensors").is_file()
    log = (tmp_path / "run" / LOG).read_bytes()
    assert server.run(argv, tmp_path) == [0]
    assert (tmp_path / "run" / LOG).read_bytes() == log, "a run that ended early is finished"


# ---- logs


def test_logs_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / LOG
    whole = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 8)]
    endings = ["", '{"step": 8, "lo', '{"step": 8}\n{"st', "\0" * 40, "\0" * 40 + "\n", '["what"]\n', "\n\n"]
    for ending in endings:
        for step in range(9):
            path.write_text("".join(whole) + ending)
            cut_back(path, step)
            kept = 8 if step == 8 and ending.startswith('{"step": 8}') else min(step, 7)
            assert [line["step"] for line in read_log(path)] == list(range(1, kept + 1))
            assert path.read_text().startswith("".join(whole[:kept]))
    cut_back(tmp_path / "new", 5)
    assert (tmp_path / "new").read_bytes() == b""


def test_cutting_back_costs_what_is_cut_and_not_what_is_kept(tmp_path: Path) -> None:
    seconds = []
    for steps in (1_000, 300_000):
        path = tmp_path / f"{steps}.jsonl"
        path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, steps + 101)))
        times = []
        for extra in (100, 80, 60, 40, 20):
            began = time.perf_counter()
            cut_back(path, steps + extra)
            times.append(time.perf_counter() - began)
        seconds.append(min(times))
        assert read_log(path)[-1]["step"] == steps + 20
    assert seconds[1] < 10 * seconds[0] + 0.01


def test_a_resume_at_step_a_million_costs_what_one_at_step_ten_costs() -> None:
    """What is looked up for a step: its batch, its learning rate, how much is done."""
    import numpy as np

    from chatlora.config import OptimConfig
    from chatlora.data.batches import GlobalBatches
    from chatlora.training.timetable import Timetable

    lengths = np.random.default_rng(0).integers(10, 100, 10_000).astype(np.int32)
    seconds = []
    for step in (10, 1_000_000):
        times = []
        for _ in range(5):
            batches = GlobalBatches(lengths, lengths, 16, 1024, 0, 1)
            timetable = Timetable(OptimConfig(max_steps=2_000_000), batches.steps_per_epoch, 100)
            began = time.perf_counter()
            batch = batches[step]
            timetable.learning_rate(step)
            times.append(time.perf_counter() - began)
            assert batches.epochs_before(step + 1) == pytest.approx(batch.epoch)
            assert batches.examples_before(step + 1) - batches.examples_before(step) == len(batch.indices)
        seconds.append(min(times))
    assert seconds[1] < 5 * seconds[0] + 0.002


def test_the_log_and_the_state_agree_on_the_step(run: Run) -> None:
    folder = run("--checkpoint.every_steps", "4", "--checkpoint.keep_last", "9")
    for home in published(folder / "checkpoints"):
        found = read_checkpoint(home)
        assert found.adapter.keys() == found.moments["exp_avg"].keys() == found.moments["exp_avg_sq"].keys()
        assert all(torch.isfinite(tensor).all() for tensor in found.adapter.values())
        assert any(bool(tensor.any()) for tensor in found.moments["exp_avg_sq"].values())
        assert found.step in {line["step"] for line in read_log(folder / VALIDATION)}
