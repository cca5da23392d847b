"""The files of a base with an adapter's changes added, one tensor at a time.

A change is computed and added in fp32, and the sum rounded once, to the type that the tensor has. Whatever the adapter
does not touch is copied byte for byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from chatlora.disk import written_beside
from chatlora.errors import ModelError
from chatlora.merging.changes import Change
from chatlora.merging.places import Place, Shape, in_the_files
from chatlora.weights.rewriting import few, hashed, sha256_in
from chatlora.weights.shards import DTYPES, PIECE, SIZES, Shard, open_shard, write_safetensors


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of each file. changed: the places that the adapter reaches; model: as `places_of` left it."""

    source: Path
    target: Path
    model: PreTrainedModel
    shapes: Mapping[str, Shape]
    changes: Mapping[str, Change]
    changed: Sequence[Place]


def plan_of(
    source: Path,
    target: Path,
    model: PreTrainedModel,
    shapes: Mapping[str, Shape],
    changes: Mapping[str, Change],
    places: Sequence[Place],
) -> Plan:
    """Raises ModelError where a parameter that changes is not in the checkpoint, or is tied to one that does not."""
    changed = [place for place in places if any(name in changes for name in place.parameters)]
    at_home = {name for place in changed for name in place.parameters}
    problems = []
    tied: Mapping[str, str] = model.all_tied_weights_keys
    for name in changes:
        others = [tied[name]] if name in tied else [each for each, of in tied.items() if of == name]
        if others:
            problems.append(
                f"the adapter changes {name}, which is one tensor with {others[0]} in this model: merged, it would "
                f"change both. Train without it (lora.target_modules), or serve the adapter as it is"
            )
        elif name not in at_home:
            problems.append(f"{source}: no tensor there is {name}, which the adapter changes")
    for place in changed:
        if place.is_converted and any(changes[name].magnitude is not None for name in place.parameters):
            problems.append(f"DoRA on {place.parameters[0]}, which the checkpoint keeps in parts, cannot be merged")
    if problems:
        raise ModelError(*problems)
    return Plan(source, target, model, shapes, changes, changed)


def refuse_types(plan: Plan, types: Mapping[str, str]) -> None:
    """Raises ModelError where a tensor that changes is of no floating type of at least 16 bits. types: by tensor."""
    odd = [f"{name} ({types[name]})" for place in plan.changed for name in place.tensors if types[name] not in SIZES]
    if odd:
        raise ModelError(
            f"{plan.source}: {len(odd)} tensors that the adapter changes are quantised: {few(odd)}; merge into the "
            "original half-precision checkpoint, and quantise the result"
        )


def write_merged(plan: Plan, file: Path, name: str) -> dict[str, Any]:
    """Write the merged shard, whole or not at all. Returns its entry in the receipt."""
    hashes: dict[str, str] = {}
    with open_shard(file, any_type=True) as shard:
        # By place: of tensors that are made of one change, one after the other, it is computed once.
        of_place = [tensor for place in plan.changed for tensor in place.tensors if tensor in shard.tensors]
        order = [*of_place, *(tensor for tensor in shard.tensors if tensor not in set(of_place))]
        described = {tensor: (shard.tensors[tensor].dtype, shard.tensors[tensor].shape) for tensor in order}
        with written_beside(plan.target / name) as beside:
            size = write_safetensors(beside, described, _data(plan, shard, order, hashes))
    num_bytes = sum(stored.num_bytes for stored in shard.tensors.values())
    return {"from": file.name, "size": size, "bytes": num_bytes, "tensors": hashes, "changed": sorted(of_place)}


def _data(plan: Plan, shard: Shard, order: Sequence[str], hashes: dict[str, str]) -> Iterator[bytes | memoryview]:
    place_of = {tensor: place for place in plan.changed for tensor in place.tensors}
    at: Place | None = None
    deltas: dict[str, torch.Tensor] = {}
    for tensor in order:
        place = place_of.get(tensor)
        if place is not None and place is not at and not _is_dora(plan, place):
            deltas = {}  # the one before goes before the next one is made
            deltas = in_the_files(plan.model, place, _deltas(plan, place), plan.shapes)
        at = place
        pieces = shard.read(tensor) if place is None else _merged(plan, shard, tensor, place, deltas)
        yield from hashed(pieces, tensor, hashes)


def _deltas(plan: Plan, place: Place) -> dict[str, torch.Tensor]:
    return {name: plan.changes[name].delta() for name in place.parameters if name in plan.changes}


def _is_dora(plan: Plan, place: Place) -> bool:
    return any(name in plan.changes and plan.changes[name].magnitude is not None for name in place.parameters)


def _merged(
    plan: Plan, shard: Shard, tensor: str, place: Place, deltas: Mapping[str, torch.Tensor]
) -> Iterator[bytes | memoryview]:
    stored = shard.tensors[tensor]
    dtype = getattr(torch, DTYPES[stored.dtype])
    raw = bytearray().join(shard.read(tensor))
    weight = torch.frombuffer(raw, dtype=dtype).view(stored.shape)
    if _is_dora(plan, place):
        exact = plan.changes[place.parameters[0]].applied_to(weight.float())
    else:
        if deltas[tensor].shape != weight.shape:
            raise ModelError(
                f"{plan.source}: {tensor} has the shape {list(weight.shape)}, and the adapter changes one of "
                f"{list(deltas[tensor].shape)}: it is another model's"
            )
        exact = weight.float() + deltas[tensor]
    merged = exact.to(dtype)
    if not merged.isfinite().all() and weight.isfinite().all():
        raise ModelError(
            f"{tensor}: with the adapter it has values up to {exact.abs().max():.3g}, which {DTYPES[stored.dtype]} "
            "cannot hold; merge into a checkpoint in bfloat16"
        )
    data = memoryview(merged.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def damaged_files(target: Path, receipt: Mapping[str, Any]) -> dict[str, str]:
    """Of the files of a receipt, those that are not what was written into them: name -> what is wrong."""
    faults = {}
    for name, entry in receipt["shards"].items():
        try:
            with open_shard(target / name, any_type=True) as shard:
                fault = _difference(shard, entry["tensors"])
        except ModelError as error:
            fault = str(error)
        if fault:
            faults[name] = fault
    return faults


def _difference(shard: Shard, hashes: Mapping[str, str]) -> str | None:
    if set(shard.tensors) != set(hashes):
        return "it holds other tensors than were written into it"
    wrong = [tensor for tensor, expected in hashes.items() if sha256_in(shard, [tensor]) != expected]
    return f"{few(wrong)} is not what was written (sha256)" if wrong else None
