"""The run's state, in and out of the model and the optimizer, whatever engine holds them.

Every function here is collective: all ranks call it. Rank 0 alone reads and writes the disk, and tells the others.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatlora.config import CheckpointConfig
from chatlora.distributed.memory import NOT_SAVED, out_of_memory_told
from chatlora.distributed.optimizer_state import torch_optimizer
from chatlora.distributed.runtime import Runtime
from chatlora.distributed.zero3 import full_shape
from chatlora.errors import CheckpointError
from chatlora.model.lora import trainable
from chatlora.model.loss import TargetLoss
from chatlora.run_directory import RunDirectory
from chatlora.training.checkpoint import (
    Checkpoint,
    Tensors,
    newest_checkpoint,
    read_checkpoint,
    rotate,
    sweep,
    write_checkpoint,
)


@out_of_memory_told(NOT_SAVED)
def save_checkpoint(
    checkpoint: CheckpointConfig,
    run: RunDirectory,
    done: int,
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Publish the state after `done` steps."""
    state = gather(runtime, model, optimizer, done)
    if runtime.is_main:
        publish(checkpoint, run, state)


def publish(checkpoint: CheckpointConfig, run: RunDirectory, state: Checkpoint) -> None:
    """Write a checkpoint, then let go of those that are not kept. For rank 0 alone."""
    run.sync_logs()  # the log is never behind the checkpoint
    write_checkpoint(run.checkpoints, state)
    let_go(checkpoint, run)


def let_go(checkpoint: CheckpointConfig, run: RunDirectory) -> None:
    """Delete the checkpoints that are not kept: never the newest, nor the best. For rank 0 alone."""
    best = run.best_step() if checkpoint.keep_best else None
    rotate(run.checkpoints, keep_last=checkpoint.keep_last, keep=() if best is None else (best,))


def restore_newest(
    checkpoint: CheckpointConfig,
    run: RunDirectory,
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    filler: Mapping[str, Any],
) -> int:
    """Put the state of the newest good checkpoint into model and optimizer. Returns its step, 0 on a fresh run.

    filler: a micro-batch without a target.
    """
    found = _find(checkpoint.resume, run) if runtime.is_main else None
    step = int(runtime.broadcast_text("" if found is None else str(found.step)) or 0)
    if step:
        _scatter(runtime, model, optimizer, step, found, filler)
    return step


def adapter_parameters(runtime: Runtime, model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under PEFT's names, out of whatever an engine wrapped around the loss."""
    runtime.reshard(model)
    loss = runtime.unwrap(model)
    assert isinstance(loss, TargetLoss)
    return trainable(loss.model)


def gather_adapter(runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The whole adapter on the CPU, fp32, by parameter name."""
    return gather(runtime, model, optimizer, 0).adapter


def gather(runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Checkpoint:
    """Full copies on the CPU, by parameter name."""
    adapter: Tensors = {}
    kept: dict[str, Tensors] = {}
    for name, parameter in adapter_parameters(runtime, model).items():
        adapter[name] = runtime.read_weight(parameter)
        for kind, tensor in runtime.read_state(optimizer, parameter).items():
            kept.setdefault(kind, {})[name] = tensor
    return Checkpoint(step, adapter, kept, _class_of(optimizer))


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    return type(torch_optimizer(optimizer)).__name__


def _scatter(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    state: Checkpoint | None,
    filler: Mapping[str, Any],
) -> None:
    """Rank 0's state onto every rank, one tensor at a time."""
    parameters = adapter_parameters(runtime, model)
    shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
    if state is not None and {name: tensor.shape for name, tensor in state.adapter.items()} != shapes:
        raise CheckpointError(f"the checkpoint of step {step} holds another adapter than this configuration makes")
    if state is not None and state.optimizer_class != _class_of(optimizer):
        raise CheckpointError(
            f"the checkpoint of step {step} holds the state of {state.optimizer_class}, and the optimizer is now "
            f"{_class_of(optimizer)}: take {state.optimizer_class} again, or start a new run with lora.init_from"
        )
    runtime.make_places(model, optimizer, filler)
    for name, parameter in parameters.items():
        kept = {} if state is None else {kind: each[name] for kind, each in state.optimizer.items() if name in each}
        weight = runtime.broadcast(shapes[name], torch.float32, None if state is None else state.adapter[name])
        runtime.write(optimizer, parameter, weight, _broadcast(runtime, kept))


def _broadcast(runtime: Runtime, kept: Mapping[str, torch.Tensor]) -> Tensors:
    """Rank 0's tensors, by name, on every rank, which has to be told what there is; the others give none."""
    described = {kind: [list(tensor.shape), str(tensor.dtype)] for kind, tensor in kept.items()}
    told = json.loads(runtime.broadcast_text(json.dumps(described)))
    return {
        kind: runtime.broadcast(shape, getattr(torch, dtype.removeprefix("torch.")), kept.get(kind))
        for kind, (shape, dtype) in told.items()
    }


def _find(resume: str, run: RunDirectory) -> Checkpoint | None:
    """What `checkpoint.resume` asks for. A checkpoint of another run is where this one begins: its own come first."""
    sweep(run.checkpoints)
    named = None if resume in ("auto", "never") else Path(resume)
    if named is not None and named.resolve().parent == run.checkpoints.resolve():
        return read_checkpoint(named)
    found = newest_checkpoint(run.checkpoints, run.say)
    if found is None and named is not None:
        found = read_checkpoint(named)
        write_checkpoint(run.checkpoints, found)  # it may be this run's best, too
    return found
