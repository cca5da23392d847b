"""Another optimizer, exchanged in one line: its state is in every checkpoint, or the run says that it cannot be."""

import signal
from pathlib import Path

import pytest
import torch

from chatlora.run_directory import LOG, read_log, read_status
from chatlora.training.checkpoint import published
from tests.engine_runs import environment_of
from tests.fork_server import At, ForkServer
from tests.reference import distance
from tests.runs import STEP, differences, newest, outcome

SGD = "torch.optim.SGD(parameters, lr=0.0, momentum=0.9)"
MUON = "torch.optim.Muon(parameters, lr=0.0)"
FORGETTING = """
from chatlora.training import state
scatter = state._scatter
def broken(runtime, model, optimizer, *given):
    scatter(runtime, model, optimizer, *given)
    optimizer.state.clear()
state._scatter = broken
"""


def exchanged(optimizer: str) -> str:
    """The one line of a fork: what `make_optimizer` returns."""
    return (
        "import torch\nfrom chatlora.training import setup\n"
        f"setup.make_optimizer = lambda config, runtime, parameters: {optimizer}\n"
    )


def run(server: ForkServer, argv: list[str], folder: Path, config: str | None, fork: str, at: At | None = None) -> None:
    """Six steps, saved after every second one."""
    folder.mkdir(exist_ok=True)
    ranks = 1 if config is None else 2
    flags = ["--optim.max_steps", "6", "--checkpoint.every_steps", "2"]
    found = server.run([*argv, *flags], folder, ranks=ranks, environment=environment_of(config), broken=fork, at=at)
    assert found == [0 if at is None else -signal.SIGKILL] * ranks, server.log.read_text()[-4000:]


@pytest.mark.parametrize(
    ("optimizer", "config"), [(SGD, None), (SGD, "zero2"), (SGD, "fsdp2"), (MUON, None), (MUON, "fsdp2")]
)
def test_a_run_with_another_optimizer_resumes_to_the_bit(
    server: ForkServer, argv: list[str], tmp_path: Path, optimizer: str, config: str | None
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(server, argv, whole, config, exchanged(optimizer))
    run(server, argv, killed, config, exchanged(optimizer), at=At("SIGKILL", STEP, 4))
    saved = newest(killed / "run")
    assert saved.step == 2
    assert saved.optimizer.keys() == {"momentum_buffer"}
    assert saved.optimizer["momentum_buffer"].keys() == saved.adapter.keys()
    assert all(bool(tensor.any()) for tensor in saved.optimizer["momentum_buffer"].values())
    run(server, argv, killed, config, exchanged(optimizer))
    assert differences(killed / "run", outcome(whole / "run")) == []
    if config is None:
        run(server, argv, tmp_path / "broken", config, exchanged(optimizer), at=At("SIGKILL", STEP, 4))
        run(server, argv, tmp_path / "broken", config, exchanged(optimizer) + FORGETTING)
        assert differences(tmp_path / "broken" / "run", outcome(whole / "run")) != []


def test_muon_computes_under_fsdp2_what_it_computes_under_one_process(
    server: ForkServer, argv: list[str], tmp_path: Path
) -> None:
    argv += ["--lora.dropout", "0"]
    for name, config in (("one", None), ("two", "fsdp2")):
        run(server, argv, tmp_path / name, config, exchanged(MUON))
    one, two = newest(tmp_path / "one" / "run"), newest(tmp_path / "two" / "run")
    print(distance(two.adapter, one.adapter), distance(two.optimizer["momentum_buffer"], one.optimizer["momentum_buffer"]))
