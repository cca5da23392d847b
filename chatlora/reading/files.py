"""Readers of data files: JSON Lines, JSON, CSV, Parquet -> rows, each with its place.

Every reader yields `(row, place)` one at a time. A row that cannot be read comes as BadRow, so that whoever reads can
gather all mistakes of a file; where nothing behind a mistake can be trusted, it is the last one. Strings stay byte
for byte (`datasets.load_dataset("json")` turns date-like text into dates and loses line numbers).
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from chatlora.reading.formats import KNOWN_COLUMNS

UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_UTF16 = "the file is UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"
_TOO_DEEP = "lists and objects are nested too deeply to be read; write it flatter"
_REWRITE = "write the line with a JSON library, or remove it"
_WHITESPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: what was found, and the remedy. `ends`: nothing behind it was read."""

    problem: str
    ends: bool = False


Row = Mapping[str, Any]
Rows = Iterator[tuple[Row | BadRow, str]]


def read_jsonl(path: Path, name: str) -> Rows:
    """One JSON object a line; places are `name:line`. A byte-order mark and blank lines are no rows and no mistake."""
    with path.open("rb") as file:
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
    if first_line.startswith(_UTF16_BOMS):
        return BadRow(_UTF16, ends=True)
    if first_line.strip() == b"{" or first_line.lstrip().startswith(b"["):
        return BadRow("the file is one indented or listed JSON value, not one object a line; name it .json", ends=True)
    return None


def _parse_line(line: bytes) -> Row | BadRow:
    if b"\0" in line:
        return BadRow("NUL bytes, as a crash or a full disk leaves them; write the file again, or remove the line")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return BadRow(_not_utf8(line, error))
    try:
        return _as_row(_DECODER.decode(text))
    except json.JSONDecodeError as error:
        rest = text.rstrip()
        if error.pos >= len(rest) or error.msg.startswith("Unterminated string"):
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

    Places are `name:line`, with `: row N`, from 1, where a row shares its line with the row before it. The text is held
    in memory, the rows are not.
    """
    raw = path.read_bytes().removeprefix(UTF8_BOM)
    if raw.startswith(_UTF16_BOMS):
        yield BadRow(_UTF16, ends=True), f"{name}:1"
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield BadRow(_not_utf8(raw, error), ends=True), f"{name}:{line}"
        return
    line, counted = 1, 0
    for number, (value, begin, end) in enumerate(_json_values(text), start=1):
        new_lines = text.count("\n", counted, begin)
        line, counted = line + new_lines, begin
        key = _key_of_rows(value) if end == len(text) and not text[:begin].strip() else None
        if key is None:
            shares_line = number > 1 and not new_lines and not isinstance(value, BadRow)
            yield _as_row(value), f"{name}:{line}: row {number}" if shares_line else f"{name}:{line}"
            continue
        for index, row in enumerate(value[key]):
            yield _as_row(row), f"{name}: {key}[{index}]"


def _json_values(text: str) -> Iterator[tuple[Any, int, int]]:
    """The values of a list, or those that stand one after the other, with where each begins and where the next does.

    A mistake comes as BadRow and ends the walk: what follows it cannot be told apart.
    """
    begin = _skip_whitespace(text, 0)
    listed = text[begin : begin + 1] == "["
    end = _skip_whitespace(text, begin + 1) if listed else begin
    while end < len(text) and not (listed and text[end] == "]"):
        begin = end
        try:
            value, end = _DECODER.raw_decode(text, begin)
            end = _skip_whitespace(text, end)
            if listed and text[end : end + 1] not in ("]", ""):
                end = _skip_comma(text, end)
        except json.JSONDecodeError as error:
            yield (
                BadRow(f"not JSON ({error.msg}): {_around(text, error.pos)!r}; nothing after it was read", ends=True),
                error.pos,
                -1,
            )
            return
        except (ValueError, RecursionError) as error:
            yield BadRow(f"{_unusable(error)}; nothing after it was read", ends=True), begin, -1
            return
        yield value, begin, end
    if listed and end >= len(text):
        problem = "the list is never closed; was the file cut while it was written or copied? Write it again"
        yield BadRow(problem, ends=True), end, -1
    elif listed and _skip_whitespace(text, end + 1) < len(text):
        yield BadRow("something follows the list; a file holds one list of rows", ends=True), end + 1, -1


def _unusable(error: ValueError | RecursionError) -> str:
    """What is told of JSON that is well formed, and cannot be taken as it is."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if "digits" in str(error):
        return f"a number of more than {sys.get_int_max_str_digits():,} digits; put it in quotes if it is meant as text"
    return str(error)


def _skip_comma(text: str, position: int) -> int:
    if text[position] != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    return _skip_whitespace(text, position + 1)


def _key_of_rows(value: Any) -> str | None:
    """The key under which an object that is a whole file holds its rows; None where the object is a row itself."""
    lists = [key for key, item in value.items() if _is_list_of_objects(item)] if isinstance(value, dict) else []
    return lists[0] if len(lists) == 1 and lists[0] not in KNOWN_COLUMNS else None


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def read_csv(path: Path, name: str) -> Rows:
    """A header and one row a record, quoted as in RFC 4180; places are the line on which a record begins."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131,072 characters
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        records = _csv_records(csv.reader(file, delimiter=delimiter, strict=True), name)
        header, place = next(records, ([], name))
        fault = header if isinstance(header, BadRow) else _fault_of_header(header, delimiter)
        if fault is not None:
            yield fault, place
            return
        assert isinstance(header, list)
        for record, place in records:
            yield record if isinstance(record, BadRow) else _csv_row(header, record), place


def _csv_records(records: Any, name: str) -> Iterator[tuple[list[str] | BadRow, str]]:
    """Each record that is not empty, with the line on which it begins; what ends the reading comes last."""
    place = f"{name}:1"
    try:
        for record in records:
            if record:
                yield record, place
            place = f"{name}:{records.line_num + 1}"
    except csv.Error as error:
        problem = f"not CSV ({error}); is a quote left open? Close it; nothing after it was read"
        yield BadRow(problem, ends=True), place
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 soon after this line ({error.reason}); convert the file to UTF-8"
        yield BadRow(problem, ends=True), place


def _fault_of_header(header: list[str], delimiter: str) -> BadRow | None:
    repeated = ", ".join(repr(column) for column in sorted({column for column in header if header.count(column) > 1}))
    if repeated:
        return BadRow(f"the header names {repeated} twice; give each column a name of its own", ends=True)
    others = (character for character in "\t;|," if character != delimiter and character in header[0])
    other = next(others, None) if len(header) == 1 else None
    if other is not None:
        expected = "a comma in .csv, a tab in .tsv"
        fault = f"the header is one column, {header[0]!r}: is {other!r} the delimiter? It is {expected}; write it so"
        return BadRow(fault, ends=True)
    return None


def _csv_row(header: list[str], record: list[str]) -> Row | BadRow:
    if len(record) != len(header):
        return BadRow(f"{len(record)} fields where the header has {len(header)}; is a comma or a quote not quoted?")
    if any("\0" in value for value in record):
        return BadRow("NUL characters, as a crash or a full disk leaves them; write the file again")
    return dict(zip(header, record, strict=True))


def read_parquet(path: Path, name: str) -> Rows:
    """Places are `name: row N`, from 1."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield without_nulls(row), f"{name}: row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        found = " ".join(str(error).split())
        problem = f"not readable as Parquet ({found}); was the file cut while it was copied? Copy it again"
        yield BadRow(problem, ends=True), name


def without_nulls(value: Any) -> Any:
    """A value out of Arrow, where every struct has every field: null there means absent."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object; keep one of them")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of_pairs)


def _as_row(value: Any) -> Row | BadRow:
    if isinstance(value, (dict, BadRow)):
        return value
    return BadRow(f"a {type(value).__name__} where a row was expected; a row is an object with named columns")


def _skip_whitespace(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _around(text: str, position: int) -> str:
    return text[max(0, position - 20) : position + 20]


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> str:
    problem = f"not UTF-8 (byte 0x{raw[error.start]:02x}, {error.reason})"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return f"{problem}; convert the file to UTF-8"
    return f"{problem}; it could be GB18030: convert the file with: iconv -f GB18030 -t UTF-8"
