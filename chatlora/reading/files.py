"""Which reader a data file has, by its ending; and those of tables: CSV, Parquet, Arrow -> rows, each with its place.

Every reader yields `(row, place)` one at a time. A row that cannot be read comes as BadRow, so that whoever reads can
gather all mistakes of a file; where nothing behind a mistake can be trusted, it is the last one. Strings stay byte
for byte (`datasets.load_dataset("json")` turns date-like text into dates and loses line numbers).
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from chatlora.reading.arrow import cleaner_of
from chatlora.reading.json_files import read_json, read_jsonl
from chatlora.reading.streams import PACKED, BadRow, Row, Rows, endings_of, opened

ROWS_AT_A_TIME = 1024  # of a table, as Python's values


def read_csv(path: Path, name: str) -> Rows:
    """A header and one row a record, quoted as in RFC 4180; places are the line on which a record begins."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131,072 characters
    delimiter = "\t" if endings_of(path)[0] == ".tsv" else ","
    with TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as file:
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
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=ROWS_AT_A_TIME)

    return _rows_of(batches(), name, "Parquet")


def read_arrow(path: Path, name: str) -> Rows:
    """Arrow's two formats, that of files (Feather version 2 is it) and that of streams; places are `name: row N`."""

    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as file:
            magic = file.read(6)
            file.seek(0)
            if magic == b"ARROW1":
                reader = pa.ipc.open_file(file)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(file)

    return _rows_of(batches(), name, "Arrow")


def _rows_of(batches: Iterable[Any], name: str, form: str) -> Rows:
    import pyarrow as pa

    number = 0
    try:
        slices = (batch.slice(at, ROWS_AT_A_TIME) for batch in batches for at in range(0, len(batch), ROWS_AT_A_TIME))
        for each in slices:
            clean = cleaner_of(each.schema)
            for row in each.to_pylist():
                number += 1
                yield cleaned_row(clean, row), f"{name}: row {number}"
    except (pa.ArrowException, OSError) as error:
        found = " ".join(str(error).split())
        problem = f"not readable as {form} ({found}); was the file cut while it was copied? Copy it again"
        yield BadRow(problem, ends=True), name


def cleaned_row(clean: Callable[[Row], Row], row: Row) -> Row | BadRow:
    try:
        return clean(row)
    except ValueError as error:
        return BadRow(str(error))


Reader = Callable[[Path, str], Rows]
STREAMED: dict[str, Reader] = {  # these may be packed
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
READERS: dict[str, Reader] = {**STREAMED, ".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
ENDINGS = f"{', '.join(READERS)}; {', '.join(STREAMED)} also with {', '.join(PACKED)} behind"


def reader_of(path: Path) -> Reader | None:
    """What reads a file, by its ending; None where that is none of a data file."""
    ending, is_packed = endings_of(path)
    return (STREAMED if is_packed else READERS).get(ending)
