"""Resumable states: written beside, synced, renamed; verified before they are read; one format for every engine.

    checkpoints/step-000100/
        adapter.safetensors    the adapter by parameter name, fp32
        optimizer.safetensors  each tensor that the optimizer keeps for a parameter, as `KIND.PARAMETER`
        progress.json          the step, and the optimizer's class; everything else about a run follows from the step
        manifest.json          size and sha256 of the others, written last

Nothing in it is pickled, and nothing in it belongs to an engine or to a number of processes.
"""

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from chatlora.checkpoint_names import (
    BEING_DELETED,
    BEING_WRITTEN,
    MANIFEST,
    home_of,
    left_over,
    published,
    step_of,
)
from chatlora.disk import settle, sha256_of, sync
from chatlora.errors import CheckpointError

PROGRESS, ADAPTER, STATE = "progress.json", "adapter.safetensors", "optimizer.safetensors"
SIGNED = (ADAPTER, STATE, PROGRESS)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` finished steps.

    adapter: by parameter name. optimizer: what the optimizer keeps, {its name for it: {parameter name: tensor}}; a
    parameter that never had a gradient is in none of those. optimizer_class: whose state that is.
    """

    step: int
    adapter: Tensors
    optimizer: dict[str, Tensors]
    optimizer_class: str

    @property
    def num_bytes(self) -> int:
        tensors = [*self.adapter.values(), *(t for each in self.optimizer.values() for t in each.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- writing


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Publish a checkpoint under `folder`. It is there whole, or not at all, whenever the machine stops.

    Raises CheckpointError where the disk does not take it; what was published before stays as it is.
    """
    home = home_of(folder, checkpoint.step)
    beside = folder / f"{BEING_WRITTEN}{home.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        kept = {f"{kind}.{name}": t for kind, tensors in checkpoint.optimizer.items() for name, t in tensors.items()}
        progress = {"step": checkpoint.step, "optimizer": checkpoint.optimizer_class}
        save_file(checkpoint.adapter, beside / ADAPTER)
        save_file(kept, beside / STATE)
        (beside / PROGRESS).write_bytes(_as_json(progress))
        (beside / MANIFEST).write_bytes(_as_json({"files": {name: _signature(beside / name) for name in SIGNED}}))
        settle(beside)
        if home.exists():  # a broken one: a run goes on from the newest good one, so that none of those is in its way
            _delete(home)
        beside.rename(home)
        sync(folder)
    # torch and safetensors wrap a full disk in errors of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} could not be written to {folder}: it needs "
            f"{checkpoint.num_bytes:,} bytes, {_free_bytes(folder):,} are free ({error})",
            "the checkpoints in there are whole; free some space and start the run again to go on from the newest one",
        ) from error
    return home


def rotate(folder: Path, *, keep_last: int, keep: Collection[int]) -> None:
    """Delete all but the last `keep_last` checkpoints and the steps in `keep`. The newest always stays."""
    homes = published(folder)
    for home in homes[: max(0, len(homes) - max(1, keep_last))]:
        if step_of(home) not in keep:
            _delete(home)


def sweep(folder: Path) -> None:
    """Clear away what a killed process left half written or half deleted."""
    for path in left_over(folder):
        shutil.rmtree(path)


def refuse_full_disk(folder: Path, adapter_parameters: int, keep_last: int) -> None:
    """Raise CheckpointError where the disk cannot hold what a run will write.

    At most at once: the kept checkpoints, the best one and the one being written, and two adapters. Three fp32 numbers
    a parameter, as with AdamW, are the most that a checkpoint holds under the usual optimizers. What a run that goes on
    has written already makes room when it is rotated.
    """
    needed = 4 * adapter_parameters * (3 * (keep_last + 2) + 2)
    written = sum(path.stat().st_size for home in published(folder) for path in home.iterdir())
    free = _free_bytes(folder)
    if free + written < needed:
        raise CheckpointError(
            f"this run will write up to {needed - written:,} bytes of checkpoints and adapters, but {free:,} are free "
            f"at {folder}: free some space, or lower checkpoint.keep_last or lora.rank"
        )


def _delete(home: Path) -> None:
    """Renamed first, so that a kill never leaves half a checkpoint under its name."""
    doomed = home.with_name(f"{BEING_DELETED}{home.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    home.rename(doomed)
    shutil.rmtree(doomed)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- reading


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are whole; a broken one is named and passed over."""
    for home in reversed(published(folder)):
        try:
            return read_checkpoint(home)
        except CheckpointError as error:
            say(f"passed over: {error.problems[0]}")
    return None


def read_checkpoint(home: Path) -> Checkpoint:
    """A verified checkpoint. Raises CheckpointError that names what is wrong with it."""
    fault = why_broken(home)
    if fault:
        raise CheckpointError(f"{home} is broken: {fault}")
    optimizer: dict[str, Tensors] = {}
    try:
        adapter = load_file(home / ADAPTER)
        for name, tensor in load_file(home / STATE).items():
            kind, _, parameter = name.partition(".")
            optimizer.setdefault(kind, {})[parameter] = tensor
        progress = json.loads((home / PROGRESS).read_text(encoding="utf-8"))
        step, optimizer_class = int(progress["step"]), str(progress["optimizer"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{home} is broken: it was not written by this program ({error})") from error
    if not all(tensors.keys() <= adapter.keys() for tensors in optimizer.values()) or step != step_of(home):
        raise CheckpointError(f"{home} is broken: its files do not belong together")
    return Checkpoint(step, adapter, optimizer, optimizer_class)


def why_broken(home: Path) -> str | None:
    """None if every file of the checkpoint is, to the byte, what its manifest says, else what is not."""
    missing = [name for name in (*SIGNED, MANIFEST) if not (home / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        written = (home / MANIFEST).read_bytes()
        signed = json.loads(written)["files"]
        found = {name: _signature(home / name) for name in SIGNED}
        changed = [name for name in SIGNED if found[name] != signed[name]]
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    if changed:
        return f"{changed[0]} is not what was written ({MANIFEST} has another sha256)"
    return None if written == _as_json({"files": found}) else f"its {MANIFEST} is not what was written"


def _signature(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
