"""The file `tokenizer.model`: a sentencepiece model, read without the sentencepiece package.

It is a protocol buffer of a handful of fields, and only ChatGLM3's needs them, once, at conversion: forty lines here
weigh less than a compiled dependency for everybody. Layout: sentencepiece_model.proto of google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chatlora.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """`kind` is one of the constants above; a higher score is merged first."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What decides how text becomes pieces. The position of a piece is its id."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    normalizer: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises ModelError where the file is not a sentencepiece model."""
    try:
        return _parse(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (IndexError, KeyError, ValueError, TypeError, struct.error):
        raise ModelError(f"{path}: is not a sentencepiece model; fetch the original file again") from None


def _parse(content: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(content):
        if number not in (1, 2, 3) or not isinstance(value, bytes):
            continue
        fields = dict(_fields(value))
        if number == 1:
            pieces.append(Piece(_text(fields[1]), _float(fields.get(2, bytes(4))), _int(fields.get(3, NORMAL))))
        elif number == 2:
            trainer = fields
        else:
            normalizer = fields
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_int(trainer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        normalizer=_text(normalizer.get(1, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: varints as int, everything else as bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}[wire_type]
        if position + size > len(message):
            raise IndexError("the file ends inside a field")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _text(value: int | bytes) -> str:
    if isinstance(value, int):
        raise ValueError("a number where text belongs")
    return value.decode("utf-8")


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number belongs")
    return value


def _float(value: int | bytes) -> float:
    if isinstance(value, int):
        raise ValueError("a number of another kind where a score belongs")
    (number,) = struct.unpack("<f", value)
    return float(number)
