"""Training processes by the hundred: one server imports everything once and forks a process for each run.

    with ForkServer(log) as server:
        pids = server.start(["my.yaml"], cwd, ranks=2)
        statuses = server.wait(pids)

A run is the real one, in a process of its own that can be killed or signalled. `at` lets the process send itself a
signal when it enters a function for the n-th time, so that the moment is exact: `At("SIGTERM", PLACE, 3)`.

A server that is killed takes its runs with it: the test that waits for one says so, and the next gets another server.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

REPOSITORY = Path(__file__).resolve().parents[1]
PLANT_FAILED = 99
DEADLINE = 240.0  # seconds; a process that hangs is killed with its stack in the log, before pytest ends the test


class At(NamedTuple):
    """On entering `place` ("module:Class.function") for the `call`-th time, signal oneself, or only the rank named."""

    signal: str
    place: str
    call: int = 1
    rank: int | None = None


class ServerEndedError(Exception):
    """Something outside killed the server during a run."""


class ForkServer:
    """`environment` is what all its processes have in common. warm: with everything imported before the first run."""

    def __init__(self, log: Path, *, warm: bool = True, **environment: str) -> None:
        self.log, self.warm = log, warm
        self.variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
            self.variables.pop(name, None)
        self.process = self._begin()

    def _begin(self) -> subprocess.Popen[str]:
        """In a session of its own: what is sent to the group of the tests, by `timeout` for one, is not for it."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", *(["warm"] if self.warm else [])],
            cwd=REPOSITORY,
            env=self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def start(
        self,
        argv: Sequence[str],
        cwd: Path,
        *,
        ranks: int = 1,
        script: str = "train",
        at: At | None = None,
        trace: Path | None = None,
        broken: str | None = None,
        environment: Mapping[str, str] | None = None,
        streams: Sequence[Path] = (),
    ) -> list[int]:
        """The process ids of the ranks.

        script: a module with a `main`, or "module:function". streams: what standard input, output and error are, in
        place of nothing and the log; a terminal that stands first is the process's own. trace: a folder in which each
        rank notes the examples of each micro-batch. broken: Python that breaks the program, to see a test catch it.
        """
        if self.process.poll() is not None:
            self.process = self._begin()
        port = _free_port()
        request = {
            "argv": list(argv),
            "cwd": str(cwd),
            "script": script,
            "at": at,
            "broken": broken,
            "environment": environment,
            "streams": [str(path) for path in streams],
        }
        request["log"] = str(self.log)
        request["trace"] = None if trace is None else str(trace)
        return [self._ask({**request, "rank": rank, "ranks": ranks, "port": port}) for rank in range(ranks)]

    def wait(self, pids: Sequence[int], deadline: float = DEADLINE) -> list[int]:
        """Exit statuses; the negative number of the signal where one ended it."""
        statuses = [self._ask({"wait": pid, "deadline": deadline}) for pid in pids]
        assert PLANT_FAILED not in statuses, f"what was to break the program is broken itself: see {self.log}"
        return statuses

    def run(self, argv: Sequence[str], cwd: Path, **options: Any) -> list[int]:
        return self.wait(self.start(argv, cwd, **options))

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            raise ServerEndedError(f"the fork server ended with {status}, and its runs with it: see {self.log}")
        return int(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- in the server


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed says on its import what accelerator it found
    if "warm" in sys.argv:
        warm()
    for line in sys.stdin:
        request = json.loads(line)
        answer = reap(request) if "wait" in request else launch(request)
        print(answer, file=answers, flush=True)


def warm() -> None:
    """Import what a run imports late, too: PEFT's tables, pyarrow's pandas, generation, DeepSpeed and FSDP."""
    import gc

    import accelerate.commands.launch
    import accelerate.utils.fsdp_utils
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer
    import numpy.ctypeslib
    import pandas  # noqa: F401
    import peft
    import pyarrow.compute
    import transformers

    import chatlora.evaluation.setup
    import chatlora.training.export
    import chatlora.training.setup
    import chatlora.training.state
    import evaluate
    import train

    deepspeed.ops.__compatible_ops__  # noqa: B018  asks a compiler, once
    del accelerate, chatlora, deepspeed, evaluate, numpy, pyarrow, train
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=8, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    transformers.AutoTokenizer  # noqa: B018  a lazy import
    gc.collect()
    gc.freeze()  # what a run collects is its own, not all of this


def launch(request: dict[str, Any]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            status = play(request, server)
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return pid


def play(request: dict[str, Any], server: int) -> int:
    """One rank of one run."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no run outlives the tests
    if os.getppid() != server:  # nor a server that was gone before this was said
        return 1
    import importlib

    from chatlora.errors import run_as_script

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    if request["ranks"] > 1:
        rank, ranks = str(request["rank"]), str(request["ranks"])
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    if request["trace"]:
        note_examples(Path(request["trace"]) / f"rank-{request['rank']}.jsonl")
    os.environ |= request["environment"] or {}
    if request["broken"]:
        try:
            exec(request["broken"], {})
        except ImportError:
            traceback.print_exc()
            return PLANT_FAILED
    if request["at"]:
        at = At(*request["at"])
        if at.rank in (None, request["rank"]):
            arm(at)
    sys.argv = [request["script"], *request["argv"]]
    print(f"---- {request}", file=sys.stderr, flush=True)
    redirect(request["streams"])
    module, _, function = request["script"].partition(":")
    run_as_script(getattr(importlib.import_module(module), function or "main"))
    return 0


def redirect(streams: Sequence[str]) -> None:
    """In this process. Python has made its own of the old ones, which know whether they are a terminal."""
    if streams:
        os.setsid()  # the first terminal that is opened is then the one that Ctrl-C comes from
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)


def arm(at: At) -> None:
    """The real function, entered by a process that signals itself first."""
    on_entry(at.place, at.call, lambda: os.kill(os.getpid(), getattr(signal, at.signal)))


def on_entry(place: str, call: int, act: Callable[[], object]) -> None:
    """`act` comes before the `call`-th call of `place` ("module:Class.function") in this process."""
    import functools
    import importlib

    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    entered = getattr(owner, name)
    calls: list[None] = []

    @functools.wraps(entered)
    def entering(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            act()
        return entered(*arguments, **options)

    setattr(owner, name, entering)


def note_examples(path: Path) -> None:
    """A line for each micro-batch that is trained on: [step, micro-batch, examples]."""
    from chatlora.data.dataset import ExampleSet
    from chatlora.distributed.runtime import Runtime

    fetch, seed_draws, fetched = ExampleSet.fetch, Runtime.seed_draws, []

    def noting(examples: ExampleSet, indices: Any) -> Any:
        fetched.append([int(index) for index in indices])
        return fetch(examples, indices)

    def seeding(runtime: Runtime, seed: int, step: int, micro_batch: int) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([step, micro_batch, fetched[-1]]) + "\n")
        seed_draws(runtime, seed, step, micro_batch)

    ExampleSet.fetch, Runtime.seed_draws = noting, seeding


def reap(request: dict[str, Any]) -> int:
    end = time.monotonic() + request["deadline"]
    while True:
        pid, status = os.waitpid(request["wait"], os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(request["wait"], signal.SIGABRT)  # faulthandler writes where it stands into the log
            time.sleep(0.5)
            os.kill(request["wait"], signal.SIGKILL)
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
