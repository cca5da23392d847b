"""Test rows become one sample a prompt, with every reference, and none is lost without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from chatlora.config import Source
from chatlora.data.dataset import prepare_evaluation_data, summary_lines
from chatlora.data.held_out import HeldOutRows, read_held_out
from chatlora.errors import ConfigError, DataError
from chatlora.reading.scan import inputs_of
from chatlora.reading.sources import fingerprint
from chatlora.rendering.renderer import Renderer
from tests.data.test_dataset import prepare, write_rows
from tests.tiny_tokenizers import CHATML_TOKENS, tiny_tokenizer

PLAIN = Renderer(tiny_tokenizer())


def evaluate(path: Path | str, renderer: Renderer = PLAIN, **settings: Any) -> tuple[list[Any], dict[str, Any]]:
    given = {"max_prompt_length": None, "max_new_tokens": 64, **settings}
    samples, ledger = prepare_evaluation_data([Source(path=str(path))], renderer, **given)
    return samples, ledger["sources"][0]


def test_rows_with_equal_prompts_are_one_sample_with_all_references(shared: Path) -> None:
    path = shared / "data" / "e2e.jsonl"
    samples, source = evaluate(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_prompt: dict[str, dict[str, None]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], {})[row["completion"]] = None
    assert (source["rows_read"], source["rows_used"], len(samples)) == (4672, 4672, 547)
    decode = PLAIN.tokenizer.decode
    told = [[decode(ids, skip_special_tokens=True) for ids in sample.references] for sample in samples]
    assert told == [list(completions) for completions in by_prompt.values()]
    assert samples[0].id == f"{path}:1#0"
    assert len({sample.id for sample in samples}) == 547


def test_each_turn_of_a_conversation_is_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_rows(path, 1, turns=3)
    single = json.dumps({"prompt": "row 0 0", "completion": "x"}) + "\n"
    path.write_text(single * 2 + path.read_text() * 2)  # equal prompts, but only the first two rows are single turns
    samples, source = evaluate(path)
    expected = [f"{path}:1#0", *(f"{path}:{row}#{turn}" for row in (3, 4) for turn in range(3))]
    assert [sample.id for sample in samples] == expected
    assert [len(sample.references) for sample in samples] == [1] * 7
    assert (source["rows_used"], source["turns"]) == (4, 8)
    assert [sample.turn for sample in evaluate(path, supervise="last")[0]] == [0, 2, 2]


def test_the_ledger_names_the_template_that_renders_a_refused_row(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    asked = {"role": "user", "content": "row"}
    thought = {"role": "assistant", "content": "x", "reasoning_content": "A map helps."}
    rows: list[list[dict[str, Any]]] = [[asked, {"role": "assistant", "content": "x"}]] * 3
    rows += [[asked, thought], [asked, {"role": "system", "content": ""}]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    _, source = evaluate(path, Renderer(tiny_tokenizer(), reasoning="field"))
    assert source["set_aside"] == [
        {"place": f"{path}:4", "reason": "the chat template drops reasoning", "lifted_by": "embedded:completed"},
        {"place": f"{path}:5", "reason": "no assistant message is a target"},
    ]
    told = (
        "  set aside 1 x the chat template drops reasoning (e.g. {}:4); take model.chat_template embedded:completed, "
    )
    assert told.format(path) + "which renders all of them" in summary_lines(
        {"sources": [source], "replies_too_long": 0}
    )


def test_rows_that_share_a_place_have_ids_of_their_own(tmp_path: Path) -> None:
    path, rows = tmp_path / "compact.json", Path(write_rows(tmp_path / "t.jsonl", 3, turns=2)).read_text().splitlines()
    path.write_text(f"[{', '.join(rows)}]")
    expected = [f"{place}#{turn}" for place in (f"{path}:1", f"{path}:1: row 2", f"{path}:1: row 3") for turn in (0, 1)]
    assert [sample.id for sample in evaluate(path)[0]] == expected
    settings: dict[str, Any] = {"max_prompt_length": None, "max_new_tokens": 64}
    twice, _ = prepare_evaluation_data([Source(path=str(path))] * 3, PLAIN, **settings)
    again = [f"{name} ({number})" for number in (2, 3) for name in expected]
    assert [sample.id for sample in twice] == expected + again


def test_rows_that_were_held_out_are_the_only_ones_accounted_for(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "t.jsonl", 5, turns=2))
    path.write_text(path.read_text() + '{"messages": 3}\n')
    source = {"path": str(path), "sha256": fingerprint(Source(path=str(path))), "repeat": 3}
    rows = HeldOutRows.model_validate({**source, "places": [f"{path}:2", f"{path}:4"]})
    settings: dict[str, Any] = {"max_prompt_length": None, "max_new_tokens": 64, "on_bad_row": "set_aside"}
    samples, ledger = prepare_evaluation_data([rows], PLAIN, **settings)
    assert [sample.id for sample in samples] == [f"{path}:{line}#{turn}" for line in (2, 4) for turn in (0, 1)]
    (account,) = ledger["sources"]
    assert (account["rows_read"], account["rows_used"], account["set_aside"]) == (2, 2, [])
    lost = rows.model_copy(update={"places": (f"{path}:2", f"{path}:9")})
    with pytest.raises(DataError, match=r"1 of the rows that were held out are not in it \(.*:9\)"):
        prepare_evaluation_data([lost], PLAIN, **settings)


def test_rows_held_out_of_a_hub_data_set_are_read_from_the_split_they_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"row {number}", "completion": "x"} for number in range(60)]

    def load_dataset(name: str, subset: str | None, split: str) -> Dataset:
        assert split == "train"
        return Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("chatlora.reading.sources.why_unreachable", lambda: None)
    (kept,) = prepare(tmp_path, train="owner/name", validation=0.1).held_out_rows()["validation"]
    sources = [HeldOutRows.model_validate(kept)]
    samples, _ = prepare_evaluation_data(sources, PLAIN, max_prompt_length=None, max_new_tokens=64)
    assert sorted(sample.place for sample in samples) == sorted(kept["places"])
    assert samples
    assert inputs_of(sources, "test")[0].sha256 == kept["sha256"]


def test_long_prompts_and_cut_references_are_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", 2, turns=3)
    whole, _ = evaluate(path)
    limit = len(whole[1].input_ids)
    samples, source = evaluate(path, max_prompt_length=limit)
    assert [sample.turn for sample in samples] == [0, 1, 0, 1]
    assert [entry["place"] for entry in source["cut"]] == [f"{path}:1", f"{path}:2"]
    assert "turn 2" in source["cut"][0]["detail"]
    with pytest.raises(DataError, match=r"all 2 rows were set aside.*raise evaluation\.max_prompt_length"):
        evaluate(path, max_prompt_length=3)
    with pytest.raises(DataError, match="max_prompt_length"):
        evaluate(path, max_prompt_length=3, over_length="error")
    samples, source = evaluate(path, max_new_tokens=2, over_length="cut")
    assert {len(sample.references[0]) for sample in samples} == {2}
    assert len(source["cut"]) == 2
    assert CHATML_TOKENS[2] not in PLAIN.tokenizer.decode(samples[0].references[0])


@pytest.mark.parametrize("kept", ['{"test": [{"path": "x"}]}', '{"test": [1]}', "{", '{"validation": []}'])
def test_held_out_rows_that_are_not_named_are_told(tmp_path: Path, kept: str) -> None:
    (tmp_path / "held_out.json").write_text(kept)
    with pytest.raises(ConfigError, match="does not say which rows are held out"):
        read_held_out(tmp_path, "test")
