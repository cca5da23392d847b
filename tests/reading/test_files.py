"""Files of every kind give their rows byte for byte, each with its place; broken ones say where and why."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from chatlora.config import Source
from chatlora.errors import DataError
from chatlora.reading import sources
from chatlora.reading.sources import read_conversations

GOOD = '{"prompt": "p", "completion": "c"}'
TEXTS = [
    "2024-01-01",
    "007",
    "1e5",
    "null",
    " a\r\n\tb ",
    "",
    "👋🏽",
    "\u0000",
    "\ufeff",
    "\u2028",
    '"quoted", yes',
    "N/A",
]


def read(path: Path | str, **settings: Any) -> list[tuple[str, str, str]]:
    """(place, question, answer) of every row."""
    rows = read_conversations(Source(path=str(path), **settings))
    return [(row.place or "", row.messages[0].content, row.messages[1].content) for row in rows]


def problems_of(path: Path | str, **settings: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    return caught.value.problems


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- JSON Lines

VALID = {
    "no line break at the end": (f"{GOOD}\n{GOOD}".encode(), [1, 2]),
    "blank lines": (f"\n{GOOD}\n \t\n{GOOD}\n\n".encode(), [2, 4]),
    "windows line ends": (f"{GOOD}\r\n{GOOD}\r\n".encode(), [1, 2]),
    "byte-order mark": (b"\xef\xbb\xbf" + f"{GOOD}\n".encode(), [1]),
    "spaces around": (f"  {GOOD}  \n".encode(), [1]),
    "other columns": (
        b'{"id": 12345678901234567890, "prompt": "p", "meta": {"d": [1.5, null]}, "completion": "c"}',
        [1],
    ),
    "escaped key": (b'{"\\u0070rompt": "p", "completion": "c"}', [1]),
    "a line separator inside a text": ('{"prompt": "p", "completion": "c", "x": "a\u2028b"}'.encode(), [1]),
}
BROKEN: dict[str, tuple[bytes, int, str]] = {
    "truncated in a text": (f'{GOOD}\n{{"prompt": "p", "compl'.encode(), 2, "the JSON breaks off after 22 characters"),
    "truncated after a comma": (f'{GOOD}\n{{"prompt": "p",'.encode(), 2, "the JSON breaks off"),
    "truncated in the middle of the file": (f'{{"prompt": "p\n{GOOD}'.encode(), 1, "the JSON breaks off"),
    "truncated in a character": (f"{GOOD}\n".encode() + '{"prompt": "你'.encode()[:-1], 2, "not UTF-8"),
    "NUL tail": (f"{GOOD}\n".encode() + b"\0" * 100, 2, "NUL bytes"),
    "NUL in a line": (b'{"prompt": "a\0b", "completion": "c"}', 1, "NUL bytes"),
    "GBK": (
        f"{GOOD}\n".encode() + '{"prompt": "你好", "completion": "再见"}'.encode("gbk"),
        2,
        "iconv -f GB18030 -t UTF-8",
    ),
    "Latin-1": (b'{"prompt": "caf\xe9", "completion": "c"}', 1, "not UTF-8 (byte 0xe9"),
    "UTF-16": (f"{GOOD}\n".encode("utf-16"), 1, "iconv -f UTF-16 -t UTF-8"),
    "duplicate key": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', 1, "the key 'prompt' stands twice"),
    "duplicate key inside": (
        b'{"messages": [{"role": "user", "role": "user", "content": ""}]}',
        1,
        "'role' stands twice",
    ),
    "lone surrogate": (b'{"prompt": "a\\ud83d", "completion": "c"}', 1, "prompt holds half a character (\\ud83d"),
    "two objects in a line": (f"{GOOD}{GOOD}".encode(), 1, "not JSON at column 35 (Extra data)"),
    "trailing comma": (b'{"prompt": "p", "completion": "c",}', 1, "not JSON at column"),
    "single quotes": (b"{'prompt': 'p', 'completion': 'c'}", 1, "not JSON at column 2"),
    "line break inside a text": (b'{"prompt": "a\nb", "completion": "c"}', 1, "the JSON breaks off"),
    "tab inside a text": (b'{"prompt": "a\tb", "completion": "c"}', 1, "Invalid control character"),
    "bad escape": (b'{"prompt": "C:\\dir", "completion": "c"}', 1, "Invalid \\escape"),
    "a comment": (f"// rows\n{GOOD}".encode(), 1, "not JSON at column 1"),
    "a list as a row": (f'{GOOD}\n["p", "c"]'.encode(), 2, "a list where a row was expected"),
    "a text as a row": (b'"p"', 1, "a str where a row was expected"),
    "a JSON list": (f"[{GOOD}]".encode(), 1, "name it .json"),
    "indented JSON": (b'{\n "prompt": "p",\n "completion": "c"\n}', 1, "name it .json"),
    "a number as text": (b'{"prompt": 5, "completion": "c"}', 1, "prompt is the number 5, not text"),
    "NaN as text": (b'{"prompt": NaN, "completion": "c"}', 1, "prompt is the number nan"),
    "null as text": (b'{"prompt": null, "completion": "c"}', 1, "prompt is missing or null"),
    "a column misspelled": (b'{"prompt": "p", "completon": "c"}', 1, "completion is missing or null"),
    "a role misspelled": (b'{"messages": [{"role": "asistant", "content": ""}]}', 1, "did you mean 'assistant'?"),
    "far too deep": (b'{"prompt": ' + b"[" * 100_000, 1, "nested too deeply"),
    "an endless number": (b'{"prompt": ' + b"1" * 5000 + b"}", 1, "digits"),
    "empty": (b"", 0, "holds no rows"),
    "only blank lines": (b"\n\n \n", 0, "holds no rows"),
}


@pytest.mark.parametrize("name", VALID)
def test_jsonl_that_is_fine(here: Path, name: str) -> None:
    content, lines = VALID[name]
    (here / "t.jsonl").write_bytes(content)
    assert read("t.jsonl") == [(f"t.jsonl:{line}", "p", "c") for line in lines]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_jsonl_says_where_and_why(here: Path, name: str) -> None:
    content, line, said = BROKEN[name]
    (here / "t.jsonl").write_bytes(content)
    (problem, *more) = problems_of("t.jsonl")
    assert problem.startswith(f"t.jsonl:{line}: " if line else "t.jsonl: ")
    assert said in problem
    assert all(f"t.jsonl:{line + 1}: " in other for other in more)  # the half that a line break cut off


def test_all_broken_rows_of_a_source_are_told_at_once(here: Path) -> None:
    lines = [GOOD, "{", GOOD, '{"prompt": 1, "completion": 2}', GOOD, *["nonsense"] * 100]
    (here / "t.jsonl").write_text("\n".join(lines))
    found = problems_of("t.jsonl")
    assert len(found) == 103
    assert [problem.split(": ")[0] for problem in found[:4]] == ["t.jsonl:2", "t.jsonl:4", "t.jsonl:4", "t.jsonl:6"]
    last = r"\n  t\.jsonl:6 and 98 more rows: [^\n]+\n  t\.jsonl:105: [^\n]+\nTo train without such rows: [^\n]+\Z"
    with pytest.raises(DataError, match=last):
        read("t.jsonl")


def test_reading_stops_at_very_many_mistakes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_PROBLEMS", 5)
    (here / "t.jsonl").write_text("nonsense\n" * 100)
    assert len(problems_of("t.jsonl")) == 6


# ---- every kind of file gives the same texts


def write_as(path: Path, texts: list[str]) -> None:
    rows = [{"prompt": text, "completion": text} for text in texts]
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline=""
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([["prompt", "completion"], *([text, text] for text in texts)])


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_texts_are_byte_for_byte_in_every_kind_of_file(here: Path, ending: str) -> None:
    texts = [text for text in TEXTS if ending not in (".csv", ".tsv") or "\0" not in text]
    write_as(here / f"t{ending}", texts)
    rows = read(f"t{ending}")
    assert [(question, answer) for _, question, answer in rows] == [(text, text) for text in texts]
    assert len({place for place, _, _ in rows}) == len(texts)


def test_places_in_every_kind_of_file(here: Path) -> None:
    for ending in (".jsonl", ".json", ".csv", ".parquet"):
        write_as(here / f"t{ending}", ["a\nb", "c"])
    (here / "held.json").write_text(f'{{"version": 1, "rows": [{GOOD}, {GOOD}]}}')
    (here / "lines.json").write_text(f"\n{GOOD}\n\n{GOOD}{GOOD}")
    (here / "one.json").write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    )
    assert [place for place, *_ in read("t.jsonl")] == ["t.jsonl:1", "t.jsonl:2"]
    assert [place for place, *_ in read("t.json")] == ["t.json:2", "t.json:6"]
    assert [place for place, *_ in read("t.csv")] == ["t.csv:2", "t.csv:5"]
    assert [place for place, *_ in read("t.parquet")] == ["t.parquet: row 1", "t.parquet: row 2"]
    assert [place for place, *_ in read("held.json")] == ["held.json: rows[0]", "held.json: rows[1]"]
    assert [place for place, *_ in read("lines.json")] == ["lines.json:2", "lines.json:4", "lines.json:4: row 3"]
    assert [place for place, *_ in read("one.json")] == ["one.json:1"]


@pytest.mark.parametrize(
    ("name", "content", "place", "said"),
    [
        ("t.json", f"[\n{GOOD},\n{GOOD}\n".encode(), "t.json:4", "the list is never closed"),
        ("t.json", f"[\n{GOOD}\n{GOOD}]".encode(), "t.json:3", "Expecting ',' delimiter"),
        ("t.json", f"[{GOOD},\n{{'a': 1}}]".encode(), "t.json:2", "not JSON"),
        ("t.json", f"[{GOOD}]\n[{GOOD}]".encode(), "t.json:1", "something follows the list"),
        ("t.json", f"[{GOOD}, 3]".encode(), "t.json:1", "a int where a row was expected"),
        ("t.json", f"[{GOOD},\n".encode() + b"\xff]", "t.json:2", "not UTF-8"),
        ("t.json", b'[\n{"a": 1, "a": 2}]', "t.json:2", "the key 'a' stands twice"),
        ("t.json", b"[]", "t.json", "holds no rows"),
        ("t.csv", b"prompt,completion\np,c\np,c,d\n", "t.csv:3", "3 fields where the header has 2"),
        ("t.csv", b'prompt,completion\np,"c\n', "t.csv:2", "is a quote left open?"),
        ("t.csv", b"prompt,prompt\np,c\n", "t.csv:1", "the header names 'prompt' twice"),
        ("t.csv", b"prompt,completion\np,c\n\xff,c\n", "t.csv:", "not UTF-8"),
        ("t.csv", b"prompt,completion\np,c\0\n", "t.csv:2", "NUL"),
        ("t.csv", b"prompt,completion\n", "t.csv", "holds no rows"),
        ("t.parquet", b"PAR1 broken", "t.parquet", "not readable as Parquet"),
    ],
)
def test_other_broken_files_say_where_and_why(here: Path, name: str, content: bytes, place: str, said: str) -> None:
    (here / name).write_bytes(content)
    (problem,) = problems_of(name)
    assert problem.startswith(place)
    assert said in problem


PACKERS: dict[str, Callable[[bytes], Any]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(pa.compress, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_packed_files_give_the_rows_and_places_of_the_plain_ones(here: Path, ending: str, packer: str) -> None:
    name = f"t{ending}"
    write_as(here / name, ["a", "你好\n", "x" * 100_000])
    plain = (here / name).read_bytes()
    assert plain
    (here / f"{name}{packer.upper()}").write_bytes(PACKERS[packer](plain))
    assert read(f"{name}{packer.upper()}") == [
        (place.replace(name, f"{name}{packer.upper()}"), *row) for place, *row in read(name)
    ]


@pytest.mark.parametrize("packer", PACKERS)
def test_packed_files_that_break_off_or_are_none_say_so(here: Path, packer: str) -> None:
    lines = "".join(GOOD.replace('"c"', f'"{number**9}"') + "\n" for number in range(20_000)).encode()
    name = f"t.jsonl{packer}"
    for content in (PACKERS[packer](lines)[:20_000], b"nothing packed"):
        (here / name).write_bytes(content)
        (problem,) = problems_of(name)
        assert problem.startswith(f"{name}: cannot be unpacked as {packer} (")
        assert problem.endswith("was the file cut while it was copied? Copy it again; nothing after this was read")


def test_files_that_were_packed_one_behind_the_other_are_read_to_the_end(here: Path) -> None:
    for packer, pack in PACKERS.items():
        (here / f"t.jsonl{packer}").write_bytes(b"".join((pack(f"{GOOD}\n".encode())) for _ in range(3)))
        assert len(read(f"t.jsonl{packer}")) == 3


def arrow_bytes(form: str, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    if form == "feather":
        feather.write_feather(table, sink, compression="zstd")
    else:
        with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("form", ["stream", "file", "feather"])
def test_arrow_and_feather_files_are_read(here: Path, form: str) -> None:
    rows = [{"prompt": f"p{number}", "completion": "你"} for number in range(3000)]
    content = arrow_bytes(form, pa.Table.from_pylist(rows))
    name = "t.feather" if form == "feather" else "t.arrow"
    (here / name).write_bytes(content)
    assert read(name) == [(f"{name}: row {n}", f"p{n - 1}", "你") for n in range(1, 3001)]
    for broken in (content[: len(content) // 2], b"", b"no arrow at all"):
        (here / name).write_bytes(broken)
        assert "not readable as Arrow (" in problems_of(name)[-1]


def test_long_csv_fields_are_read(here: Path) -> None:
    write_as(here / "t.csv", ["x" * 200_000])
    assert [len(answer) for *_, answer in read("t.csv")] == [200_000]


def test_structs_out_of_arrow_lose_the_fields_that_only_other_rows_have(here: Path) -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "2"}}]
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), here / "t.parquet")
    read_back = [row.messages[0].tool_calls[0].arguments for row in read_conversations(Source(path="t.parquet"))]
    assert read_back == [{"a": 1}, {"b": "2"}]
