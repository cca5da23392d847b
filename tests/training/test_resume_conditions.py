"""What a run goes on from and with: changed settings and contents, other checkpoints, full disks, early stops, logs."""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from chatlora.checkpoint_names import published, step_of
from chatlora.errors import CheckpointError, ConfigError
from chatlora.run_directory import read_status
from chatlora.run_log import LOG, VALIDATION, cut_back, read_log
from chatlora.training.checkpoint import read_checkpoint
from tests.costs import bytes_touched_by, calls_of
from tests.fork_server import At, ForkServer
from tests.runs import STEP, STEPS, Whole, differences, newest, outcome

Run = Callable[..., Path]
PUBLISH = "chatlora.training.state:publish"


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
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    argv[-1] = "fork"
    argv += ["--checkpoint.resume", "run/checkpoints/step-000006"]
    assert server.run(argv, tmp_path, at=At("SIGTERM", STEP, 2)) == [75]
    assert [line["step"] for line in read_log(tmp_path / "fork" / LOG)] == [7, 8]
    assert [step_of(home) for home in published(tmp_path / "fork" / "checkpoints")] == [6, 8], "the first may be best"
    assert server.run(argv, tmp_path) == [0]
    assert [line["step"] for line in read_log(tmp_path / "fork" / LOG)] == [7, 8, 9, 10]
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "fork" / adapter).read_bytes() == whole(1).outcome[adapter]
    assert [step_of(home) for home in published(tmp_path / "run" / "checkpoints")] == [3, 6], "nothing is deleted there"


def test_a_run_that_is_longer_already_is_not_called_shorter(run: Run) -> None:
    flags = ["--optim.schedule", "constant", "--optim.warmup_ratio", "0", "--checkpoint.every_steps", "2"]
    folder = run(*flags, "--optim.max_steps", "6")
    before = outcome(folder), (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"run has 6 steps already, .*it ends after step 4: .*--run\.output_dir"):
        run(*flags, "--optim.max_steps", "4")
    lines = [{"step": step, "loss": loss} for step, loss in ((2, 1.0), (4, 2.0), (6, 3.0))]
    (folder / VALIDATION).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=r"has 6 steps already, .*it ends after step 4"):
        run(*flags, "--optim.max_steps", "6", "--checkpoint.stop_after_no_gain", "1")
    assert ({**outcome(folder), VALIDATION: before[0][VALIDATION]}, (folder / "config.yaml").read_text()) == before


def test_what_rank_0_alone_finds_out_it_alone_tells(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    flags = [*argv, "--optim.schedule", "constant", "--optim.warmup_ratio", "0"]
    assert server.run([*flags, "--optim.max_steps", "2"], tmp_path) == [0]
    for settings, told in (
        (["--checkpoint.resume", "never"], "checkpoint.resume is never, but"),  # before anything is loaded
        (["--optim.max_steps", "1"], "has 2 steps already"),  # with all there
    ):
        before = server.log.stat().st_size
        assert server.run([*flags, *settings], tmp_path, ranks=2) == [2, 2]
        log = server.log.read_bytes()[before:].decode()
        assert "Traceback" not in log
        assert log.count(told) == 1


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
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    newest_home = published(tmp_path / "run" / "checkpoints")[-1]
    content = bytearray((newest_home / "optimizer.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (newest_home / "optimizer.safetensors").write_bytes(content)
    before = server.log.stat().st_size
    assert server.run(argv, tmp_path) == [0]
    told = server.log.read_bytes()[before:].decode()
    assert "step-000006 is broken: optimizer.safetensors is not what was written" in told
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
from chatlora.distributed.runtime import Runtime
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
        (5, "40_000", "the checkpoint of step 6 could not be written to run/checkpoints: it needs 98,416 bytes"),
        (5, "os.path.getsize('run/log.jsonl')", "run/log.jsonl could not be written"),
    ],
)
def test_a_full_disk_stops_the_run_with_its_checkpoints_whole(
    server: ForkServer, argv: list[str], whole: Callable[..., Whole], tmp_path: Path, step: int, limit: str, told: str
) -> None:
    """40,000 bytes hold an adapter, but not the optimizer's state."""
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
        "from chatlora.distributed.runtime import Runtime\n"
        "real = Runtime.backward\n"
        "def backward(runtime, loss):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('rank 1 is out of luck')\n"
        "    real(runtime, loss)\n"
        "Runtime.backward = backward"
    )
    assert server.run(argv, tmp_path, ranks=2, broken=unlucky) == [1, 1]
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed"
    assert status["message"].endswith("rank 1 is out of luck")


# ---- early stopping


def test_early_stopping_is_decided_the_same_after_kills(server: ForkServer, argv: list[str], tmp_path: Path) -> None:
    """A learning rate that soon helps no more: validations after the best are counted over kills and resumes."""
    argv += ["--optim.learning_rate", "10", "--optim.epochs", "8", "--optim.schedule", "constant"]
    argv += ["--checkpoint.every_steps", "1", "--checkpoint.stop_after_no_gain", "3"]
    (tmp_path / "whole").mkdir()
    assert server.run(argv, tmp_path / "whole") == [0]
    whole = outcome(tmp_path / "whole" / "run")
    losses = [line["loss"] for line in whole[VALIDATION]]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 40
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
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 300_101)))
    size = path.stat().st_size
    assert min(bytes_touched_by(partial(cut_back, path, 300_000 + extra)) for extra in (80, 60, 40, 20)) < size / 4
    assert read_log(path)[-1]["step"] == 300_020
    assert bytes_touched_by(path.read_bytes) > size / 2  # so much would be counted


def test_a_resume_at_step_a_million_costs_what_one_at_step_ten_costs() -> None:
    """What is looked up for a step: its batch, its learning rate, how much is done."""
    import numpy as np

    from chatlora.config import OptimConfig
    from chatlora.data.batches import GlobalBatches
    from chatlora.training.schedule import Schedule

    lengths = np.random.default_rng(0).integers(10, 100, 10_000).astype(np.int32)

    def look_up(step: int) -> None:
        batches = GlobalBatches(lengths, lengths, 16, 1024, 0, 1)
        batch = batches[step]
        Schedule(OptimConfig(max_steps=2_000_000), batches.steps_per_epoch, 100).learning_rate(step)
        assert batches.epochs_before(step + 1) == batch.epoch
        assert batches.examples_before(step + 1) - batches.examples_before(step) == len(batch.indices)

    assert calls_of(lambda: look_up(1_000_000)) < 1.5 * calls_of(lambda: look_up(10))


def test_the_log_and_the_state_agree_on_the_step(run: Run) -> None:
    folder = run("--checkpoint.every_steps", "4", "--checkpoint.keep_last", "9")
    for home in published(folder / "checkpoints"):
        found = read_checkpoint(home)
        assert found.adapter.keys() == found.optimizer["exp_avg"].keys() == found.optimizer["exp_avg_sq"].keys()
        assert all(torch.isfinite(tensor).all() for tensor in found.adapter.values())
        assert any(bool(tensor.any()) for tensor in found.optimizer["exp_avg_sq"].values())
        assert found.step in {line["step"] for line in read_log(folder / VALIDATION)}
