"""`chatlora train` and `chatlora evaluate` from a wheel, in a folder that holds nothing else."""

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from chatlora.run_directory import read_status
from chatlora.run_log import LOG, read_log
from tests.fork_server import REPOSITORY
from tests.runs import saved, wait_until

LONG = ("--optim.epochs", "2000")


class Installed(NamedTuple):
    """What a wheel holds, in a folder of its own, and a folder to work in that knows of nothing else of ours."""

    site: Path
    folder: Path
    cache: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        # -P: as the program `chatlora` does, and unlike `python -m` by itself, it imports nothing from this folder.
        environment = {**os.environ, "PYTHONPATH": str(self.site), "CHATLORA_CACHE": str(self.cache)}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", "-m", "chatlora", *words]
        with (self.folder / "log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log, text=True)

    def run(self, *words: str) -> int:
        return self.start(*words).wait(timeout=280)

    @property
    def told(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves things in the folder that it builds."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    names = ["chatlora", "accelerate_configs", "train.py", "evaluate.py", "pyproject.toml", "setup.py", "MANIFEST.in"]
    for name in [*names, "README.md", "LICENSE"]:
        subprocess.run(["cp", "-r", str(REPOSITORY / name), str(copy)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(out), str(copy)], check=True)
    (built,) = out.glob("chatlora-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def installed(site: Path, world: Path, tmp_path: Path) -> Installed:
    return Installed(site, tmp_path, world / "cache")


def test_no_module_of_the_wheel_has_the_name_of_another_package(site: Path) -> None:
    """A launcher puts the script's folder in front of all packages, and pip puts a wheel's modules among them."""
    assert sorted(path.name for path in site.iterdir() if not path.name.endswith(".dist-info")) == ["chatlora"]
    beside = {path.name for path in (site / "chatlora" / "shipped").iterdir()}
    assert beside == {"accelerate_configs", "chatlora_train.py", "chatlora_evaluate.py"}


def test_the_wheel_holds_every_chat_template(site: Path) -> None:
    templates = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "chatlora").rglob("*.jinja")}
    assert len(templates) > 10
    assert {str(path.relative_to(site)) for path in (site / "chatlora").rglob("*.jinja")} == templates
    for name in ("train", "evaluate"):
        script = site / "chatlora" / "shipped" / f"chatlora_{name}.py"
        assert script.read_bytes() == (REPOSITORY / f"{name}.py").read_bytes()


def test_one_process_trains_and_evaluates(installed: Installed, world: Path) -> None:
    """The demo's way, to the scores: without a launcher, with the script's own exit statuses."""
    rows = world / "rows.jsonl"
    tiny = ["--model.name_or_path", str(world / "model"), "--data.train", str(rows), "--data.test", str(rows)]
    tiny += ["--optim.max_steps", "1", "--evaluation.max_new_tokens", "2", "--run.output_dir", "run"]
    (installed.folder / "evaluate.py").write_text("raise SystemExit('not mine')")
    assert installed.run("train", *tiny, "--evaluation.after_training", "true") == 0, installed.told
    assert (installed.folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (installed.folder / "run" / "eval" / "test" / "scores.json").is_file()
    assert installed.run("train", "--optim.lr", "1") == 2
    assert "did you mean 'optim.learning_rate'?" in installed.told


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_runs(installed: Installed, smollm2: Path) -> None:
    """With the model from the user's own cache, as ever."""
    whole = installed._replace(cache=smollm2.parents[1])
    assert whole.start("train").wait(timeout=1700) == 0, whole.told
    assert list(whole.folder.glob("runs/demo-*/eval/test/scores.json"))


def test_several_processes_stop_with_75_and_without_a_launchers_words(installed: Installed, world: Path) -> None:
    command = ("train", str(world / "my.yaml"), "--run.output_dir", "run", "--config_file", "multi_gpu")
    started = installed.start(*command, "--num_processes", "2", *LONG)
    try:
        wait_until(lambda: bool(read_log(installed.folder / "run" / LOG)) or started.poll() is not None)
        started.send_signal(signal.SIGINT)
        assert started.wait(timeout=120) == 75, installed.told
    finally:
        started.kill()
    status = read_status(installed.folder / "run")
    assert status["state"] == "stopped"
    assert saved(installed.folder)[-1] == status["step"]
    assert installed.told.count(status["message"]) == 1
    assert "Traceback" not in installed.told
    assert "elastic" not in installed.told
    assert "SIGINT: finishing step" in installed.told


def test_what_the_processes_refuse_is_2_under_a_launcher_too(installed: Installed, world: Path) -> None:
    """The settings are right, and the file that they name is found missing by each process."""
    missing = ("--data.train", "nowhere.jsonl", "--num_processes", "2")
    assert installed.run("train", str(world / "my.yaml"), *missing) == 2, installed.told
    assert "nowhere.jsonl" in installed.told
    assert "Traceback" not in installed.told
