"""Suspicious rows: each number is a plain loop's, and rows that were spoilt come first."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatlora.commands import dispatch
from chatlora.config_files import config_from_file
from chatlora.distributed.runtime import start
from chatlora.distributed.signals import StopSignals
from chatlora.errors import ConfigError
from chatlora.inspection.prepare import inspected
from chatlora.inspection.suspects import RowLosses, most_suspicious, suspicion
from chatlora.model.loading import load_adapter, load_base_model
from chatlora.rendering.examples import Example
from chatlora.training.row_losses import Measure, others_of, row_losses, rows_trained_on, with_prompt_of

Run = Callable[..., Path]


def losses_of(loss: np.ndarray, swapped: np.ndarray, count: np.ndarray, source: np.ndarray | None = None) -> RowLosses:
    squares = count * (loss**2 + 0.5)  # tokens deviate by 0.7 within a row
    return RowLosses(
        np.zeros(len(loss), int) if source is None else source, count, loss * count, swapped * count, squares
    )


def drawn(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(1.0, 0.1, rows), draw.normal(3.0, 0.1, rows), np.full(rows, 30)


def test_a_reply_that_its_prompt_does_not_help_comes_first_whatever_its_loss() -> None:
    loss, swapped, count = drawn(200)
    loss[7] = swapped[7] = 1.2  # a reply of another prompt, likely by itself
    loss[8] = swapped[8] = 5.0  # garbled
    assert most_suspicious(suspicion(losses_of(loss, swapped, count)), 2) == [8, 7]
    blind = suspicion(losses_of(loss, loss * 3, count))  # all prompts alike: the likely one is one of many
    assert most_suspicious(blind, 2)[1] != 7


def test_a_row_is_compared_with_its_own_source() -> None:
    loss, base, count = drawn(200)
    source = np.repeat([0, 1], 100)
    loss[100:] += 2  # a harder source
    loss[7] = 1.9
    assert most_suspicious(suspicion(losses_of(loss, base, count, source)), 1) == [7]
    assert most_suspicious(suspicion(losses_of(loss, base, count)), 1) != [7]  # without, the harder source comes first


def test_few_targets_need_to_stand_out_further() -> None:
    loss, base, count = drawn(200)
    loss[7], loss[8] = 1.7, 1.7
    count[8] = 2
    found = suspicion(losses_of(loss, base, count))
    assert found.score[7] > 2 * found.score[8] > 0


def test_rows_of_small_sources_are_taken_together_and_equal_rows_divide_by_nothing() -> None:
    loss, base, count = drawn(30)
    loss[3] = 2.0
    found = suspicion(losses_of(loss, base, count, np.arange(30)))
    assert most_suspicious(found, 1) == [3]
    ones = np.ones(30)
    assert np.isfinite(suspicion(losses_of(ones, ones, ones)).score).all()


@pytest.mark.parametrize("padded", [False, True])
def test_the_sums_of_rows_are_a_plain_loops(run: Run, padded: bool) -> None:
    folder = run("--optim.max_steps", "4", "--data.validation", "0.2")
    config = config_from_file(folder / "config.yaml")
    with StopSignals() as signals:
        runtime = start(config, signals)
    found = inspected(config, print)
    base = load_base_model(config.model, dtype=torch.float32)
    model = load_adapter(base, folder / "adapter")
    examples, row_of = rows_trained_on(found)
    assert len(examples) == len(found.data.train)
    numbers, rows = np.unique(row_of, return_inverse=True)
    all_of_them = examples.fetch(range(len(examples)))
    plain = [_plain(model, example) for example in all_of_them]
    behind = np.zeros(len(numbers))
    for others in others_of(np.zeros(len(examples), int)):
        for number, other in enumerate(others):
            assert rows[number] != rows[other]
            first = next(i for i, label in enumerate(all_of_them[other].labels) if label != -100)
            own = next(i for i, label in enumerate(all_of_them[number].labels) if label != -100)
            ids = all_of_them[other].input_ids[:first] + all_of_them[number].input_ids[own:]
            labels = [-100] * first + all_of_them[number].labels[own:]
            behind[rows[number]] += sum(_plain(model, Example(ids, labels))) / 2
    with model.disable_adapter():
        base_losses = [_plain(model, each) for each in all_of_them[:3]]
    measure = Measure(model, config, runtime, examples, padded)  # its attention is for packed rows only
    got = row_losses(measure, rows, np.zeros(len(numbers), int))
    for row in range(len(numbers)):
        losses = np.asarray([each for number, of in enumerate(plain) if rows[number] == row for each in of])
        assert got.count[row] == len(losses)
        assert (got.adapter[row], got.swapped[row]) == pytest.approx((losses.sum(), behind[row]), rel=1e-4)
        assert got.squares[row] == pytest.approx((losses**2).sum(), rel=1e-4)
    assert np.abs(got.adapter - got.swapped).min() > 1e-3  # one measured for the other would be seen
    assert measure.under_base(all_of_them[:3]) == [pytest.approx(losses, rel=1e-3) for losses in base_losses]


def _plain(model: Any, example: Example) -> list[float]:
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([example.input_ids])).logits[0].float().log_softmax(-1)
    return [-float(logs[i - 1, label]) for i, label in enumerate(example.labels) if i and label != -100]


def test_an_exchanged_prompt_keeps_its_end_where_it_is_too_long() -> None:
    other, own = Example([1, 2, 3, 4, 9], [-100] * 4 + [9]), Example([5, 6, 7, 8], [-100, -100, 7, 8])
    assert with_prompt_of(other, own, 100) == Example([1, 2, 3, 4, 7, 8], [-100] * 4 + [7, 8])
    assert with_prompt_of(other, own, 4) == Example([3, 4, 7, 8], [-100, -100, 7, 8])


def test_the_command_names_spoilt_rows_with_place_and_tokens(
    run: Run, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    spoilt = json.loads(rows[10])
    spoilt["messages"][1]["content"] = "qX#\x1b[31m zz %% [bold]"
    rows[10] = json.dumps(spoilt)
    (tmp_path / "spoilt.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    flags = ["--data.train", "spoilt.jsonl", "--data.validation", "0", "--optim.learning_rate", "0.01"]
    folder = run(*flags)
    capsys.readouterr()
    dispatch(["suspects", str(folder), "--top", "5"])
    told = capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "suspects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 5
    first = records[0]
    assert first["place"].endswith("spoilt.jsonl:11")
    assert first["suspicion"] > records[1]["suspicion"] > records[4]["suspicion"]
    assert first["loss"] > first["usual_loss"]
    worst = [token["loss"] for token in first["worst_tokens"]]
    assert worst == sorted(worst, reverse=True)
    assert len(worst) == 5
    assert "\x1b" not in told
    (tmp_path / "spoilt.jsonl").write_text("\n".join(rows[1:]) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.train or data.validation changed since"):
        dispatch(["suspects", str(folder)])
    with pytest.raises(ConfigError, match="is no run directory"):
        dispatch(["suspects", str(tmp_path)])


SPOILT = 20
SPOILT_YAML = """\
model: {name_or_path: embedded:smollm2-135m-instruct}
data: {train: rows.jsonl, validation: 0, max_length: 256}
optim: {max_steps: 50, global_batch_size: 16, learning_rate: 2.0e-3}
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])  # the ranking was chosen on the first draw, not on the second
def test_twenty_spoilt_rows_of_two_thousand_are_in_the_first_forty(
    shared: Path,
    smollm2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: Callable[[str], None],
    seed: int,
) -> None:
    """Restaurants of e2e: replies of other rows, replies in Chinese, and replies whose letters are mixed up."""
    import train

    draw = random.Random(seed)
    lines = (shared / "data" / "e2e.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in draw.sample(lines, 2_000)]
    spoilt = draw.sample(range(2_000), SPOILT)
    for number, row in enumerate(spoilt):
        rows[row]["completion"] = _spoil(rows, row, number % 3, shared, draw)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "my.yaml").write_text(SPOILT_YAML)
    monkeypatch.chdir(tmp_path)
    train.main(["my.yaml", "--run.output_dir", "run"])
    dispatch(["suspects", "run", "--top", "40"])
    records = [json.loads(line) for line in (tmp_path / "run" / "suspects.jsonl").read_text("utf-8").splitlines()]
    named = [int(record["place"].rpartition(":")[2]) - 1 for record in records]
    found = set(named) & set(spoilt)
    last = 1 + max((position for position, row in enumerate(named) if row in found), default=-1)
    count(f"{len(found)} of {SPOILT} spoilt rows are among the first 40 of 2,000, the last of them at {last}")
    assert found == set(spoilt)


def _spoil(rows: list[dict[str, str]], row: int, way: int, shared: Path, draw: random.Random) -> str:
    prompt, reply = rows[row]["prompt"], rows[row]["completion"]
    if way == 0:  # of another place
        name = prompt[: prompt.index("]")]
        return draw.choice([other["completion"] for other in rows if not other["prompt"].startswith(name)])
    if way == 1:
        talks = (shared / "data" / "kdconv_travel.jsonl").read_text(encoding="utf-8").splitlines()
        turns = [turn for turn in json.loads(draw.choice(talks))["conversations"] if turn["role"] == "assistant"]
        return str(draw.choice(turns)["content"])
    letters = list(reply)
    draw.shuffle(letters)
    return "".join(letters)
