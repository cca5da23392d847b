"""Ten rows of each of eleven faults among clean real ones: each is named for what it is, and no clean one is.

Run: pytest tests/inspection/test_planted_faults.py; -m slow takes 2,000 clean rows.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatlora.commands import dispatch
from chatlora.commands.inspect import parse
from chatlora.inspection.prepare import inspected
from tests.inspection.clean_rows import clean_rows
from tests.inspection.planted import TEMPLATE, planted, write_among, written
from tests.tiny_tokenizers import tiny_tokenizer

CONFIG = """\
model: {name_or_path: model}
data: {train: [first.jsonl, second.jsonl], validation: held_out.jsonl, max_length: 8192, over_length: cut}
"""
DO = (  # what `inspect` says is to be done
    *("data.on_bad_row: error tells all", "take model.chat_template embedded:", "raise data.max_length"),
    *("data.control_text: token takes", "decode the file as", "a model learns to say nothing"),
    *("ignore: [chat_template_kwargs]", "data.on_leak: drop leaves", "look at the roles"),
)
SET_ASIDE = ("--data.on_bad_row", "set_aside")
NAMED = {  # kind -> how it is named, in the ledger
    "broken mask": r"(weight|train|loss|loss_mask|train_on_turn) is |contradict each other|both senses"
    r"|no assistant message is|does not continue its generation prompt",
    "missing stop": r"nothing stops a reply|replies end with another token",
    "control words": r"spells a control token",
    "all targets cut": r"no target is left after the cut",
    "duplicate": r"^duplicates|^near_duplicates",
    "leak": r"^leaks",
    "contradiction": r"^contradictions",
    "wrong encoding": r"signs of a wrong encoding|not UTF-8",
    "empty reply": r"the reply is empty",
    "dropped context": r"drops a",
    "unread flag": r"which nothing reads",
}


def test_each_planted_row_is_named_and_no_clean_one(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found_exactly(200, shared, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_so_it_is_among_2000(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found_exactly(2_000, shared, tmp_path, monkeypatch, capsys)


def found_exactly(
    number: int,
    shared: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CHATLORA_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(folder)
    tiny_tokenizer(chat_template=TEMPLATE, eos=None, pad="<|endoftext|>").save_pretrained("model")
    Path("my.yaml").write_text(CONFIG, encoding="utf-8")
    rng, rows = random.Random(7), clean_rows(shared / "data", number)
    assert len(rows.clean) == number
    Path("held_out.jsonl").write_bytes(b"".join(written(real.row) + b"\n" for real in rows.held_out))

    write_among(folder, rows.clean, {}, rng)
    dispatch(["inspect", "my.yaml", "--strict"])
    ledger = inspected(parse(["my.yaml"]).loaded.config, print).data.ledger
    assert [source["rows_read"] for source in ledger["sources"]] == [number // 2, number // 2, len(rows.held_out)]
    assert list(named(ledger)) == []

    capsys.readouterr()
    places = write_among(folder, rows.clean, planted(rows, rng), rng)
    assert len(places) == 110
    with pytest.raises(SystemExit) as left:
        dispatch(["inspect", "my.yaml", "--strict", *SET_ASIDE])
    assert left.value.code == 1
    told = capsys.readouterr().out
    assert [remedy for remedy in DO if remedy not in told] == []
    ledger = inspected(parse(["my.yaml", *SET_ASIDE]).loaded.config, print).data.ledger
    found: dict[str, set[str]] = {}
    for place, words in named(ledger):
        found.setdefault(place, set()).update(kinds_of(words) or {words})
    assert found == {place: {kind} for place, kind in places.items()}


def named(ledger: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(place, what it is named for): all that the ledger names, which is all that it counts."""
    for source in ledger["sources"]:
        for one in (*source["set_aside"], *source["cut"]):
            yield one["place"], f"{one['reason']}: {one.get('detail', '')}"
        for kind, remark in source["remarks"].items():
            assert remark["turns"] == len(remark["examples"])
            yield from ((one["place"], kind) for one in remark["examples"])
        assert not source["altered"]
    alike = ledger["alike"]
    for kind, counted in (("duplicates", "rows"), ("near_duplicates", "rows"), ("contradictions", "prompts")):
        assert alike[kind][counted] == len(alike[kind]["examples"])
        yield from ((place, kind) for place, _ in alike[kind]["examples"])
    for each in alike["leaks"].values():
        assert each["training_rows"] == len(each["examples"])
        yield from ((place, "leaks") for _, place in each["examples"])


def kinds_of(words: str) -> set[str]:
    return {kind for kind, pattern in NAMED.items() if re.search(pattern, words)}
