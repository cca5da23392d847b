"""A ChatGLM3 folder -> a native `glm` folder: shard by shard, resumable, verified.

Renaming and splitting rows leaves every byte as it is and in its order, so a shard is converted by writing a new
header and copying what follows: memory does not grow with the model. `conversion.json` in the target is the receipt:
the sha256 of every tensor of the original, by which the finished files are read again and checked. config.json is
written last: a folder that is not whole cannot be loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatlora.chatglm3.configuration import native_config, native_generation_config, read_config
from chatlora.chatglm3.naming import known_tensors
from chatlora.chatglm3.tokenizer import VOCABULARY, tokenizer_files
from chatlora.chatglm3.verification import Conversion, check_names, check_shard, verify
from chatlora.disk import write_json, write_text, written_beside
from chatlora.errors import ModelError
from chatlora.weights.rewriting import Rewriting, Say, alone_in, hashed, index_of, receipt_in, rewrite
from chatlora.weights.shards import DTYPES, find_shards, open_shard, write_safetensors

RECEIPT = "conversion.json"
EMBEDDING = "transformer.embedding.word_embeddings.weight"


def convert_checkpoint(source: Path, target: Path, say: Say) -> None:
    """Convert, or go on with a conversion that was interrupted, or check one that is done.

    Raises ModelError where `source` is not a ChatGLM3 checkpoint or damaged, `target` holds something else, the disk
    is too small, or a finished file is not what was written.
    """
    conversion = _conversion(source, target)
    check_names(conversion)
    with alone_in(target, "converting"):
        _convert(conversion, say)


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
    rewriting = Rewriting(
        source=conversion.source,
        target=conversion.target,
        shards=conversion.shards,
        receipt=RECEIPT,
        identity=_fingerprint(conversion),
        what="conversion",
        doing="converting",
        write=lambda file, name: _convert_shard(conversion, file, name),
    )
    receipt = receipt_in(rewriting)
    done = rewrite(rewriting, receipt, say)
    say("reading everything again to verify it")
    verify(conversion, receipt, recheck=done)
    _write_settings(conversion, receipt, say)
    write_json(conversion.target / RECEIPT, {**receipt, "state": "verified"})
    count = sum(len(entry["tensors"]) for entry in receipt["shards"].values())
    say(f"{conversion.target}: {count} tensors verified; it loads as any `glm` model")


def _fingerprint(conversion: Conversion) -> dict[str, Any]:
    settings = json.dumps(conversion.config, sort_keys=True).encode()
    return {
        "config_sha256": hashlib.sha256(settings).hexdigest(),
        "files": {file.name: file.stat().st_size for file in conversion.shards},
    }


# ---- one shard


def _convert_shard(conversion: Conversion, file: Path, name: str) -> dict[str, Any]:
    """Write the native shard, whole or not at all. Returns its entry in the receipt."""
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
            copied = (piece for tensor in kept for piece in hashed(shard.read(tensor), tensor, hashes))
            size = write_safetensors(beside, native, copied)
        return {
            "from": file.name,
            "size": size,
            "bytes": sum(shard.tensors[tensor].num_bytes for tensor in kept),
            "tensors": hashes,
            "types": {tensor: shard.tensors[tensor].dtype for tensor in kept},
            "left_out": [tensor for tensor in shard.tensors if tensor not in kept],
        }


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
        index = index_of(weight_map, sum(entry["bytes"] for entry in receipt["shards"].values()))
        write_json(target / "model.safetensors.index.json", index)
    write_json(target / "generation_config.json", native_generation_config())
    write_json(target / "config.json", native_config(conversion.config, DTYPES[types[EMBEDDING]]))
