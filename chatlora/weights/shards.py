"""The files of a checkpoint, read and written without holding one in memory.

A safetensors file is read and written as bytes (header: https://github.com/huggingface/safetensors#format), so that
a conversion that only renames and splits rows copies them in pieces. A `.bin` file is unpickled by torch with
`weights_only=True`, which runs no code, and mapped where its format allows.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from chatlora.errors import ModelError

PIECE = 16 * 2**20  # bytes copied at a time
SIZES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number; what else a checkpoint holds is quantised or no weight
OTHER_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
OTHER_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its type as safetensors calls it, its shape, and where its bytes lie (0 in a `.bin`)."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * size_of(self.dtype)


def size_of(dtype: str) -> int:
    return SIZES[dtype] if dtype in SIZES else OTHER_SIZES[dtype]


class Shard(Protocol):
    """An open file of a checkpoint."""

    tensors: dict[str, Stored]

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        """The tensor's bytes, row after row, in pieces."""


@contextmanager
def open_shard(path: Path, *, any_type: bool = False) -> Iterator[Shard]:
    """Raises ModelError where the file is damaged, or holds what is not a plain weight.

    any_type: of a safetensors file, tensors of every type are read.
    """
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            yield _SafetensorsShard(path, file, SIZES | OTHER_SIZES if any_type else SIZES)
    else:
        yield _PickledShard(path)


def find_shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of the checkpoint in `folder` in order, and the index's tensor -> file name, if there is an index.

    Safetensors are preferred. Raises ModelError where there are none, or some are missing.
    """
    for index_name, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index_name).is_file():
            weight_map = _weight_map(folder / index_name)
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ModelError(*(f"{folder / name}: is missing, and {index_name} names it" for name in missing))
            return [folder / name for name in names], weight_map
        if (folder / single).is_file():
            return [folder / single], None
    raise ModelError(f"{folder}: has no weights (model*.safetensors or pytorch_model*.bin with its index)")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of a checkpoint ({error!r}); fetch it again") from None


class _SafetensorsShard:
    def __init__(self, path: Path, file: Any, known: Mapping[str, int]) -> None:
        self.file = file
        size = os.fstat(file.fileno()).st_size
        try:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("the file ends before its header does")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            described = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: is no safetensors file ({error}); fetch it again") from None
        begin = 8 + length
        refuse_types(path, {name: dtype for name, (dtype, *_) in described.items()}, known)
        self.tensors = {}
        for name, (dtype, shape, start, end) in sorted(described.items(), key=lambda item: item[1][2]):
            stored = Stored(dtype, shape, begin + start)
            if end - start != stored.num_bytes or begin + end > size:
                raise ModelError(f"{path}: is cut short or damaged: {name} does not fit into it; fetch it again")
            self.tensors[name] = stored

    def read(self, name: str) -> Iterator[bytes]:
        stored = self.tensors[name]
        self.file.seek(stored.start)
        left = stored.num_bytes
        while left:
            piece = self.file.read(min(PIECE, left))
            assert piece, "the file got shorter while it was read"
            left -= len(piece)
            yield piece


class _PickledShard:
    def __init__(self, path: Path) -> None:
        self.weights = _unpickle(path)
        types = {name: _TORCH_TYPES.get(str(tensor.dtype), str(tensor.dtype)) for name, tensor in self.weights.items()}
        refuse_types(path, types)
        self.tensors = {name: Stored(types[name], tuple(tensor.shape)) for name, tensor in self.weights.items()}

    def read(self, name: str) -> Iterator[memoryview]:
        import torch

        data = memoryview(self.weights[name].detach().contiguous().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


_TORCH_TYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def _unpickle(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            try:
                damaged = archive.testzip()  # torch keeps a checksum of every tensor, and does not look at it
            except (OSError, zipfile.BadZipFile) as error:
                damaged = str(error)
        if damaged is not None:
            raise ModelError(f"{path}: is damaged (the checksum of {damaged} is wrong); fetch it again")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: holds more than tensors, and loading that could run code ({_first_line(error)}); "
            "fetch the original weights, best as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ModelError(f"{path}: cannot be read ({_first_line(error)}); fetch it again") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ModelError(f"{path}: is no table of tensors by name")
    return weights


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def refuse_types(path: Path, types: Mapping[str, str], known: Mapping[str, int] = SIZES) -> None:
    """Raises ModelError naming the tensors that are of no `known` type: by default, of no floating one."""
    odd = [f"{name} ({kind})" for name, kind in types.items() if kind not in known]
    if odd:
        raise ModelError(
            f"{path}: {len(odd)} tensors are not fp32, fp16 or bf16: {', '.join(odd[:5])}; quantised weights cannot be "
            "converted, take the original half-precision checkpoint"
        )


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], data: Iterable[bytes | memoryview]
) -> int:
    """Write name -> (type, shape) and the bytes of all of them in that order. Returns the file's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + prod(shape) * size_of(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in data:
            file.write(piece)
        size = file.tell()
    assert size == 8 + len(encoded) + position, "as many bytes as the header says"
    return size


def known_sha256(path: Path) -> str | None:
    """The hash that the model hub gives for the file, where the folder came from the hub: a download keeps it."""
    if _SHA256.fullmatch(path.resolve().name):  # in the hub's cache, files are links to blobs named by their hash
        return path.resolve().name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    lines = note.read_text(encoding="utf-8").split() if note.is_file() else []
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None
