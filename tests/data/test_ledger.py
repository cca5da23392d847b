"""What the ledger tells of rows beside their replies: what nothing reads of them, and which a reader leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatlora.config import DataConfig, Source
from chatlora.data.dataset import prepare_evaluation_data, prepare_training_data, summary_lines
from chatlora.errors import DataError
from chatlora.rendering.renderer import Renderer
from tests.tiny_tokenizers import llama3_tokenizer

READ = "def read(row):\n    return None if row['id'] % {every} else row\n"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(llama3_tokenizer("llama3"))


def prepared(source: Source, renderer: Renderer, cache: Path) -> dict[str, Any]:
    config = DataConfig(train=(source,), max_length=256, validation=0.0)
    return prepare_training_data(config, 0, lambda _: renderer, cache=cache, say=print).ledger


def rows(path: Path) -> Source:
    """Nine rows: all with an id, three with a score, two with a mood in a message, one with an empty list."""
    lines: list[dict[str, Any]] = []
    for number in range(1, 10):
        reply = {"role": "assistant", "content": f"It is {number}.", **({"mood": "glad"} if number < 3 else {})}
        more: dict[str, Any] = {"score": 0.5} if number < 4 else {"tags": []} if number == 4 else {}
        lines.append({"id": number, "messages": [{"role": "user", "content": "q"}, reply], **more})
    path.write_text("\n".join(map(json.dumps, lines)))
    return Source(path=str(path))


def test_what_nothing_reads_is_listed_once_a_source(renderer: Renderer, tmp_path: Path) -> None:
    source = rows(tmp_path / "t.jsonl")
    ledger = prepared(source, renderer, tmp_path)
    assert ledger["sources"][0]["not_used"] == {"id": 9, "score": 3, "mood": 2}
    assert "  not used: id, score (in 3), mood (in 2)" in summary_lines(ledger)
    assert prepared(source, renderer, tmp_path) == ledger  # out of the cache
    _, evaluated = prepare_evaluation_data([source], renderer, max_prompt_length=None, max_new_tokens=9)
    assert evaluated["sources"][0]["not_used"] == ledger["sources"][0]["not_used"]
    ignoring = source.model_copy(update={"ignore": ("id", "score", "mood")})
    assert prepared(ignoring, renderer, tmp_path)["sources"][0]["not_used"] == {}


def test_rows_that_a_reader_leaves_out_are_counted_and_may_be_most(renderer: Renderer, tmp_path: Path) -> None:
    source = rows(tmp_path / "t.jsonl").model_copy(update={"reader": f"{tmp_path}/my_rows.py:read"})
    reader = tmp_path / "my_rows.py"
    reader.write_text(READ.format(every=4))
    ledger = prepared(source, renderer, tmp_path)
    (account,) = ledger["sources"]
    assert (account["rows_read"], account["rows_used"], len(account["set_aside"])) == (9, 2, 7)
    assert any("set aside 7 x the reader leaves the row out" in line for line in summary_lines(ledger))
    assert "  not used: id" in summary_lines(ledger)
    reader.write_text(READ.format(every=3))  # another reader, other rows
    assert prepared(source, renderer, tmp_path)["sources"][0]["rows_used"] == 3
    reader.write_text(READ.format(every=10))
    with pytest.raises(DataError, match="look at the function that `reader` names"):
        prepared(source, renderer, tmp_path)
