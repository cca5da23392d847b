"""One rank raises or is killed: the job ends, non-zero and soon, and says which rank and why."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatlora.run_directory import read_status
from tests.fork_server import ForkServer

REPOSITORY = Path(__file__).resolve().parents[2]
PLACES = {
    "load": ("train", "chatlora.training.setup:load_base_model", 1),
    "step": ("train", "chatlora.distributed.runtime:Runtime.clip_gradients", 3),
    "validation": ("train", "train:validate", 1),
    "save": ("train", "chatlora.training.state:gather", 1),
    "evaluation": ("evaluate", "chatlora.evaluation.generation:Results.append", 1),
}
SECONDS = 60.0  # of the whole job; an idle machine takes about ten
RAISES = "from tests.engine_runs import fail; fail(1, {place!r}, {call})"
KILLED = "from tests.engine_runs import *; os.environ['RANK'] == '1' and arm(At('SIGKILL', {place!r}, {call}))"
FAST = [("multi_gpu", "step", RAISES), ("zero2", "save", KILLED)]
SLOW = [
    (config, where, how)
    for config in ("multi_gpu", "zero3", "fsdp2")
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
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(REPOSITORY / "accelerate_configs" / f"{config}.yaml")]
    command += [str(REPOSITORY / "tests" / "launched.py"), script]
    if script == "train":
        command += [str(world / "my.yaml"), "--run.output_dir", str(folder / "run")]
    else:
        command += [str(adapter), "--data", str(world / "rows.jsonl"), "--evaluation.max_new_tokens", "4"]
        command += ["--output_dir", str(folder / "run")]
    variables = {**os.environ, "CHATLORA_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1"}
    variables["PLANTED"] = how.format(place=place, call=call)
    began = time.monotonic()
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=variables, cwd=folder)
    seconds = time.monotonic() - began
    print(f"{config}, {where}, {'raised' if how is RAISES else 'killed'}: {seconds:.0f} s")
    assert told.returncode != 0
    assert seconds < SECONDS + 30 * (os.getloadavg()[0] > 4)
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
