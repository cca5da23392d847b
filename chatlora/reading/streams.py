"""A data file as a stream of bytes, unpacked where its name says that it is packed, and what cannot be read of it."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
UTF16 = "the file is UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"
NOT_UTF8 = "not UTF-8"
PIECE = 1 << 16  # bytes read at a time
NOT_READ = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what reading a file raises, packed or not


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: what was found, and the remedy. `ends`: nothing behind it was read."""

    problem: str
    ends: bool = False


Row = Mapping[str, Any]
Rows = Iterator[tuple[Row | BadRow, str]]


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, one after the other; those inside of a packed one."""
    unpack = PACKED.get(path.suffix.lower())
    return path.open("rb") if unpack is None else cast(BinaryIO, unpack(path))


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    # The standard library unpacks it from Python 3.14 on. The buffer adds what pyarrow's file lacks: lines.
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), PIECE)


PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def endings_of(path: Path) -> tuple[str, bool]:
    """What a file's name says of its content, and whether it is packed: `t.JSONL.gz` gives (".jsonl", True)."""
    ending = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), True) if ending in PACKED else (ending, False)


def stem_of(path: Path) -> str:
    """A file's name without its endings: that of `t.jsonl.gz` is `t`."""
    return Path(path.stem).stem if endings_of(path)[1] else path.stem


def unreadable(path: Path, error: Exception) -> BadRow:
    """What is told of a file that one of NOT_READ ends."""
    if isinstance(error, OSError) and error.errno is not None:
        return BadRow(f"cannot be read ({error.strerror}); look at its permissions", ends=True)
    found = " ".join(str(error).split()).removesuffix(".")
    remedy = "was the file cut while it was copied? Copy it again; nothing after this was read"
    return BadRow(f"cannot be unpacked as {path.suffix.lower()} ({found}); {remedy}", ends=True)


def not_utf8(byte: int, reason: str, *, could_be_gb18030: bool) -> str:
    problem = f"{NOT_UTF8} (byte 0x{byte:02x}, {reason})"
    if could_be_gb18030:
        return f"{problem}; it could be GB18030: convert the file with: iconv -f GB18030 -t UTF-8"
    return f"{problem}; convert the file to UTF-8"
