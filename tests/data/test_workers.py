"""Several processes render what one does, in the same order."""

import json
from pathlib import Path

import pytest

from chatlora.config import Source
from chatlora.data import workers
from chatlora.data.workers import Effort, Outcome, Work, num_workers, outcomes
from chatlora.reading.sources import read_conversations
from tests.data.test_dataset import PLAIN, write_rows


def test_workers_give_what_one_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write_rows(tmp_path / "t.jsonl", 150, turns=2))
    lines = path.read_text().splitlines()
    lines[70] = json.dumps({"messages": [{"role": "user", "content": "no reply"}]})
    lines[90] = json.dumps({"prompt": "long", "completion": "word " * 300})
    path.write_text("\n".join(lines))
    monkeypatch.setattr(workers, "CHUNK", 4)  # more chunks than are handed out ahead
    monkeypatch.setattr(workers, "CHUNKS_AHEAD", 2)

    said: list[str] = []

    def rendered_by(number: int) -> tuple[list[tuple[str | None, Outcome]], Effort]:
        effort, numbered = Effort(), ((0, row) for row in read_conversations(Source(path=str(path))))
        found = outcomes(numbered, Work(PLAIN, 200, "fit", "all"), number, effort, said.append)
        return [(conversation.place, outcome) for _, conversation, outcome in found], effort

    alone, _ = rendered_by(0)
    assert [place for place, outcome in alone if outcome.set_aside] == [f"{path}:71", f"{path}:91"]
    proof_seconds_here = PLAIN.proof_seconds
    together, effort = rendered_by(2)
    assert together == alone
    assert PLAIN.proof_seconds == proof_seconds_here  # nothing was rendered in this process
    assert 0 < effort.proof_seconds < effort.seconds


def test_few_rows_start_no_workers() -> None:
    assert num_workers(4672) == 0
    assert num_workers(10**7) <= workers.MAX_WORKERS
