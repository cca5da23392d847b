"""The processes, devices and precision of a run: the verbs of the loop, whatever engine carries them out."""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn

from chatlora.config import Config, RunConfig
from chatlora.data.batches import Indices, in_order
from chatlora.data.collate import pack, pad_right
from chatlora.data.dataset import ExampleSet
from chatlora.errors import LaunchError
from chatlora.training.signals import StopSignals

MicroBatch = Mapping[str, Any]


@dataclass(frozen=True)
class Runtime:
    """What `accelerate launch` set up. Every method that talks to other ranks must be called on every rank."""

    accelerator: Accelerator
    dtype: torch.dtype  # of the base model; the adapter, its gradients and moments are fp32 in any case
    signals: StopSignals
    token_budget: int  # of one micro-batch on one process
    padded: bool = False  # batches are right-padded instead of packed

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
        return "single" if self.accelerator.distributed_type == DistributedType.NO else "ddp"

    @property
    def precision(self) -> str:
        return "fp32" if self.dtype == torch.float32 else "bf16"

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.dtype == torch.float32 else self.dtype

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self.accelerator.prepare(model, optimizer)
        return prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        unwrapped: nn.Module = self.accelerator.unwrap_model(model)
        return unwrapped

    def fetch(self, examples: ExampleSet, micro_batches: Sequence[Sequence[Indices]]) -> Iterator[MicroBatch]:
        """This rank's micro-batches of [rank][micro-batch], collated and on the device."""
        collate = pad_right if self.padded else pack
        for indices in micro_batches[self.rank]:
            yield self.to_device(collate(examples.fetch(indices)))

    def to_device(self, batch: MicroBatch) -> MicroBatch:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def in_order(self, examples: ExampleSet) -> Iterator[tuple[tuple[Indices, ...], ...]]:
        """All examples once, as validation takes them."""
        return in_order(examples.lengths, self.token_budget, self.num_processes, self.padded)

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
        """Gradients add up over micro-batches and ranks."""
        self.accelerator.backward(loss * self.num_processes)  # every engine averages over ranks

    def clip_gradients(self, model: nn.Module, max_grad_norm: float) -> float:
        """The global norm before clipping. Waits for the device: once a step."""
        return float(self.accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))

    def sum(self, *values: torch.Tensor) -> list[float]:
        """Sums over all ranks, in one reduction. Scalars -> floats."""
        return [float(value) for value in self.accelerator.reduce(torch.stack(values), "sum")]

    def stop_requested(self) -> torch.Tensor:
        """1 if a signal asked this process to stop, else 0."""
        return torch.tensor(float(self.signals.requested), device=self.device)

    def rank_0_says(self, answer: bool) -> bool:
        """Rank 0's answer, on every rank."""
        return self.share("yes" if answer else "") == "yes"

    def spread(self, like: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's value on every rank; the others give None. `like`: shape, dtype and device."""
        here = torch.empty_like(like) if value is None else value.to(like)
        whole: torch.Tensor = accelerate.utils.broadcast(here) if self.num_processes > 1 else here
        return whole

    def share(self, text: str) -> str:
        """Rank 0's text, on every rank. Sent as bytes: nothing is unpickled."""
        if self.num_processes == 1:
            return text
        raw = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = accelerate.utils.broadcast(torch.tensor([len(raw)], device=self.device))
        raw = raw if self.is_main else torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        return bytes(accelerate.utils.broadcast(raw).tolist()).decode()

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


def start(config: Config) -> Runtime:
    """The Runtime for whatever launched this process: python, torchrun or accelerate launch, on GPU or CPU."""
    signals = StopSignals()
    signals.install()
    on_cpu = not torch.accelerator.is_available()
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # precision lives in the model: frozen base bf16, adapter fp32, autocast in TargetLoss
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu and launched else None)],
    )
    _refuse_other_engines(accelerator)
    if on_cpu:
        # `accelerate launch` exports OMP_NUM_THREADS=1, whatever the machine has.
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = config.run.cpu_threads
        torch.set_num_threads(max(1, cores // processes_here) if threads == "auto" else threads)
    device = torch.device(accelerator.device)
    return Runtime(accelerator, resolve_precision(config.run, device), signals, token_budget(config, device))


def resolve_precision(run: RunConfig, device: torch.device) -> torch.dtype:
    """The base model's dtype. Raises LaunchError where the launcher and the setting contradict each other."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher in ("fp16", "fp8"):
        raise LaunchError(
            f"accelerate's mixed_precision is {launcher}, which chatlora does not train in (a loss scaler is state "
            f"that a checkpoint would have to carry): say bf16 or no"
        )
    if launcher == "bf16" and run.precision == "fp32":
        raise LaunchError("accelerate's mixed_precision is bf16 but run.precision is fp32: change one of them")
    if run.precision == "fp32":
        return torch.float32
    if run.precision == "bf16" or launcher == "bf16" or multiplies_bf16(device):
        return torch.bfloat16
    return torch.float32


def token_budget(config: Config, device: torch.device) -> int:
    """Tokens of one micro-batch on one process; `auto` is enough to keep the device busy, and one example at least."""
    if config.optim.max_tokens_per_micro_batch != "auto":
        return config.optim.max_tokens_per_micro_batch
    return max(config.data.max_length, 1024 if device.type == "cpu" else 4096)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def _refuse_other_engines(accelerator: Accelerator) -> None:
    asked = [
        name
        for name, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP"))
        if os.environ.get(variable) == "true"
    ]
    if asked:
        raise LaunchError(f"{asked[0]} was asked for, which this version does not run yet: use multi_gpu.yaml")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise LaunchError(f"{world_size} processes were launched, but {accelerator.num_processes} found each other")
