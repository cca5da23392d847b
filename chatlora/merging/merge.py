"""`chatlora merge`: a base and an adapter -> one model in a folder, there whole and checked, or not there.

What is written stands under a hidden name beside its place. A process that is killed leaves it there, and the same
command goes on with the files that were finished. It gets its name when it has passed the gate.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from chatlora.config import ModelConfig
from chatlora.disk import settle, sha256_of, sync, write_json
from chatlora.distributed.memory import out_of_memory_told
from chatlora.errors import MergeError, ModelError
from chatlora.merging.asked import Asked
from chatlora.merging.changes import changes_of, shapes_of, skeleton_of
from chatlora.merging.gate import Trained, pass_gate
from chatlora.merging.judgement import Verdict
from chatlora.merging.places import places_of
from chatlora.merging.travelling import copy_all, files_that_travel
from chatlora.merging.writing import Plan, damaged_files, plan_of, refuse_types, write_merged
from chatlora.model.loading import load_config
from chatlora.weights.rewriting import Rewriting, Say, alone_in, index_of, receipt_in, rewrite
from chatlora.weights.shards import DTYPES, SIZES, find_shards, open_shard

RECEIPT = "merge.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
DOES_NOT_FIT = (
    "the base model does not fit in memory, which the gate needs once. Ways on: --precision bf16, which takes half, or "
    "a machine with more memory; what is written is kept, and the same command goes on with it"
)


@dataclass(frozen=True, slots=True)
class Files:
    """The base's files: a folder, its weights in order, tensor -> (file, type as safetensors calls it)."""

    folder: Path
    shards: list[Path]
    tensors: Mapping[str, tuple[str, str]]
    has_index: bool


def merge(asked: Asked, target: Path, say: Say) -> Verdict:
    """Raises ModelError where adapter or base cannot be merged or the disk is too small, MergeError at the gate."""
    if target.exists() or target.is_symlink():
        raise ModelError(f"{target}: is there already; give a new folder, or remove it")
    config, served = served_by(asked.folder)
    files = files_of_base(asked.folder)
    hidden = target.absolute().with_name(f".{target.name}.merging")
    plan = planned(files, hidden, asked.adapter, config, served)
    probes = asked.probes(say)
    with alone_in(hidden, "merging"):
        receipt = written(plan, files, asked.adapter, say)
        copy_all(files_that_travel(asked.folder, asked.adapter), hidden)
        with out_of_memory_told(DOES_NOT_FIT):
            trained = Trained(asked.base, asked.adapter, asked.tokenizer)
            stored = changed_type(plan, files)
            verdict = pass_gate(trained, hidden, served, stored, probes, asked.precision, say)
        if verdict.faults:
            shutil.rmtree(hidden)
            return verdict
        write_json(hidden / RECEIPT, {**receipt, "state": "merged", "gate": verdict.as_json()})
        (hidden / ".lock").unlink()
        settle(hidden)
        hidden.rename(target)
    sync(target.absolute().parent)
    return verdict


def served_by(folder: Path) -> tuple[Any, type[PreTrainedModel]]:
    """The configuration, and the class that it names first; else the one that transformers takes for it."""
    config = load_config(ModelConfig(name_or_path=str(folder)))
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{folder}: is quantised, and a sum would have to be quantised anew; merge into the original "
            "half-precision checkpoint, and quantise the result"
        )
    served = getattr(transformers, (config.architectures or [""])[0], None)
    if served is None:
        served = AutoModelForCausalLM._model_mapping[type(config)]
    return config, served


def files_of_base(folder: Path) -> Files:
    shards, weight_map = find_shards(folder)
    if any(file.suffix != ".safetensors" for file in shards):
        raise ModelError(f"{folder}: has pickled weights only; merge needs safetensors")
    tensors = {}
    for file in shards:
        with open_shard(file, any_type=True) as shard:
            tensors.update({name: (file.name, stored.dtype) for name, stored in shard.tensors.items()})
    missing = sorted((weight_map or {}).keys() - tensors.keys())
    if missing:
        raise ModelError(f"{folder}: {INDEX} names {len(missing)} tensors that no file holds: {missing[0]}")
    return Files(folder, shards, tensors, weight_map is not None)


def planned(files: Files, hidden: Path, adapter: Path, config: Any, served: type[PreTrainedModel]) -> Plan:
    model = skeleton_of(served, config)
    shapes, places = shapes_of(model), places_of(model, files.tensors)
    changes = changes_of(adapter, skeleton_of(served, config))
    plan = plan_of(files.folder, hidden, model, shapes, changes, places)
    refuse_types(plan, {name: kind for name, (_, kind) in files.tensors.items()})
    return plan


def changed_type(plan: Plan, files: Files) -> torch.dtype:
    """The coarsest type of the tensors that change."""
    kinds = {files.tensors[name][1] for place in plan.changed for name in place.tensors}
    return getattr(torch, DTYPES[min(kinds, key=lambda kind: (SIZES[kind], kind))])  # type: ignore[no-any-return]


def written(plan: Plan, files: Files, adapter: Path, say: Say) -> dict[str, Any]:
    """Every file of the merged model, on the disk and read again. Returns the receipt."""
    hidden = plan.target
    rewriting = Rewriting(
        source=files.folder,
        target=hidden,
        shards={file: file.name for file in files.shards},
        receipt=RECEIPT,
        identity={
            "base": files.folder.resolve().name,  # no path: a merged model may be published
            "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files.shards},
            "adapter": {name: sha256_of(adapter / name) for name in ADAPTER_FILES},
        },
        what="merge",
        doing="merging",
        write=lambda file, name: write_merged(plan, file, name),
    )
    receipt = receipt_in(rewriting)
    rewrite(rewriting, receipt, say)
    say("reading everything again to verify it")
    damaged = damaged_files(hidden, receipt)
    for name in damaged:
        (hidden / name).unlink(missing_ok=True)
    if damaged:
        faults = (f"{hidden / name}: is damaged: {fault}" for name, fault in damaged.items())
        raise MergeError(*faults, "the damaged files are removed: the same command writes them anew")
    if files.has_index:
        sizes = sum(entry["bytes"] for entry in receipt["shards"].values())
        write_json(hidden / INDEX, index_of({name: file for name, (file, _) in files.tensors.items()}, sizes))
    return receipt
