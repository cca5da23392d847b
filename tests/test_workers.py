"""Several processes render what one does, in the same order."""

import json
from pathlib import Path

import pytest
from test_dataset import PLAIN, prepare, write_rows

from chatlora.data import workers


def test_workers_give_what_one_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write_rows(tmp_path / "t.jsonl", 150, turns=2))
    lines = path.read_text().splitlines()
    lines[70] = json.dumps({"messages": [{"role": "user", "content": "no reply"}]})
    lines[90] = json.dumps({"prompt": "long", "completion": "word " * 300})
    path.write_text("\n".join(lines))
    alone = prepare(tmp_path / "alone", train=str(path), max_length=200)
    monkeypatch.setattr(workers, "ROWS_PER_WORKER", 75)
    monkeypatch.setattr(workers, "CHUNK", 8)
    if workers.num_workers(150) < 2:
        pytest.skip("one core: there are no workers")
    proof_seconds_here = PLAIN.proof_seconds
    together = prepare(tmp_path / "together", train=str(path), max_length=200)
    assert PLAIN.proof_seconds == proof_seconds_here  # nothing was rendered in this process
    assert together.ledger == alone.ledger
    assert [entry["place"] for entry in alone.ledger["sources"][0]["set_aside"]] == [f"{path}:71", f"{path}:91"]
    assert together.fingerprint == alone.fingerprint  # the same bytes
    assert 0 < together.proof_seconds < together.seconds


def test_few_rows_start_no_workers() -> None:
    assert workers.num_workers(4672) == 0
    assert workers.num_workers(10**7) <= workers.MAX_WORKERS
