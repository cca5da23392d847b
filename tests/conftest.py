"""Fixtures that several test files share."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import ForkServer

# Before torch is imported. Tests run side by side and start processes of their own: OpenMP threads that wait by
# spinning would take each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# xdist hands out whole files (--dist loadfile): the long ones first, so that at the end all processes are busy.
LONG = (
    "test_engines",
    "test_embedded_model",
    "test_chatglm3_conversion",
    "test_launch_checks",
    "test_kill_and_resume",
    "test_signals",
    "test_train",
    "test_accelerate_configs",
    "test_failures",
    "test_launcher_signals",
    "test_evaluate",
    "test_extending",
    "test_resume_conditions",
    "test_checkpoint",
    "test_adapter_folder",
    "test_models",
    "test_transformers_serve",
)


def pytest_configure() -> None:
    """What pytest was told to ignore (by nohup, by a script's `&`), every process of the tests would ignore too.

    That is inherited by a new program, and a handler is not.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """`count("200 of 231 were killed")` stands under the summary of a whole `pytest -m slow`."""
    return lambda sentence: record_property("count", sentence)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed")
    counts = [value for report in reports for name, value in report.user_properties if name == "count"]
    if counts:
        terminalreporter.section("counts")
        terminalreporter.write_line("\n".join(map(str, counts)))


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and recordings that are kept beside the repository, not in it."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at hand: {SHARED} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's folder, from the user's cache or made as the demo makes it; an error where it cannot be."""
    from chatlora.embedded_model import embedded_model

    return embedded_model("embedded:smollm2-135m-instruct")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, 72 rows and my.yaml."""
    from tests.worlds import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def imported() -> None:
    """What a run imports is left out of the garbage collection that ends each run."""
    import chatlora.evaluation.setup
    import chatlora.training.export
    import chatlora.training.setup  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def run(world: Path, imported: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`run("--optim.epochs", "1")` trains in this process and returns the run directory."""
    import train

    monkeypatch.setenv("CHATLORA_CACHE", str(world / "cache"))
    monkeypatch.chdir(tmp_path)

    def train_here(*flags: str, name: str = "run") -> Path:
        train.main([str(world / "my.yaml"), "--run.output_dir", name, *flags])
        return tmp_path / name

    return train_here


@pytest.fixture(scope="session")
def server(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Training processes in their hundreds, that can be killed and signalled. They share the world's cache."""
    log = tmp_path_factory.mktemp("server") / "log"
    with ForkServer(log, CHATLORA_CACHE=str(world / "cache")) as started:
        yield started


@pytest.fixture
def argv(world: Path) -> list[str]:
    """A command line for ten steps, saved after steps 3, 6, 9 and 10."""
    from tests.runs import FLAGS

    return [str(world / "my.yaml"), *FLAGS]


@pytest.fixture(scope="session")
def whole(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`whole(2)`: the run of `argv` under two processes that nobody disturbed; `whole(2, "zero2")`: under DeepSpeed."""
    from tests.runs import undisturbed

    @cache
    def run_once(ranks: int, config: str | None = None) -> Any:
        return undisturbed(server, world, tmp_path_factory.mktemp(f"whole-{config}-{ranks}"), ranks, config)

    return run_once


@pytest.fixture(scope="session")
def killed(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run of `argv`, killed in step 8, after the checkpoint of step 6."""
    from tests.runs import killed_in_step_8

    return killed_in_step_8(server, world, tmp_path_factory.mktemp("killed"))
