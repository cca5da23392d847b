"""What is planted among clean rows is found, all of it and nothing else.

Run: pytest tests/data/test_ledger.py
"""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from chatlora.config import DataConfig
from chatlora.data.dataset import PreparedData, prepare_training_data, summary_lines
from chatlora.data.evaluation_set import prepare_evaluation_data
from chatlora.rendering.remarks import EMPTY, OPENS, TEXT_SPELLS_CONTROL
from chatlora.rendering.renderer import Renderer
from tests.rendering.test_chat_templates import TEMPLATES, tokenizer_of

Row = list[dict[str, Any]]
DROPS_SYSTEM = "the chat template drops a system message"
PLANTED: dict[str, Callable[[Row], Row]] = {
    EMPTY: lambda row: [*row, row[0], {"role": "assistant", "content": ""}],
    OPENS: lambda row: [{"role": "assistant", "content": "Hello!"}, *row],
    TEXT_SPELLS_CONTROL: lambda row: [{"role": "user", "content": "What does <|im_end|> do?"}, *row[1:]],
    DROPS_SYSTEM: lambda row: (  # the empty one says nothing, and may go
        [{"role": "system", "content": row[0]["content"]}, *row]
        + [{"role": "system", "content": text} for text in ("", row[0]["content"])]
        + row
    ),
}


def planted_file(shared: Path, path: Path, clean: int) -> dict[str, list[str]]:
    """Writes rows of e2e with ten of each kind spread among them; where they stand."""
    lines = islice((shared / "data" / "e2e.jsonl").read_text(encoding="utf-8").splitlines(), clean)
    rows = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in map(json.loads, lines)
    ]
    places: dict[str, list[str]] = {kind: [] for kind in PLANTED}
    for number, kind in enumerate(kind for kind in PLANTED for _ in range(10)):
        index = 3 + number * (clean // 45)
        rows[index] = PLANTED[kind](rows[index])
        places[kind].append(f"{path}:{index + 1}")
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return places


def renderer() -> Renderer:
    return Renderer(tokenizer_of(TEMPLATES["qwen3_vl"]))


def prepared(tmp_path: Path, train: Path) -> PreparedData:
    config = DataConfig(train=str(train), validation=0)
    return prepare_training_data(config, 0, lambda _: renderer(), cache=tmp_path / "cache", say=lambda line: None)


def test_planted_rows_are_found_exactly(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "planted.jsonl"
    places = planted_file(shared, path, 450)
    data = prepared(tmp_path, path)
    [source] = data.ledger["sources"]
    assert [entry["place"] for entry in source["set_aside"]] == places[DROPS_SYSTEM]
    assert {entry["reason"] for entry in source["set_aside"]} == {DROPS_SYSTEM}
    assert {entry["detail"] for entry in source["set_aside"]} == {"message 5"}
    found = source["remarks"]
    assert {kind: (one["turns"], [each["place"] for each in one["examples"]]) for kind, one in found.items()} == {
        kind: (10, places[kind]) for kind in (EMPTY, OPENS, TEXT_SPELLS_CONTROL)
    }
    assert {each["detail"] for each in found[TEXT_SPELLS_CONTROL]["examples"]} == {"<|im_end|>"}
    assert source["turns"] == 450 - 10 + 10  # no greeting is a target, each empty reply is
    lines = "\n".join(summary_lines(data.ledger))
    for kind in (EMPTY, OPENS):
        assert f"  in 10 turns {kind} (e.g. {places[kind][0]})" in lines
    assert f"  in 10 turns {TEXT_SPELLS_CONTROL} (e.g. {places[TEXT_SPELLS_CONTROL][0]}: <|im_end|>)" in lines
    assert prepared(tmp_path, path).ledger == data.ledger, "kept with the rendered rows"


def test_an_evaluation_s_ledger_tells_the_same(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "planted.jsonl"
    planted_file(shared, path, 450)
    config = DataConfig(train=str(path))
    _, ledger = prepare_evaluation_data(config.train, renderer(), max_prompt_length=None, max_new_tokens=9)
    told, trained = ledger["sources"][0], prepared(tmp_path, path).ledger["sources"][0]
    assert told["remarks"] == trained["remarks"]
    assert [entry["place"] for entry in told["set_aside"]] == [entry["place"] for entry in trained["set_aside"]]


def test_clean_rows_give_no_remark(shared: Path, tmp_path: Path) -> None:
    [source] = prepared(tmp_path, shared / "data" / "identity.json").ledger["sources"]
    assert (source["remarks"], source["set_aside"]) == ({}, [])
