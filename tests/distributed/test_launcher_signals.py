"""Signals where a launcher, a shell or a scheduler stands between: real processes, started from outside."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate.utils.other import get_free_port

from chatlora.run_directory import read_status
from chatlora.run_log import LOG, read_log
from tests.launched import REPOSITORY, launch_command
from tests.runs import is_alive, saved, wait_until


@contextmanager
def started(command: list[str], folder: Path, cache: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; whatever is left of it at the end is killed."""
    environment = {**os.environ, "CHATLORA_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    family: list[int] = []
    try:
        wait_until(lambda: has_begun(folder) or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        family += children_of(process.pid)
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in family:
            if is_alive(pid) and Path(f"/proc/{pid}/cwd").resolve() == folder.resolve():
                os.kill(pid, signal.SIGKILL)


LONG = ("--optim.epochs", "2000")


def has_begun(folder: Path) -> bool:
    return bool(read_log(folder / "run" / LOG))


def is_over(folder: Path) -> bool:
    return read_status(folder / "run").get("state") != "running"


def children_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("config", "processes", "name"),
    [
        ("cpu", 1, "SIGTERM"),
        ("cpu", 1, "SIGINT"),
        ("cpu", 1, "SIGUSR1"),
        ("cpu", 1, "SIGKILL"),
        ("multi_gpu", 2, "SIGTERM"),
        ("multi_gpu", 2, "SIGINT"),
        ("multi_gpu", 2, "SIGUSR1"),
        ("multi_gpu", 2, "SIGKILL"),
    ],
)
def test_a_signal_to_the_launcher_alone_stops_the_run(
    world: Path, argv: list[str], tmp_path: Path, config: str, processes: int, name: str
) -> None:
    """One process: the launcher passes nothing on. SIGUSR1 and SIGKILL: no launcher passes them on. It dies of them."""
    with started(launch_command("train.py", [*argv, *LONG], config, processes), tmp_path, world / "cache") as launcher:
        workers = children_of(launcher.pid)
        assert len(workers) >= processes
        launcher.send_signal(getattr(signal, name))
        assert launcher.wait() != 0
        wait_until(lambda: is_over(tmp_path))
        status = read_status(tmp_path / "run")
        assert status["state"] == "stopped"
        assert saved(tmp_path)[-1] == status["step"] == read_log(tmp_path / "run" / LOG)[-1]["step"]
        wait_until(lambda: not any(is_alive(pid) for pid in workers))


def test_a_run_that_a_shell_started_outlives_its_shell(world: Path, argv: list[str], tmp_path: Path) -> None:
    command = " ".join([sys.executable, str(REPOSITORY / "train.py"), *argv, *LONG])
    with started(["bash", "-c", f"nohup {command} & echo $! > pid; sleep 300"], tmp_path, world / "cache") as shell:
        process = int((tmp_path / "pid").read_text())
        shell.kill()
        shell.wait()
        step = read_log(tmp_path / "run" / LOG)[-1]["step"]
        wait_until(lambda: read_log(tmp_path / "run" / LOG)[-1]["step"] > step + 3)
        assert read_status(tmp_path / "run")["state"] == "running"
        os.kill(process, signal.SIGTERM)
        wait_until(lambda: is_over(tmp_path))
        assert read_status(tmp_path / "run")["state"] == "stopped"


@pytest.mark.slow
def test_tasks_that_a_script_gave_their_ranks_find_each_other(world: Path, argv: list[str], tmp_path: Path) -> None:
    """As srun starts them, without LOCAL_WORLD_SIZE."""
    script = f"""
export CHATLORA_CACHE={world / "cache"} OMP_NUM_THREADS=1
export MASTER_ADDR=127.0.0.1 MASTER_PORT={get_free_port()} WORLD_SIZE=2
for rank in 0 1; do
    RANK=$rank LOCAL_RANK=$rank {sys.executable} {REPOSITORY / "train.py"} {" ".join(argv)} --optim.max_steps 1 &
done
wait"""
    told = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    assert "2 process(es), ddp on " in told.stderr, told.stderr[-4000:]
    assert saved(tmp_path) == [1]


@pytest.mark.parametrize(
    ("state", "saves", "restarts", "requeued", "status"),
    [
        ("done", True, 0, False, 0),
        ("stopped", True, 0, True, 0),
        ("stopped", False, 0, False, 1),  # one process was killed while the others loaded
        ("running", True, 49, True, 0),  # killed before it could say anything
        ("stopped", True, 50, False, 1),
        ("failed", True, 0, False, 1),
        (None, True, 0, False, 1),
    ],
)
@pytest.mark.parametrize("page", ["reliability.md", "multi-node.md"])
def test_the_slurm_scripts_of_the_docs_queue_again_what_was_stopped(
    page: str, tmp_path: Path, state: str | None, saves: bool, restarts: int, requeued: bool, status: int
) -> None:
    _, _, text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8").partition("<!-- slurm -->")
    (tmp_path / "job.sh").write_text(text.split("```bash\n")[1].split("```")[0])
    (tmp_path / "runs" / "my" / "checkpoints" / "step-000003").mkdir(parents=True)
    save = "mkdir runs/my/checkpoints/step-000006; " if saves else ""
    told = "true" if state is None else f'{save}echo \'{{"state": "{state}"}}\' > runs/my/status.json; exit 1'
    for name, body in (("srun", told), ("scontrol", '[ $1 = show ] && echo here || echo "$@" > requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    ended = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (tmp_path / "requeued").is_file() == requeued
    assert ended.returncode == status
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


# ---- processes that render

RENDERING = """
import itertools
from multiprocessing import active_children
from pathlib import Path

from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering.renderer import Renderer
from chatlora.data.workers import Effort, Work, outcomes
from chatlora.errors import run_as_script
from chatlora.distributed.signals import StopSignals
from tests.tiny_tokenizers import tiny_tokenizer


def main(argv):
    with StopSignals():
        render()


def render():
    row = Conversation((Message("user", "Where is Oslo?"), Message("assistant", "In Norway.")), place="rows.jsonl:1")
    work = Work(Renderer(tiny_tokenizer()), 200, "fit", "all")
    for _ in outcomes(((0, row) for _ in itertools.count()), work, 10**9, Effort(), print):
        if len(active_children()) > 1:  # what comes now is theirs
            Path("begun").touch()


if __name__ == "__main__":
    run_as_script(main)
"""


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), "SIGKILL"])
def test_processes_that_render_end_with_their_parent(tmp_path: Path, name: str) -> None:
    """SIGTERM and SIGINT go to the whole group, as launchers and terminals send them; SIGKILL to the parent alone."""
    (tmp_path / "render.py").write_text(RENDERING)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "render.py"]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "log").read_text()
        workers = children_of(process.pid)
        assert len(workers) >= 2
        if name == "SIGKILL":
            process.kill()
        else:
            os.killpg(process.pid, getattr(signal, name))
        assert process.wait() == (-signal.SIGKILL if name == "SIGKILL" else 75), (tmp_path / "log").read_text()
    finally:
        process.kill()  # it renders without an end
    wait_until(lambda: not any(is_alive(pid) for pid in workers))
