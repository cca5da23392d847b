"""A ChatGLM3 folder -> a native `glm` folder: shard by shard, resumable, verified.

Renaming and splitting rows leaves every byte as it is and in its order, so a shard is converted by writing a new
header and copying what follows: memory does not grow with the model. `conversion.json` in the target is the receipt:
the sha256 of every tensor of the original, by which the finished files are read again and checked. config.json is
written last: a folder that is not whole cannot be loaded.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from chatlora.chatglm3.configuration import native_config, native_generation_config, read_config
from chatlora.chatglm3.naming import INV_FREQ, Known, known_tensors
from chatlora.chatglm3.shards import (
    DTYPES,
    Shard,
    find_shards,
    known_sha256,
    open_shard,
    sha256_of,
    write_safetensors,
)
from chatlora.chatglm3.tokenizer import tokenizer_files
from chatlora.errors import ModelError
from chatlora.run_directory import write_json, write_text

RECEIPT = "conversion.json"
SPARE = 64 * 2**20  # bytes of the disk that stay free
EMBEDDING = "transformer.embedding.word_embeddings.weight"
P_TUNING = "transformer.prefix_encoder"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is converted into what. `shards`: the original's file -> the native one, in order."""

    source: Path
    target: Path
    config: dict[str, Any]
    known: dict[str, Known]
    shards: dict[Path, str]
    weight_map: dict[str, str] | None


def convert_checkpoint(source: Path, target: Path, say: Say) -> None:
    """Convert, or go on with a conversion that was interrupted, or check one that is done.

    Raises ModelError where `source` is not a ChatGLM3 checkpoint or damaged, `target` holds something else, the disk
    is too small, or a finished file is not what was written.
    """
    conversion = _conversion(source, target)
    _check_names(conversion)
    target.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target / ".lock")
    try:
        with lock.acquire(timeout=0):
            _convert(conversion, say)
    except Timeout:
        raise ModelError(f"{target}: another process is converting into it; wait for it") from None


def _conversion(source: Path, target: Path) -> Conversion:
    if target.resolve() == source.resolve():
        raise ModelError(f"{target}: is the folder to convert; give another one for the result")
    config = read_config(source)
    files, weight_map = find_shards(source)
    total = len(files)
    names = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    shards = dict(zip(files, names if total > 1 else ["model.safetensors"], strict=True))
    return Conversion(source, target, config, known_tensors(config), shards, weight_map)


def _convert(conversion: Conversion, say: Say) -> None:
    target = conversion.target
    receipt = _receipt(conversion)
    done = {name for name, entry in receipt["shards"].items() if _size(target / name) == entry["size"]}
    _check_room(conversion, done)
    for number, (file, name) in enumerate(conversion.shards.items(), start=1):
        place = f"shard {number}/{len(conversion.shards)}"
        if name in done:
            say(f"{place}: {name} is there already")
            continue
        began = time.monotonic()
        receipt["shards"][name] = _convert_shard(conversion, file, name)
        write_json(target / RECEIPT, receipt)
        size = receipt["shards"][name]["size"]
        say(f"{place}: {file.name} -> {name}, {size / 1e9:.2f} GB in {time.monotonic() - began:.1f} s")
    say("reading everything again to verify it")
    _verify(conversion, receipt, recheck=done)
    _write_settings(conversion, receipt, say)
    write_json(target / RECEIPT, {**receipt, "state": "verified"})
    count = sum(len(entry["tensors"]) for entry in receipt["shards"].values())
    say(f"{target}: {count} tensors verified; it loads as any `glm` model")


# ---- before anything is written


def _check_names(conversion: Conversion) -> None:
    """Refuse unknown, misshapen and missing tensors: before the first byte is copied where headers can tell."""
    if conversion.weight_map is not None:
        _refuse_names(conversion, conversion.weight_map, complete=True)
    if all(file.suffix == ".safetensors" for file in conversion.shards):
        found: list[str] = []
        for file in conversion.shards:
            with open_shard(file) as shard:
                _check_shard(conversion, file, shard)
                found += shard.tensors
        _refuse_names(conversion, found, complete=True)


def _refuse_names(conversion: Conversion, names: Sequence[str] | Mapping[str, str], *, complete: bool) -> None:
    problems = []
    unknown = [name for name in names if name not in conversion.known]
    if any(name.startswith(P_TUNING) for name in unknown):
        problems.append("it holds a P-Tuning prefix, which the native model has no place for; convert the base model")
    elif unknown:
        problems.append(f"{len(unknown)} tensors are not known: {_few(unknown)}; only ChatGLM3's own are converted")
    missing = [name for name in conversion.known if name not in names and name != INV_FREQ]
    if complete and missing:
        problems.append(f"{len(missing)} tensors are missing: {_few(missing)}; fetch the checkpoint again")
    if problems:
        raise ModelError(*(f"{conversion.source}: {problem}" for problem in problems))


def _check_shard(conversion: Conversion, file: Path, shard: Shard) -> None:
    _refuse_names(conversion, list(shard.tensors), complete=False)
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


def _receipt(conversion: Conversion) -> dict[str, Any]:
    """The receipt of the conversion that `target` holds, or a new one. Raises ModelError if it is of another."""
    fresh: dict[str, Any] = {"state": "converting", "source": _fingerprint(conversion), "shards": {}}
    path = conversion.target / RECEIPT
    if not path.is_file():
        others = sorted(entry.name for entry in conversion.target.iterdir() if entry.name != ".lock")
        if any(not name.endswith(".partial") for name in others):
            raise ModelError(f"{conversion.target}: is not empty ({_few(others)}); give a new folder")
        return fresh
    try:
        receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = receipt["source"] == fresh["source"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: cannot be read; delete {conversion.target} and convert again") from None
    if not same:
        raise ModelError(
            f"{conversion.target}: holds a conversion of other files than those of {conversion.source}; "
            "give a new folder"
        )
    return receipt


def _fingerprint(conversion: Conversion) -> dict[str, Any]:
    settings = json.dumps(conversion.config, sort_keys=True).encode()
    return {
        "config_sha256": hashlib.sha256(settings).hexdigest(),
        "files": {file.name: file.stat().st_size for file in conversion.shards},
    }


def _check_room(conversion: Conversion, done: set[str]) -> None:
    needed = sum(file.stat().st_size for file, name in conversion.shards.items() if name not in done)
    free = shutil.disk_usage(conversion.target).free
    if needed and free < needed + SPARE:
        raise ModelError(
            f"{conversion.target}: has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed; make room or "
            "give a folder on a larger disk"
        )


# ---- one shard


def _convert_shard(conversion: Conversion, file: Path, name: str) -> dict[str, Any]:
    """Write the native shard, whole or not at all. Returns its entry in the receipt."""
    expected = known_sha256(file)
    if expected is not None and sha256_of(file) != expected:
        raise ModelError(f"{file}: is damaged: its sha256 is not the model hub's; fetch it again")
    hashes: dict[str, str] = {}
    with open_shard(file) as shard:
        _check_shard(conversion, file, shard)
        kept = {tensor: conversion.known[tensor] for tensor in shard.tensors if conversion.known[tensor].parts}
        native = {
            part.name: (shard.tensors[tensor].dtype, part.shape)
            for tensor, known in kept.items()
            for part in known.parts
        }
        partial = conversion.target / f"{name}.partial"
        size = write_safetensors(partial, native, _copied(shard, list(kept), hashes))
        partial.replace(conversion.target / name)
        types = {tensor: shard.tensors[tensor].dtype for tensor in kept}
        dropped = [tensor for tensor in shard.tensors if tensor not in kept]
    return {"from": file.name, "size": size, "tensors": hashes, "types": types, "left_out": dropped}


def _copied(shard: Shard, tensors: Sequence[str], hashes: dict[str, str]) -> Iterator[bytes | memoryview]:
    for tensor in tensors:
        digest = hashlib.sha256()
        for piece in shard.read(tensor):
            digest.update(piece)
            yield piece
        hashes[tensor] = digest.hexdigest()


# ---- at the end


def _verify(conversion: Conversion, receipt: Mapping[str, Any], recheck: set[str]) -> None:
    """Every tensor of the original is in the files just as it was read. `recheck`: files of an earlier process.

    Of those the original is read again too. Raises ModelError naming each file and tensor that differs.
    """
    seen = [tensor for entry in receipt["shards"].values() for tensor in (*entry["tensors"], *entry["left_out"])]
    _refuse_names(conversion, seen, complete=True)
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
        digest = hashlib.sha256()
        for part in conversion.known[tensor].parts:
            for piece in shard.read(part.name):
                digest.update(piece)
        if digest.hexdigest() != expected:
            names = _few([part.name for part in conversion.known[tensor].parts])
            yield f"{path}: is damaged: {names} is not what was written (sha256); {remedy}"


def _source_differences(entry: Mapping[str, Any], file: Path, path: Path, shard: Shard) -> Iterator[str]:
    for tensor, expected in entry["tensors"].items():
        digest = hashlib.sha256()
        for piece in shard.read(tensor):
            digest.update(piece)
        if digest.hexdigest() != expected:
            yield (
                f"{file}: {tensor} is not what it was when {path.name} was made from it (sha256): fetch it again, "
                f"delete {path} and run the command again"
            )


def _write_settings(conversion: Conversion, receipt: Mapping[str, Any], say: Say) -> None:
    """The tokenizer, the index and, last, config.json."""
    source, target = conversion.source, conversion.target
    if (source / "tokenizer.model").is_file():
        for name, content in tokenizer_files(source / "tokenizer.model", conversion.config["seq_length"]).items():
            write_text(target / name, content)
    else:
        say(f"{source} has no tokenizer.model: the result has no tokenizer; put it there and run the command again")
    types = {tensor: kind for entry in receipt["shards"].values() for tensor, kind in entry["types"].items()}
    if len(conversion.shards) > 1:
        weight_map = {
            part.name: name
            for name, entry in receipt["shards"].items()
            for tensor in entry["tensors"]
            for part in conversion.known[tensor].parts
        }
        total = sum((target / name).stat().st_size for name in conversion.shards.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / "model.safetensors.index.json", index)
    write_json(target / "generation_config.json", native_generation_config())
    write_json(target / "config.json", native_config(conversion.config, DTYPES[types[EMBEDDING]]))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
