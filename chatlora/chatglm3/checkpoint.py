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
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from chatlora.chatglm3.configuration import native_config, native_generation_config, read_config
from chatlora.chatglm3.naming import known_tensors
from chatlora.chatglm3.shards import (
    DTYPES,
    Shard,
    find_shards,
    known_sha256,
    open_shard,
    write_safetensors,
)
from chatlora.chatglm3.tokenizer import VOCABULARY, tokenizer_files
from chatlora.chatglm3.verification import Conversion, check_names, check_shard, few, verify
from chatlora.disk import PARTIAL, sha256_of, sweep, write_json, write_text, written_beside
from chatlora.errors import ModelError

RECEIPT = "conversion.json"
SPARE = 64 * 2**20  # bytes of the disk that stay free
EMBEDDING = "transformer.embedding.word_embeddings.weight"

Say = Callable[[str], None]


def convert_checkpoint(source: Path, target: Path, say: Say) -> None:
    """Convert, or go on with a conversion that was interrupted, or check one that is done.

    Raises ModelError where `source` is not a ChatGLM3 checkpoint or damaged, `target` holds something else, the disk
    is too small, or a finished file is not what was written.
    """
    conversion = _conversion(source, target)
    check_names(conversion)
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
    sweep(target)
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
    verify(conversion, receipt, recheck=done)
    _write_settings(conversion, receipt, say)
    write_json(target / RECEIPT, {**receipt, "state": "verified"})
    count = sum(len(entry["tensors"]) for entry in receipt["shards"].values())
    say(f"{target}: {count} tensors verified; it loads as any `glm` model")


def _receipt(conversion: Conversion) -> dict[str, Any]:
    """The receipt of the conversion that `target` holds, or a new one. Raises ModelError if it is of another."""
    fresh: dict[str, Any] = {"state": "converting", "source": _fingerprint(conversion), "shards": {}}
    path = conversion.target / RECEIPT
    if not path.is_file():
        others = sorted(entry.name for entry in conversion.target.iterdir() if entry.name != ".lock")
        if any(not name.endswith(PARTIAL) for name in others):
            raise ModelError(f"{conversion.target}: is not empty ({few(others)}); give a new folder")
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
        check_shard(conversion, file, shard)
        kept = {tensor: conversion.known[tensor] for tensor in shard.tensors if conversion.known[tensor].parts}
        native = {
            part.name: (shard.tensors[tensor].dtype, part.shape)
            for tensor, known in kept.items()
            for part in known.parts
        }
        with written_beside(conversion.target / name) as beside:
            size = write_safetensors(beside, native, _copied(shard, list(kept), hashes))
        return {
            "from": file.name,
            "size": size,
            "bytes": sum(shard.tensors[tensor].num_bytes for tensor in kept),
            "tensors": hashes,
            "types": {tensor: shard.tensors[tensor].dtype for tensor in kept},
            "left_out": [tensor for tensor in shard.tensors if tensor not in kept],
        }


def _copied(shard: Shard, tensors: Sequence[str], hashes: dict[str, str]) -> Iterator[bytes | memoryview]:
    for tensor in tensors:
        digest = hashlib.sha256()
        for piece in shard.read(tensor):
            digest.update(piece)
            yield piece
        hashes[tensor] = digest.hexdigest()


def _write_settings(conversion: Conversion, receipt: Mapping[str, Any], say: Say) -> None:
    """The tokenizer, the index and, last, config.json."""
    source, target = conversion.source, conversion.target
    if (source / "tokenizer.model").is_file():
        if conversion.config["padded_vocab_size"] < VOCABULARY:
            say(f"the tokenizer has {VOCABULARY:,} ids, the model {conversion.config['padded_vocab_size']:,} only")
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
        index = {
            "metadata": {"total_size": sum(entry["bytes"] for entry in receipt["shards"].values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(target / "model.safetensors.index.json", index)
    write_json(target / "generation_config.json", native_generation_config())
    write_json(target / "config.json", native_config(conversion.config, DTYPES[types[EMBEDDING]]))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
