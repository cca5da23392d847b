"""JSON is read in pieces, whatever their size, and gives the rows, places and mistakes of the whole text."""

import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from chatlora.reading import json_files
from chatlora.reading.json_files import read_json
from chatlora.reading.streams import BadRow
from tests.broken_inputs import FILES, LINES, Broken

BROKEN_JSON = [each for each in FILES if each.file == "t.json"] + LINES


def read_in_pieces(monkeypatch: pytest.MonkeyPatch, path: Path, piece: int) -> list[tuple[Any, str]]:
    monkeypatch.setattr(json_files, "PIECE", piece)
    return [(row.problem if isinstance(row, BadRow) else repr(row), place) for row, place in read_json(path, "t")]


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 8:
        return {f"k{number}": random_value(draw, depth + 1) for number in range(draw.randrange(4))}
    text = "".join(draw.choice('aé你😀"\\\n\t ]},{[:') for _ in range(draw.randrange(12)))
    return [text, True, None, -math.inf, draw.randrange(-(10**20), 10**20), draw.random() * 10**300, text * 3][kind]


def random_file(draw: random.Random, path: Path) -> list[Any]:
    """A list of rows, or rows one after the other, in one of the ways in which they are written."""
    rows = [{"row": random_value(draw)} for _ in range(draw.randrange(2, 12))]
    indent, ascii_only = draw.choice([None, 1]), draw.random() < 0.5
    texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    listed = draw.random() < 0.5
    between = draw.choice([",", ", \n", "\n,\r\n"] if listed else ["", "\n", " \n\n"])
    text = between.join(texts)
    path.write_text(f" [\n{text}] \n" if listed else text, encoding="utf-8", newline="")
    return rows


def test_any_pieces_give_the_rows_that_json_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, path = random.Random(0), tmp_path / "t.json"
    for _ in range(60):
        rows = random_file(draw, path)
        whole = read_in_pieces(monkeypatch, path, 1 << 20)
        assert [row for row, _ in whole] == [repr(row) for row in rows]
        for piece in (1, 3, draw.randrange(2, 60)):
            assert read_in_pieces(monkeypatch, path, piece) == whole


@pytest.mark.parametrize("broken", BROKEN_JSON, ids=lambda broken: broken.name)
def test_any_pieces_give_the_same_mistakes(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(broken.content[:200_000])
    pieces = [7, 1000] if len(broken.content) > 2000 else [1, 2, 7, 30]
    whole = read_in_pieces(monkeypatch, path, 1 << 24)
    assert all(read_in_pieces(monkeypatch, path, piece) == whole for piece in pieces)


def test_a_reader_that_takes_a_cut_off_word_for_a_mistake_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    path.write_text('[{"a": true}, {"a": -Infinity}]')
    right = read_in_pieces(monkeypatch, path, 1 << 20)
    assert read_in_pieces(monkeypatch, path, 1) == right
    monkeypatch.setattr(json_files, "_LONGEST_WORD", 0)
    assert read_in_pieces(monkeypatch, path, 1) != right


def test_what_comes_before_bytes_that_are_no_utf8_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    path.write_bytes('[{"a": "你"},\n{"b": "'.encode() + "再见".encode("gbk") + b'"}]')
    for piece in (1, 5, 1 << 16):
        row, (problem, place) = read_in_pieces(monkeypatch, path, piece)
        assert row == ("{'a': '你'}", "t:1")
        assert place == "t:2"
        assert "not UTF-8 (byte 0xd4" in problem


def test_a_long_list_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("[" + ",\n".join(json.dumps({"prompt": "x" * 500, "n": row}) for row in range(20_000)) + "]")
    tracemalloc.start()
    last = None
    for last in read_json(path, "t"):  # noqa: B007  (the last one is looked at)
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last == ({"prompt": "x" * 500, "n": 19_999}, "t:20000")
    assert peak < 1_500_000  # the file has 10 MB
