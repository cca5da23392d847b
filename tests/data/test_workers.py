"""Several processes render what one does, in the same order."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatlora.config import Source
from chatlora.data import workers
from chatlora.data.workers import MAX_WORKERS, START_SECONDS, Effort, Outcome, Work, num_workers, outcomes
from chatlora.reading.sources import read_conversations
from chatlora.rendering.examples import Example
from chatlora.rendering.renderer import Renderer
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

    def rendered_by(start_seconds: float) -> tuple[list[tuple[str | None, Outcome]], Effort]:
        monkeypatch.setattr(workers, "START_SECONDS", start_seconds)
        effort, numbered = Effort(), ((0, row) for row in read_conversations(Source(path=str(path))))
        found = outcomes(numbered, Work(PLAIN, 200, "fit", "all"), 150, effort, said.append)
        return [(conversation.place, outcome) for _, conversation, outcome in found], effort

    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    alone, _ = rendered_by(math.inf)
    assert [place for place, outcome in alone if outcome.set_aside] == [f"{path}:71", f"{path}:91"]
    proofs_here = proofs_by(PLAIN, monkeypatch)
    together, effort = rendered_by(0.0)
    assert together == alone
    assert len(proofs_here) < len(alone) / 2  # of the rows that were looked at first; workers render the others
    assert 0 < effort.proof_seconds < effort.seconds


def proofs_by(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """The examples that this renderer proves from now on, in this process."""
    proved, prove = [], Renderer._prove

    def counting(self: Renderer, example: Example, *arguments: Any, **named: Any) -> None:
        if self is renderer:
            proved.append(example)
        prove(self, example, *arguments, **named)

    monkeypatch.setattr(Renderer, "_prove", counting)
    return proved


def test_each_worker_saves_more_than_its_start_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert num_workers(2 * START_SECONDS) == 0  # two workers would be done at the same time as one process
    assert num_workers(2.1 * START_SECONDS) == 2
    for seconds in np.geomspace(2.1, 1_000, 50) * START_SECONDS:
        number = num_workers(seconds)
        assert seconds / (number - 1) - seconds / number > START_SECONDS
        assert number == MAX_WORKERS or seconds / number - seconds / (number + 1) <= START_SECONDS


def test_what_rows_cost_decides_and_not_how_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    assert num_workers(10_000 * 0.0003) == 0  # short rows
    assert num_workers(1_000 * 0.027) == 2  # rows that give an example a turn
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    assert num_workers(1e6) == 0
