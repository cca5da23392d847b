"""Every file of accelerate_configs/, unchanged, through the real launcher: the engine that it names, the same run."""

import json
from pathlib import Path

import pytest
import torch

from chatlora.run_log import read_log
from tests.fork_server import ForkServer
from tests.launched import REPOSITORY, launched

FLAGS = ["--lora.dropout", "0", "--optim.max_steps", "2", "--evaluation.after_training", "true"]
FLAGS += ["--evaluation.max_new_tokens", "4"]
FAST = {"zero3": ("zero3", 2)}
SLOW = {
    "cpu": ("single", 1),
    "single_gpu": ("single", 1),
    "multi_gpu": ("ddp", 2),
    "multi_node": ("ddp", 2),
    "zero1": ("zero1", 2),
    "zero2": ("zero2", 2),
    "zero3_offload": ("zero3", 2),
    "fsdp2": ("fsdp2", 2),
}


def test_no_file_is_left_out() -> None:
    assert {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")} == FAST.keys() | SLOW.keys()


@pytest.fixture(scope="module")
def alone(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    flags = ["--run.output_dir", str(folder), "--data.test", str(world / "rows.jsonl"), *FLAGS]
    assert server.run([str(world / "my.yaml"), *flags], world) == [0]
    return folder


def launch(world: Path, alone: Path, cwd: Path, config: str, engine: str, processes: int) -> None:
    argv = [str(world / "my.yaml"), "--run.output_dir", "run", "--data.test", str(world / "rows.jsonl"), *FLAGS]
    told = launched(
        *("train", argv, cwd),
        config=config,
        processes=processes,
        words=["--num_machines", "1"] if config == "multi_node" else [],
        environment={"CHATLORA_CACHE": str(world / "cache")},
    )
    assert told.returncode == 0, told.stderr[-4000:]
    assert f"{processes} process(es), {engine} on " in told.stderr
    if not torch.accelerator.is_available():
        assert told.stderr.partition("LoRA touches")[0].count("no GPU is used") == (config != "cpu")
        assert (told.stdout + told.stderr).count("Setting accelerator to CPU") <= 1  # accelerate's launcher, not a rank
    ran = json.loads((cwd / "run" / "environment.json").read_text())
    assert (ran["engine"], ran["num_processes"]) == (engine, processes)
    losses = [line["loss"] for line in read_log(cwd / "run" / "log.jsonl")]
    assert losses == pytest.approx([line["loss"] for line in read_log(alone / "log.jsonl")], rel=5e-6)
    for name in ("test", "test-base"):
        answers = Path("eval") / name / "predictions.jsonl"
        assert (cwd / "run" / answers).read_text() == (alone / answers).read_text()


@pytest.mark.parametrize("config", FAST)
def test_a_configuration_file_runs_what_it_names(world: Path, alone: Path, tmp_path: Path, config: str) -> None:
    launch(world, alone, tmp_path, config, *FAST[config])


@pytest.mark.slow
@pytest.mark.parametrize("config", SLOW)
def test_every_other_configuration_file_too(world: Path, alone: Path, tmp_path: Path, config: str) -> None:
    launch(world, alone, tmp_path, config, *SLOW[config])
