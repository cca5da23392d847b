"""Readers of JSON Lines and JSON -> rows, each with its place; one is in memory at a time, whatever a file's size."""

import codecs
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from chatlora.reading.formats import KNOWN_COLUMNS
from chatlora.reading.streams import PIECE, UTF8_BOM, UTF16, UTF16_BOMS, BadRow, Row, Rows, not_utf8, opened
from chatlora.reading.values import object_of_pairs

_TOO_DEEP = "lists and objects are nested too deeply to be read; write it flatter"
_REWRITE = "write the line with a JSON library, or remove it"
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_SHOWN = 20  # characters to each side of a mistake
_LONGEST_WORD = 64  # no mistake that comes of a text cut off stands further before its end: `-Infinity`, `\ud83d`


def read_jsonl(path: Path, name: str) -> Rows:
    """One JSON object a line; places are `name:line`. A byte-order mark and blank lines are no rows and no mistake."""
    with opened(path) as file:
        first = file.readline().removeprefix(UTF8_BOM)
        misnamed = _misnamed(first)
        if misnamed is not None:
            yield misnamed, f"{name}:1"
            return
        for number, line in enumerate(chain([first], file), start=1):
            if line.strip():
                yield _parse_line(line), f"{name}:{number}"


def _misnamed(first_line: bytes) -> BadRow | None:
    """What shows in the first line that the file as a whole is not JSON Lines."""
    if first_line.startswith(UTF16_BOMS):
        return BadRow(UTF16, ends=True)
    if first_line.strip() == b"{" or first_line.lstrip().startswith(b"["):
        return BadRow("the file is one indented or listed JSON value, not one object a line; name it .json", ends=True)
    return None


def _parse_line(line: bytes) -> Row | BadRow:
    if b"\0" in line:
        return BadRow("NUL bytes, as a crash or a full disk leaves them; write the file again, or remove the line")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return BadRow(not_utf8(line[error.start], error.reason, could_be_gb18030=_is_gb18030([line])))
    try:
        return _as_row(_DECODER.decode(text))
    except json.JSONDecodeError as error:
        rest = text.rstrip()
        if error.pos >= len(rest) or error.msg.startswith(_UNTERMINATED):
            return BadRow(
                f"the JSON breaks off after {len(rest)} characters ({error.msg}); "
                "was the file cut while it was written or copied? Write it again, or remove the line"
            )
        if text.startswith("\ufeff"):
            return BadRow("a byte-order mark stands inside the file, as where files were joined; remove it")
        return BadRow(f"not JSON at column {error.pos + 1} ({error.msg}): {_around(text, error.pos)!r}; {_REWRITE}")
    except (ValueError, RecursionError) as error:
        return BadRow(_unusable(error))


def read_json(path: Path, name: str) -> Rows:
    """A list of rows, an object that holds one list of rows, or objects one after the other.

    Places are `name:line`, with `: row N`, from 1, where a row shares its line with the row before it. An object that
    holds the rows is in memory as a whole.
    """
    with opened(path) as file:
        first = file.read(len(UTF8_BOM)).removeprefix(UTF8_BOM)
        if first.startswith(UTF16_BOMS):
            yield BadRow(UTF16, ends=True), f"{name}:1"
            return
        yield from _json_rows(_JsonText(first, file), path, name)


def _json_rows(text: "_JsonText", path: Path, name: str) -> Rows:
    try:
        for number, found in enumerate(_json_values(text), start=1):
            key = _key_of_rows(found.value) if found.alone else None
            if key is None:
                yield _as_row(found.value), f"{name}:{found.line}" + (f": row {number}" if found.shares_line else "")
                continue
            for index, row in enumerate(found.value[key]):
                yield _as_row(row), f"{name}: {key}[{index}]"
    except UnicodeDecodeError as error:
        with opened(path) as again:
            is_gb = _is_gb18030(iter(lambda: again.read(PIECE), b""))
        problem = not_utf8(error.object[error.start], error.reason, could_be_gb18030=is_gb)
        yield BadRow(problem, ends=True), f"{name}:{text.line_of(len(text.text))}"
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg}): {_around(error.doc, error.pos)!r}; nothing after it was read"
        yield BadRow(problem, ends=True), f"{name}:{text.line_of(error.pos)}"
    except (ValueError, RecursionError) as error:
        yield BadRow(f"{_unusable(error)}; nothing after it was read", ends=True), f"{name}:{text.line_of(text.at)}"


class _JsonText:
    """The part of a file that is being read, as text: as much as the value at hand needs, and little before it.

    `at` is where reading stands in `text`. Bytes that are not UTF-8 raise UnicodeDecodeError once all text in front of
    them has been read.
    """

    def __init__(self, first: bytes, file: BinaryIO) -> None:
        self.text, self.at = "", 0
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self._line, self._counted = 1, 0  # the line of `text[_counted]`
        self._fault: UnicodeDecodeError | None = None
        self._ended = False
        self._append(first)

    def look_ahead(self) -> None:
        """Have as much text as is shown of a mistake."""
        while len(self.text) < self.at + _SHOWN and self._read_on():
            pass

    def peek(self) -> str:
        """The next character that is no white space, where reading stands then; empty at the end."""
        while True:
            self.at = _skip_whitespace(self.text, self.at)
            if self.at < len(self.text) or not self._read_on():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._read_on():
                    raise
                continue
            if end < len(self.text) or not self._read_on():  # a number may go on
                self.at = end
                return value

    def line_of(self, position: int) -> int:
        """The line of a position at or behind the last one that was asked for."""
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.pos >= len(self.text) - _LONGEST_WORD or error.msg.startswith(_UNTERMINATED)

    def _read_on(self) -> bool:
        """Whether there is more text now: as much again as the value at hand has, so that none is tried often."""
        if self._fault is not None:
            raise self._fault
        if self._ended:
            return False
        forgotten = max(0, min(self.at - _SHOWN, self._counted))
        self.text = self.text[forgotten:]
        self.at -= forgotten
        self._counted -= forgotten
        piece = self._file.read(max(PIECE, len(self.text) - self.at))
        self._ended = not piece
        self._append(piece)
        return True

    def _append(self, piece: bytes) -> None:
        try:
            self.text += self._decoder.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode()
            self._fault = error


class _Found(NamedTuple):
    """A value, the line on which it begins, whether the one before began there too, and whether it is the only one."""

    value: Any
    line: int
    shares_line: bool = False
    alone: bool = False


def _json_values(text: _JsonText) -> Iterator[_Found]:
    """The values of a list, or those that stand one after the other. What is no JSON is raised."""
    listed = text.peek() == "["
    if listed:
        text.at += 1
    line, number = 0, 0
    while text.peek() not in ("]", "") if listed else text.peek():
        before, line, number = line, text.line_of(text.at), number + 1
        value = text.value()
        follows = text.peek()
        if listed and follows == ",":
            text.at += 1
        elif listed and follows not in ("]", ""):
            text.look_ahead()
            raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.at)
        yield _Found(value, line, line == before, number == 1 and not listed and not follows)
    if listed and not text.peek():
        problem = "the list is never closed; was the file cut while it was written or copied? Write it again"
        yield _Found(BadRow(problem, ends=True), text.line_of(text.at))
    elif listed:
        line = text.line_of(text.at)
        text.at += 1
        if text.peek():
            yield _Found(BadRow("something follows the list; a file holds one list of rows", ends=True), line)


def _unusable(error: ValueError | RecursionError) -> str:
    """What is told of JSON that is well formed, and cannot be taken as it is."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if "digits" in str(error):
        return f"a number of more than {sys.get_int_max_str_digits():,} digits; put it in quotes if it is meant as text"
    return str(error)


def _key_of_rows(value: Any) -> str | None:
    """The key under which an object that is a whole file holds its rows; None where the object is a row itself."""
    lists = [key for key, item in value.items() if _is_list_of_objects(item)] if isinstance(value, dict) else []
    return lists[0] if len(lists) == 1 and lists[0] not in KNOWN_COLUMNS else None


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


_DECODER = json.JSONDecoder(object_pairs_hook=object_of_pairs)
_UNTERMINATED = "Unterminated string"


def _as_row(value: Any) -> Row | BadRow:
    if isinstance(value, (dict, BadRow)):
        return value
    return BadRow(f"a {type(value).__name__} where a row was expected; a row is an object with named columns")


def _skip_whitespace(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _around(text: str, position: int) -> str:
    return text[max(0, position - _SHOWN) : position + _SHOWN]


def _is_gb18030(pieces: Iterable[bytes]) -> bool:
    decoder = codecs.getincrementaldecoder("gb18030")()
    try:
        for piece in pieces:
            decoder.decode(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
