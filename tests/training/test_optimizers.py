"""Another optimizer, exchanged in one line: its state is in every checkpoint, or the run says that it cannot be."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from chatlora.checkpoint_names import published
from chatlora.run_directory import read_status
from chatlora.run_log import LOG, read_log
from tests.engine_runs import environment_of
from tests.fork_server import At, ForkServer
from tests.reference import distance
from tests.runs import STEP, differences, newest, outcome

SGD = "torch.optim.SGD(parameters, lr=0.0, momentum=0.9)"
MUON = "torch.optim.Muon(parameters, lr=0.0)"
MOVES = [(None, "zero2"), ("zero3", None), (None, "zero3"), ("fsdp2", "zero2"), ("zero3", "fsdp2")]
FORGETTING = """
from chatlora.training import state
scatter = state._scatter
def broken(runtime, model, optimizer, *given):
    scatter(runtime, model, optimizer, *given)
    optimizer.state.clear()
state._scatter = broken
"""


def slow(values: tuple[Any, ...]) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def exchanged(optimizer: str) -> str:
    """The one line of a fork: what `make_optimizer` returns."""
    return (
        "import torch\nfrom chatlora.training import setup\n"
        f"setup.make_optimizer = lambda config, runtime, parameters: {optimizer}\n"
    )


def run(
    server: ForkServer,
    argv: list[str],
    folder: Path,
    config: str | None,
    fork: str,
    at: At | None = None,
    steps: int = 6,
) -> None:
    """Six steps, saved after every second one."""
    folder.mkdir(exist_ok=True)
    ranks = 1 if config is None else 2
    flags = ["--optim.max_steps", str(steps), "--checkpoint.every_steps", "2"]
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
    if config is None:
        shutil.copytree(killed, tmp_path / "broken")
        run(server, argv, tmp_path / "broken", config, exchanged(optimizer) + FORGETTING)
        assert differences(tmp_path / "broken" / "run", outcome(whole / "run")) != []
    run(server, argv, killed, config, exchanged(optimizer))
    assert differences(killed / "run", outcome(whole / "run")) == []


@pytest.mark.parametrize("config", [None, slow(("zero2",)), slow(("fsdp2",)), slow(("zero3",))])
def test_b_learns_at_its_own_rate_and_the_run_resumes_to_the_bit(
    server: ForkServer, argv: list[str], tmp_path: Path, config: str | None
) -> None:
    """B starts at zero, so that after AdamW's first step it is as large as its rate; A has had no gradient yet."""
    whole, killed, faster, plain = (tmp_path / name for name in ("whole", "killed", "faster", "plain"))
    ratio = ["--optim.lr_ratio_b", "4"]
    run(server, [*argv, *ratio], whole, config, "")
    run(server, [*argv, *ratio], killed, config, "", at=At("SIGKILL", STEP, 4))
    run(server, [*argv, *ratio], killed, config, "")
    assert differences(killed / "run", outcome(whole / "run")) == []
    run(server, [*argv, *ratio], faster, config, "", steps=1)
    run(server, argv, plain, config, "", steps=1)
    slow_ones = newest(plain / "run").adapter
    for name, tensor in newest(faster / "run").adapter.items():
        assert torch.allclose(tensor, slow_ones[name] * (4 if "lora_B" in name else 1), rtol=1e-4, atol=1e-9), name
    logged = [read_log(folder / "run" / LOG)[0]["learning_rate"] for folder in (faster, plain)]
    assert logged[0] == logged[1]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_dora_is_refused_where_an_engine_spreads_the_base(
    server: ForkServer, argv: list[str], tmp_path: Path, config: str
) -> None:
    argv = [*argv, "--lora.variant", "dora"]
    assert server.run(argv, tmp_path, ranks=2, environment=environment_of(config)) == [2, 2]
    assert f"lora.variant is dora, which reads the base's weights past {config}" in server.log.read_text()


@pytest.mark.parametrize("config", [None, slow(("zero2",))])
def test_a_dora_run_resumes_to_the_bit(server: ForkServer, argv: list[str], tmp_path: Path, config: str | None) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = [*argv, "--lora.variant", "dora"]
    run(server, argv, whole, config, "")
    run(server, argv, killed, config, "", at=At("SIGKILL", STEP, 4))
    run(server, argv, killed, config, "")
    assert differences(killed / "run", outcome(whole / "run")) == []
    lengths = [name for name in newest(whole / "run").adapter if "lora_magnitude_vector" in name]
    assert len(lengths) == 14


UNROUNDED = "torch.Tensor.bfloat16 = torch.Tensor.clone\n"  # Muon's products in fp32: what is left is no rounding
BY_PIECE = """
from torch.distributed.tensor import DTensor
from torch.optim import _muon as muon
whole = muon._zeropower_via_newtonschulz
def piece(matrix, *given):
    made = whole(matrix.to_local(), *given)
    return DTensor.from_local(made, matrix.device_mesh, matrix.placements, shape=matrix.shape, stride=matrix.stride())
muon._zeropower_via_newtonschulz = piece
"""


def test_muon_computes_under_fsdp2_what_it_computes_under_one_process(
    server: ForkServer, argv: list[str], tmp_path: Path
) -> None:
    argv += ["--lora.dropout", "0"]
    for name, config, broken in (("one", None, ""), ("two", "fsdp2", ""), ("by piece", "fsdp2", BY_PIECE)):
        run(server, argv, tmp_path / name, config, exchanged(MUON) + UNROUNDED + broken)
    one, two, by_piece = (newest(tmp_path / name / "run") for name in ("one", "two", "by piece"))
    buffers = [each.optimizer["momentum_buffer"] for each in (two, one)]
    print(f"Muon, one process and FSDP2: {distance(two.adapter, one.adapter):.1e}, {distance(*buffers):.1e}")
    assert distance(two.adapter, one.adapter) <= 2e-5
    assert distance(*buffers) <= 2e-5
    assert distance(by_piece.adapter, one.adapter) > 1e-2


def refusal(server: ForkServer, argv: list[str], folder: Path, config: str | None, fork: str) -> str:
    """What the run says when it ends. It has taken no step that it has not saved."""
    ranks = 1 if config is None else 2
    found = server.run(argv, folder, ranks=ranks, environment=environment_of(config), broken=fork)
    assert 0 not in found
    return str(read_status(folder / "run")["message"])


@pytest.mark.parametrize("config", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_muon_is_refused_deepspeeds_flat_pieces_before_the_first_step(
    server: ForkServer, argv: list[str], tmp_path: Path, config: str
) -> None:
    told = refusal(server, argv, tmp_path, config, exchanged(MUON))
    assert "Muon does not compute each element of an update by itself" in told
    assert "accelerate_configs/multi_gpu.yaml" in told
    assert not (tmp_path / "run" / LOG).exists() or not read_log(tmp_path / "run" / LOG)


def test_an_optimizer_that_keeps_its_state_elsewhere_stops_in_the_first_step(
    server: ForkServer, argv: list[str], tmp_path: Path
) -> None:
    fork = "from tests.optimizers import Elsewhere\n" + exchanged("Elsewhere(parameters)")
    assert "the optimizer keeps no state for" in refusal(server, argv, tmp_path, None, fork)
    assert published(tmp_path / "run" / "checkpoints") == []


def test_a_checkpoint_of_another_optimizer_is_refused(
    server: ForkServer, argv: list[str], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    told = refusal(server, argv, tmp_path, None, exchanged(SGD))
    assert "the checkpoint of step 6 holds the state of AdamW, and the optimizer is now SGD" in told


@pytest.mark.parametrize(("first", "second"), [("zero2", None), *map(slow, MOVES)])
def test_a_run_with_another_optimizer_goes_on_under_another_engine(
    server: ForkServer, argv: list[str], tmp_path: Path, first: str | None, second: str | None
) -> None:
    argv += ["--lora.dropout", "0"]
    run(server, argv, tmp_path / "whole", None, exchanged(SGD))
    run(server, argv, tmp_path / "moved", first, exchanged(SGD), at=At("SIGKILL", STEP, 4))
    run(server, argv, tmp_path / "moved", second, exchanged(SGD))
    moved, whole = newest(tmp_path / "moved" / "run"), newest(tmp_path / "whole" / "run")
    assert distance(moved.adapter, whole.adapter) <= 1e-5
    assert distance(moved.optimizer["momentum_buffer"], whole.optimizer["momentum_buffer"]) <= 1e-5


KEPT = {"buffer": torch.bfloat16, "count": torch.int64, "factor": torch.float64, "row": torch.float32}


BY_ROW = [(None, True), ("fsdp2", True), *map(slow, [("zero2", False), ("zero3", False)])]


@pytest.mark.parametrize(("config", "by_row"), BY_ROW)
def test_state_of_any_type_and_shape_is_read_back_as_it_was(
    server: ForkServer, argv: list[str], tmp_path: Path, config: str | None, by_row: bool
) -> None:
    fork = "from tests.optimizers import Odd\n" + exchanged(f"Odd(parameters, by_row={by_row})")
    run(server, argv, tmp_path / "whole", config, fork)
    run(server, argv, tmp_path / "killed", config, fork, at=At("SIGKILL", STEP, 4))
    saved = newest(tmp_path / "killed" / "run")
    kinds = {kind: dtype for kind, dtype in KEPT.items() if by_row or kind != "row"}
    assert {kind: next(iter(tensors.values())).dtype for kind, tensors in saved.optimizer.items()} == kinds
    name, matrix = next(iter(saved.adapter.items()))
    assert saved.optimizer["count"][name].shape == matrix.shape
    assert saved.optimizer["factor"][name].shape == ()
    assert not by_row or saved.optimizer["row"][name].shape == (len(matrix), 1)
    run(server, argv, tmp_path / "killed", config, fork)
    assert differences(tmp_path / "killed" / "run", outcome(tmp_path / "whole" / "run")) == []
