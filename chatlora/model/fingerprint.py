"""Which base model it is, so that a run can say so and tell another one apart, without reading its weights."""

import hashlib
import struct
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

HASHED_WHOLE = ("config.json", "generation_config.json", "model.safetensors.index.json")


def base_model_fingerprint(base: PreTrainedModel, revision: str | None = None) -> str:
    """`commit:...` for a model of the hub at `revision`.

    Else `sha256:...` over its configuration, tensor headers and file sizes.
    """
    folder = Path(base.name_or_path)
    if not folder.is_dir():
        cached = cached_file(base.name_or_path, "config.json", revision=revision, local_files_only=True)
        return f"commit:{extract_commit_hash(cached, None)}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.name in HASHED_WHOLE:
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size}".encode() + _header(path))
    return f"sha256:{digest.hexdigest()}"


def _header(path: Path) -> bytes:
    """Names, dtypes, shapes and offsets of the tensors: https://github.com/huggingface/safetensors#format"""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(size)
