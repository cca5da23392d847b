"""The gradient certificate holds under every engine, and not for a broken program."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine_runs import ENGINES, environment_of
from tests.fork_server import ForkServer

NOTING = """
from dataclasses import asdict
from chatlora.commands import invariance
import json, os
show = invariance.show
def noting(certificate):
    show(certificate)
    open({path!r}, "w").write(json.dumps(asdict(certificate)))
invariance.show = noting
"""


def certify(
    server: ForkServer, world: Path, folder: Path, config: str | None, *flags: str, broken: str = ""
) -> tuple[list[int], dict[str, Any]]:
    """The exit statuses of the ranks and the certificate."""
    path = folder / "certificate.json"
    statuses = server.run(
        [str(world / "my.yaml"), *flags],
        folder,
        script="tests.invariance_script",
        ranks=1 if config is None else 2,
        environment=environment_of(config),
        broken=NOTING.format(path=str(path)) + broken,
    )
    assert path.is_file(), server.log.read_text()[-4000:]
    return statuses, json.loads(path.read_text())


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero3", "zero3_offload")]


@pytest.mark.parametrize("config", [None, "multi_gpu", "zero2", "fsdp2", *SLOW])
def test_every_way_gives_one_gradient(server: ForkServer, world: Path, tmp_path: Path, config: str | None) -> None:
    statuses, certificate = certify(server, world, tmp_path, config)
    assert set(statuses) == {0}
    assert certificate["engine"] == ("single" if config is None else ENGINES[config])
    ways = [tuple(outcome["way"].values()) for outcome in certificate["outcomes"]]
    assert len(set(ways)) == len(ways) == (8 if config is None else 16)
    worst = max(max(outcome["loss"], outcome["gradient"]) for outcome in certificate["outcomes"])
    print(f"{config}: {worst:.1e}, mean of means {certificate['mean_of_means']:.1e}")
    assert worst <= certificate["tolerance"] == 5e-6
    assert certificate["mean_of_means"] > 1000 * certificate["tolerance"]


UNSCALED = """
from chatlora.distributed.runtime import Runtime
Runtime.backward = lambda runtime, loss: runtime.accelerator.backward(loss)
"""
LEAKING = """
from tests.model.test_gradients import crossing
from transformers import AttentionInterface
import chatlora.model.attention, chatlora.training.setup as setup
AttentionInterface.register(chatlora.model.attention.PACKED, crossing)
setup.why_not_packed = lambda model, *, exact: None
"""


@pytest.mark.parametrize(
    ("config", "broken"),
    [("multi_gpu", UNSCALED), (None, LEAKING), (None, "from tests.engine_runs import *; mean_of_means()")],
    ids=["a rank's share counts half", "conversations see each other", "mean of means"],
)
def test_a_broken_program_gets_no_certificate(
    server: ForkServer, world: Path, tmp_path: Path, config: str | None, broken: str
) -> None:
    statuses, certificate = certify(server, world, tmp_path, config, broken=broken)
    assert set(statuses) == {1}
    worst = max(outcome["gradient"] for outcome in certificate["outcomes"])
    assert worst > 100 * certificate["tolerance"]
