"""What a run leaves behind, and whether another one left the same."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chatlora.checkpoint_names import published, step_of
from chatlora.run_directory import read_status
from chatlora.run_log import LOG, VALIDATION, read_log
from chatlora.training.checkpoint import Checkpoint, newest_checkpoint
from tests.engine_runs import ENGINES, environment_of
from tests.fork_server import At, ForkServer

STEPS = 10
FLAGS = ["--checkpoint.every_steps", "3", "--optim.max_tokens_per_micro_batch", "600", "--run.output_dir", "run"]
DIFFERS = ("seconds", "peak_memory_bytes")  # from run to run, and may

SEED_DRAWS = "chatlora.distributed.runtime:Runtime.seed_draws"
STEP = "chatlora.distributed.runtime:Runtime.clip_gradients"  # once a step, before the optimizer's
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
    files = [home / "adapter.safetensors", home / "optimizer.safetensors", home / "progress.json"]
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


def undisturbed(server: ForkServer, world: Path, folder: Path, ranks: int, config: str | None = None) -> Whole:
    """config: a file of accelerate_configs/."""
    argv, under = [str(world / "my.yaml"), *FLAGS], environment_of(config)
    server.run(argv, folder, ranks=ranks, environment=under)  # the first one renders the data
    shutil.rmtree(folder / "run")
    began = time.monotonic()
    assert server.run(argv, folder, ranks=ranks, environment=under) == [0] * ranks
    whole = Whole(outcome(folder / "run"), time.monotonic() - began)
    assert [line["step"] for line in whole.outcome[LOG]] == list(range(1, STEPS + 1))
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert environment["num_processes"] == ranks
    assert config is None or environment["engine"] == ENGINES[config]
    return whole


def killed_in_step_8(server: ForkServer, world: Path, folder: Path) -> Path:
    at = At("SIGKILL", STEP, 8)
    assert server.run([str(world / "my.yaml"), *FLAGS], folder, at=at) == [-signal.SIGKILL]
    return folder / "run"


def noted(notes: list[Any], value: Any) -> Any:
    """`value`, which is a note now, too: what a real function was given or gave back."""
    notes.append(value)
    return value


def saved(folder: Path) -> list[int]:
    """The steps of the checkpoints of `folder`/run."""
    return [step_of(home) for home in published(folder / "run" / "checkpoints")]


def wait_until(condition: Callable[[], bool]) -> None:
    """pytest's own limit ends a test of which this never comes true."""
    while not condition():
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """A process that has ended and that nobody waits for, as in a container without an init, is not alive."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
