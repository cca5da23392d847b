"""What a conversion may read, and whether what it wrote is what it read.

Every tensor is looked up by name in the table of known ones (naming.py), its shape compared, and at the end its bytes
read again from the finished files and hashed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatlora.chatglm3.naming import INV_FREQ, Known
from chatlora.errors import ModelError
from chatlora.weights.rewriting import few, sha256_in
from chatlora.weights.shards import Shard, open_shard

P_TUNING = "transformer.prefix_encoder"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is converted into what. `shards`: the original's file -> the native one, in order."""

    source: Path
    target: Path
    config: dict[str, Any]
    known: dict[str, Known]
    shards: dict[Path, str]
    weight_map: dict[str, str] | None


def check_names(conversion: Conversion) -> None:
    """Refuse unknown, misshapen and missing tensors: before the first byte is copied where headers can tell."""
    if conversion.weight_map is not None:
        refuse_names(conversion, conversion.weight_map, complete=True)
    if all(file.suffix == ".safetensors" for file in conversion.shards):
        found: list[str] = []
        for file in conversion.shards:
            with open_shard(file) as shard:
                check_shard(conversion, file, shard)
                found += shard.tensors
        refuse_names(conversion, found, complete=True)


def refuse_names(conversion: Conversion, names: Sequence[str] | Mapping[str, str], *, complete: bool) -> None:
    problems = []
    unknown = [name for name in names if name not in conversion.known]
    if any(name.startswith(P_TUNING) for name in unknown):
        problems.append("it holds a P-Tuning prefix, which the native model has no place for; convert the base model")
    elif unknown:
        problems.append(f"{len(unknown)} tensors are not known: {few(unknown)}; only ChatGLM3's own are converted")
    missing = [name for name in conversion.known if name not in names and name != INV_FREQ]
    if complete and missing:
        problems.append(f"{len(missing)} tensors are missing: {few(missing)}; fetch the checkpoint again")
    if problems:
        raise ModelError(*(f"{conversion.source}: {problem}" for problem in problems))


def check_shard(conversion: Conversion, file: Path, shard: Shard) -> None:
    refuse_names(conversion, list(shard.tensors), complete=False)
    weight_map = conversion.weight_map
    if weight_map is not None and set(shard.tensors) != {name for name in weight_map if weight_map[name] == file.name}:
        raise ModelError(f"{file}: holds other tensors than the index says; fetch both again")
    wrong = [
        f"{file}: {name} has the shape {list(stored.shape)}, and by config.json it should have "
        f"{list(conversion.known[name].shape)}"
        for name, stored in shard.tensors.items()
        if stored.shape != conversion.known[name].shape
    ]
    if wrong:
        raise ModelError(*wrong)


def verify(conversion: Conversion, receipt: Mapping[str, Any], recheck: set[str]) -> None:
    """Every tensor of the original is in the files just as it was read. `recheck`: files of an earlier process.

    Of those the original is read again too. Raises ModelError naming each file and tensor that differs.
    """
    seen = [tensor for entry in receipt["shards"].values() for tensor in (*entry["tensors"], *entry["left_out"])]
    refuse_names(conversion, seen, complete=True)
    problems: list[str] = []
    for file, name in conversion.shards.items():
        entry = receipt["shards"][name]
        path = conversion.target / name
        with open_shard(path) as shard:
            problems += _differences(conversion, entry, path, shard)
        if name in recheck:
            with open_shard(file) as shard:
                problems += _source_differences(entry, file, path, shard)
    if problems:
        raise ModelError(*problems)


def _differences(conversion: Conversion, entry: Mapping[str, Any], path: Path, shard: Shard) -> Iterator[str]:
    parts = {
        part.name: (entry["types"][tensor], part.shape)
        for tensor in entry["tensors"]
        for part in conversion.known[tensor].parts
    }
    remedy = "delete this file and run the command again"
    if parts != {name: (stored.dtype, stored.shape) for name, stored in shard.tensors.items()}:
        yield f"{path}: does not hold the tensors that were written into it; {remedy}"
        return
    for tensor, expected in entry["tensors"].items():
        if sha256_in(shard, [part.name for part in conversion.known[tensor].parts]) != expected:
            names = few([part.name for part in conversion.known[tensor].parts])
            yield f"{path}: is damaged: {names} is not what was written (sha256); {remedy}"


def _source_differences(entry: Mapping[str, Any], file: Path, path: Path, shard: Shard) -> Iterator[str]:
    for tensor, expected in entry["tensors"].items():
        if sha256_in(shard, [tensor]) != expected:
            yield (
                f"{file}: {tensor} is not what it was when {path.name} was made from it (sha256): fetch it again, "
                f"delete {path} and run the command again"
            )
