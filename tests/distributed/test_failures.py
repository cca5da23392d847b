"""One rank raises or is killed: the job ends, non-zero, and says which rank and why.

It ends soon: a rank that waits for the one that left does so for half an hour, longer than any test may take.
"""

from pathlib import Path

import pytest

from chatlora.run_directory import read_status
from tests.fork_server import ForkServer
from tests.launched import launched

PLACES = {
    "load": ("train", "chatlora.training.setup:load_base_model", 1),
    "step": ("train", "chatlora.distributed.runtime:Runtime.clip_gradients", 3),
    "validation": ("train", "train:validate", 1),
    "save": ("train", "chatlora.training.state:gather", 1),
    "evaluation": ("evaluate", "chatlora.evaluation.generation:Results.append", 1),
}
RAISES = "from tests.engine_runs import fail; fail(1, {place!r}, {call})"
KILLED = "from tests.engine_runs import *; os.environ['RANK'] == '1' and arm(At('SIGKILL', {place!r}, {call}))"
FAST = [("multi_gpu", "step", RAISES)]
SLOW = [
    (config, where, how)
    for config in ("multi_gpu", "zero2", "zero3", "fsdp2")
    for where in PLACES
    for how in (RAISES, KILLED)
    if (config, where, how) not in FAST
]


@pytest.fixture(scope="module")
def finished(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert server.run([str(world / "my.yaml"), "--run.output_dir", str(folder)], world) == [0]
    return folder


def end(world: Path, folder: Path, config: str, where: str, how: str, adapter: Path | None = None) -> None:
    script, place, call = PLACES[where]
    if script == "train":
        argv = [str(world / "my.yaml"), "--run.output_dir", str(folder / "run")]
    else:
        argv = [str(adapter), "--data", str(world / "rows.jsonl"), "--evaluation.max_new_tokens", "4"]
        argv += ["--output_dir", str(folder / "run")]
    told = launched(
        *(script, argv, folder),
        config=config,
        processes=2,
        planted=how.format(place=place, call=call),
        environment={"CHATLORA_CACHE": str(world / "cache")},
    )
    assert told.returncode != 0
    report = told.stderr[told.stderr.rindex("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in report
    status = read_status(folder / "run")
    if how is RAISES:
        assert f"planted in {place}" in told.stderr
        if script == "train":
            assert status["state"] == "failed"
            assert status["message"].startswith("rank 1 of 2: planted in")
    else:
        assert "SIGKILL" in report


@pytest.mark.parametrize(("config", "where", "how"), FAST)
def test_one_rank_ends_and_the_job_ends(world: Path, tmp_path: Path, config: str, where: str, how: str) -> None:
    end(world, tmp_path, config, where, how)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "where", "how"), SLOW)
def test_one_rank_ends_anywhere_and_the_job_ends(
    world: Path, finished: Path, tmp_path: Path, config: str, where: str, how: str
) -> None:
    end(world, tmp_path, config, where, how, finished)
