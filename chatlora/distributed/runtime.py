"""The processes, devices and precision of a run: the verbs of the loop, whatever engine carries them out."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import accelerate
import torch
from accelerate import Accelerator
from torch import nn

from chatlora.config import Config
from chatlora.distributed import engines, optimizer_state
from chatlora.distributed.deepspeed import engine_settings
from chatlora.distributed.launch_checks import check_launch, notes_on
from chatlora.distributed.launch_info import is_installed, launch_info_of, num_cores
from chatlora.distributed.optimizer_checks import refuse_flat, refuse_forgetful
from chatlora.distributed.precision import multiplies_bf16, resolve_precision
from chatlora.distributed.signals import StopSignals
from chatlora.errors import ChatLoraError, LaunchError, Problem

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Runtime:
    """What `accelerate launch` set up. Every method that talks to other ranks must be called on every rank."""

    accelerator: Accelerator
    dtype: torch.dtype  # of the base model; the adapter and its gradients are fp32 in any case
    signals: StopSignals
    slow_group: Any = None  # the process group of `barrier`
    notes: tuple[str, ...] = ()  # what of the launch is worth a line, before anything is loaded
    sharded_loading: Any = None  # zero3: while it lives, transformers spreads a model over the processes as it loads it

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def num_processes(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    @property
    def engine(self) -> str:
        return engines.engine_of(self.accelerator)

    @property
    def precision(self) -> str:
        return "fp32" if self.dtype == torch.float32 else "bf16"

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.dtype == torch.float32 else self.dtype

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the base model only, so that a forward pass takes all of them."""
        return self.engine in ("zero3", "fsdp2")

    def move_to_device(self, model: ModelT) -> ModelT:
        """Onto the device, where the engine does not do that itself, a part to each process."""
        return model if self.is_sharded else model.to(self.device)

    def for_generation(self, model: ModelT) -> ModelT:
        """A model that is only asked to generate, whole or spread as the engine has it."""
        return engines.shard_for_generation(self.accelerator, model) if self.engine == "fsdp2" else model

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as the engine wants them. An optimizer that it cannot run, or no checkpoint hold, is refused."""
        if self.engine.startswith("zero"):
            refuse_flat(optimizer)
        refuse_forgetful(optimizer)
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self.accelerator.prepare(model, optimizer)
        return prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        unwrapped: nn.Module = self.accelerator.unwrap_model(model)
        return unwrapped

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        model.eval()
        with torch.no_grad():
            yield
        model.train()

    def seed_draws(self, seed: int, step: int, micro_batch: int) -> None:
        """Dropout is a function of (seed, step, micro-batch, rank): nothing about random state is ever stored."""
        digest = hashlib.blake2b(f"{seed} {step} {micro_batch} {self.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest) % 2**63)

    def zero(self) -> torch.Tensor:
        return torch.zeros((), device=self.device)

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Gradients cross ranks in the last backward pass of a step only."""
        # Accelerate's own `accumulate` counts calls over the whole run and misplaces the boundary when the number of
        # micro-batches varies: accelerate issue 1847.
        self.accelerator.sync_gradients = last
        with nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients add up over micro-batches and ranks. DeepSpeed also updates, in a step's last one.

        An infinite loss may have a finite gradient, which DeepSpeed would apply: it becomes NaN here, 0 * inf.
        """
        self.accelerator.backward(loss * (self.num_processes + 0 * loss.detach()))  # every engine averages over ranks

    def clip_gradients(self, model: nn.Module, max_grad_norm: float) -> float:
        """The global norm before clipping. Waits for the device: once a step.

        DeepSpeed has clipped already, to the same norm, and where it is not finite, moved nothing on any rank.
        """
        return float(self.accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))

    def all_reduce_sum(self, *values: torch.Tensor) -> list[float]:
        """Sums over all ranks, in one reduction. Scalars -> floats."""
        return [float(value) for value in self.accelerator.reduce(torch.stack(values), "sum")]

    def stop_requested(self) -> torch.Tensor:
        """1 if a signal asked this process to stop, else 0."""
        return torch.tensor(float(self.signals.requested), device=self.device)

    def free(self) -> None:
        """Let go of prepared models and optimizers, so that others find room."""
        self.accelerator.free_memory()

    def barrier(self) -> None:
        """Wait for every process, for a day if need be: rendering takes its time, and not the same everywhere."""
        if self.slow_group is not None:
            torch.distributed.barrier(self.slow_group)

    def broadcast_bool(self, answer: bool) -> bool:
        """Rank 0's answer, on every rank."""
        return self.broadcast_text("yes" if answer else "") == "yes"

    def broadcast(self, shape: Sequence[int], dtype: torch.dtype, value: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's tensor on every rank, to the bit; the others give None."""
        here = torch.empty(shape, dtype=dtype, device=self.device) if value is None else value.to(self.device)
        assert (here.shape, here.dtype) == (torch.Size(shape), dtype)
        if self.num_processes == 1:
            return here
        whole: torch.Tensor = accelerate.utils.broadcast(here.flatten().view(torch.uint8))
        return whole.view(dtype).view(here.shape)

    def reshard(self, model: nn.Module) -> None:
        """Before parameters are read or written: those that a forward pass left gathered are spread again."""
        optimizer_state.reshard(model)

    def read_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole weight, an fp32 copy on the CPU."""
        return optimizer_state.read_weight(self.accelerator, parameter)

    def read_state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """What the optimizer keeps for a parameter, by its own names: whole copies on the CPU."""
        return optimizer_state.read_state(self.accelerator, optimizer, parameter)

    def write(
        self,
        optimizer: torch.optim.Optimizer,
        parameter: nn.Parameter,
        weight: torch.Tensor,
        state: Mapping[str, torch.Tensor],
    ) -> None:
        """What was read, back into its place; the same values on every rank."""
        optimizer_state.write(self.accelerator, optimizer, parameter, weight, state)

    def make_places(self, model: nn.Module, optimizer: torch.optim.Optimizer, filler: Mapping[str, Any]) -> None:
        """Have an optimizer that makes the places for its state in its first step make them, and move nothing.

        filler: a micro-batch without a target.
        """
        if optimizer_state.has_places(self.accelerator, optimizer):
            return
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        with self.accumulating(model, last=True):
            self.backward(model(**filler))

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text, on every rank. Sent as bytes: nothing is unpickled."""
        if self.num_processes == 1:
            return text
        raw = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = accelerate.utils.broadcast(torch.tensor([len(raw)], device=self.device))
        raw = raw if self.is_main else torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        return bytes(accelerate.utils.broadcast(raw).tolist()).decode()

    def decided_by_main(self, decide: Callable[[], str]) -> str:
        """What rank 0 decides, on every rank. A mistake that it finds it tells alone; all leave with that status."""
        answer: dict[str, Any] = {}
        if self.is_main:
            try:
                answer = {"text": decide(), "status": 0}
            except ChatLoraError as error:
                self.broadcast_text(json.dumps({"status": error.exit_status}))
                raise
        answer = json.loads(self.broadcast_text(json.dumps(answer)))
        if answer["status"]:
            raise SystemExit(answer["status"])
        return str(answer["text"])

    def peak_memory_bytes(self) -> int:
        """The most this process has held: on the GPU where there is one, else in main memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not on Windows

        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(kilobytes if platform.system() == "Darwin" else kilobytes * 1024)

    def hardware(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        capabilities = torch.cpu.get_capabilities()
        vectors = [name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if capabilities.get(name)]
        name = capabilities.get("cpu_name", platform.processor())
        return f"{name}, {os.cpu_count()} cores, {vectors[0] if vectors else 'no vector unit known'}"


def start(config: Config, signals: StopSignals) -> Runtime:
    """The Runtime for whatever launched this process: python, torchrun or accelerate launch, on GPU or CPU.

    Raises LaunchError, before anything is loaded, where the launch is not what was meant or contradicts the settings.
    """
    launch = launch_info_of(config)
    _refuse(check_launch(launch))
    if launch.deepspeed is not None and not is_installed("deepspeed"):
        raise LaunchError(
            'DeepSpeed was asked for and is not installed: pip install -c constraints.txt -e ".[deepspeed]"'
        )
    if launch.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns in every process that imports it
    settings = None if launch.deepspeed is None else engine_settings(launch.deepspeed, config.optim.max_grad_norm)
    accelerator = engines.start_accelerator(settings)
    device = torch.device(accelerator.device)
    launch = replace(
        launch,
        engine=engines.engine_of(accelerator),
        num_processes=int(accelerator.num_processes),
        device=device.type,
        multiplies_bf16=multiplies_bf16(device),
    )
    _refuse(check_launch(launch))
    if device.type == "cpu":
        _use_cores(config.run.cpu_threads, accelerator.num_processes)
    dtype = resolve_precision(config.run, device)
    return Runtime(
        accelerator,
        dtype,
        signals,
        slow_group=engines.slow_barrier_group(accelerator),
        notes=tuple(notes_on(launch)),
        sharded_loading=engines.load_sharded(accelerator, dtype) if launch.engine == "zero3" else None,
    )


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise LaunchError(*map(str, problems))


def _use_cores(threads: Literal["auto"] | int, num_processes: int) -> None:
    """`accelerate launch` exports OMP_NUM_THREADS=1, whatever the machine has."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    torch.set_num_threads(max(1, num_cores() // processes_here) if threads == "auto" else threads)
