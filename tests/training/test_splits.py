"""Rows that are not trained on: held out by a share and scored afterwards, validated in sets with names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import train
from chatlora.data.held_out import HELD_OUT
from chatlora.errors import ConfigError, DataError
from chatlora.run_directory import RunDirectory, read_status
from chatlora.run_log import VALIDATION, read_log
from chatlora.scripts import load_script
from tests.fork_server import At, ForkServer
from tests.runs import noted

evaluate = load_script("evaluate")  # as train.main has it

Run = Callable[..., Path]
SHORT = ("--optim.max_steps", "1", "--evaluation.max_new_tokens", "1")
SHARES = (*SHORT, "--data.validation", "0.1", "--data.test", "0.2")
EPOCH = ("--optim.epochs", "1", "--checkpoint.every_steps", "2")
TOLERANCE = 1e-6  # relative, of losses


def own_rows(world: Path, name: str, number: int) -> str:
    """The first `number` rows of the world, as a file of this test's own. Returns its name."""
    lines = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path(name).write_text("".join(lines[:number]), encoding="utf-8")
    return name


def places(folder: Path, split: str) -> set[str]:
    """Where the rows stand that a run says it held out."""
    return {place for source in json.loads((folder / HELD_OUT).read_text())[split] for place in source["places"]}


def evaluated(folder: Path, split: str) -> list[str]:
    """The ids of the samples that were evaluated."""
    lines = (folder / "eval" / split / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["id"] for line in lines]


# ---- held out by a share


def test_rows_held_out_are_never_trained_on_and_are_what_is_evaluated(
    run: Run, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, seen = train.train, list[Any]()
    monkeypatch.setattr(train, "train", lambda *given: loop(*noted(seen, given)))
    folder = run(*SHARES)
    (*_, loader, validation) = seen[0]
    trained, validated = (
        set(each.examples.places(range(len(each.examples)))) for each in (loader, validation["validation"])
    )
    assert all((trained, validated, places(folder, "test")))
    assert places(folder, "validation") == validated
    assert trained | validated | places(folder, "test") == {f"{world}/rows.jsonl:{line}" for line in range(1, 73)}
    for split in ("test", "validation"):
        evaluate.main([str(folder), "--split", split])
        samples = evaluated(folder, split)
        assert {sample.rpartition("#")[0] for sample in samples} == places(folder, split)
        turns = sum(1 + (int(place.rpartition(":")[2]) - 1) % 3 for place in places(folder, split))
        assert len(samples) == len(set(samples)) == turns


def test_a_test_share_is_evaluated_after_training_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, passes = evaluate.generate, list[Any]()
    monkeypatch.setattr(evaluate, "generate", lambda *given: generate(*noted(passes, given)))
    for _ in range(2):  # trained, then found finished
        folder = run(*SHARES, "--evaluation.after_training", "true")
        assert "rouge-l" in capsys.readouterr().out
        assert {sample.rpartition("#")[0] for sample in evaluated(folder, "test")} == places(folder, "test")
    assert len(passes) == 2, "base and adapter"


def test_a_share_of_too_few_rows_leaves_nothing_to_evaluate(
    run: Run, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--data.train", own_rows(world, "few.jsonl", 49), "--evaluation.after_training", "true")
    for _ in range(2):
        folder = run(*SHARES, *few)
        assert read_status(folder)["state"] == "done"
    told = capsys.readouterr().err
    assert "data.test: no rows are held out, there are only 49" in told
    assert "evaluation.after_training: there will be none" in told
    with pytest.raises(ConfigError, match=r"data\.test held out no rows, since there were too few: give rows"):
        evaluate.main([str(folder)])


def test_a_source_that_was_moved_or_changed_is_refused_by_name(run: Run, world: Path) -> None:
    own_rows(world, "rows.jsonl", 72)
    folder = run("--data.train", "rows.jsonl", *SHARES)
    path = Path("rows.jsonl").absolute()
    whole = path.read_text(encoding="utf-8")
    for split in ("test", "validation"):
        path.write_text(whole.replace("Oslo", "Riga"), encoding="utf-8")
        with pytest.raises(DataError, match=rf"{path}: its contents changed since .*run held out rows of it"):
            evaluate.main([str(folder), "--split", split])
        path.rename("elsewhere.jsonl")
        with pytest.raises(DataError, match=rf"{path}: no such file(.|\n)*put back what the rows of data\.{split}"):
            evaluate.main([str(folder), "--split", split])
    path.write_text(whole, encoding="utf-8")
    (folder / HELD_OUT).unlink()
    with pytest.raises(ConfigError, match=r"held_out\.json does not say which rows are held out"):
        evaluate.main([str(folder)])


# ---- sets with names


def sets_of(world: Path) -> dict[str, str]:
    own_rows(world, "long.jsonl", 30)
    Path("short.jsonl").write_text("".join(Path("long.jsonl").read_text().splitlines(keepends=True)[::3]))
    return {"long": "long.jsonl", "short": "short.jsonl"}


def test_losses_of_named_sets_are_those_of_each_alone_and_their_mean_is_over_all_targets(
    run: Run, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = sets_of(world)
    named = ("--data.validation", json.dumps(sets))
    together = read_log(run(*EPOCH, *named, name="together") / VALIDATION)
    told = capsys.readouterr().err
    assert "validation set long: 30 rows" in told
    assert "what is best goes by the mean over all their targets" in told
    first = read_log(run(*EPOCH, *named, "--checkpoint.best_by", "first", name="first") / VALIDATION)
    runs = {name: run(*EPOCH, "--data.validation", path, name=name) for name, path in sets.items()}
    alone = {name: read_log(folder / VALIDATION) for name, folder in runs.items()}
    assert len(together) == len(alone["long"]) > 1
    for number, line in enumerate(together):
        each = {name: log[number] for name, log in alone.items()}
        assert list(line["sets"]) == list(sets)
        for name, other in each.items():
            assert other.keys() == {"step", "loss", "num_targets"}
            assert line["sets"][name]["num_targets"] == other["num_targets"]
            assert line["sets"][name]["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert line["num_targets"] == sum(other["num_targets"] for other in each.values())
        total = sum(other["loss"] * other["num_targets"] for other in each.values())
        assert line["loss"] == pytest.approx(total / line["num_targets"], rel=TOLERANCE)
        assert line["loss"] != pytest.approx(sum(other["loss"] for other in each.values()) / 2, rel=TOLERANCE)
        assert first[number] == line | {"loss": line["sets"]["long"]["loss"]}
        shown = ", ".join(f"{name} {values['loss']:.4f}" for name, values in line["sets"].items())
        assert f"step {line['step']}: validation loss {line['loss']:.4f}" in told
        assert shown in told


@pytest.mark.parametrize(("best_by", "best"), [("first", 2), ("mean", 1)])
def test_the_best_step_and_early_stopping_go_by_the_first_set_or_by_the_mean(
    tmp_path: Path, best_by: Any, best: int
) -> None:
    run = RunDirectory(tmp_path, lock=FileLock(tmp_path / ".lock"), peak_memory=lambda: 0)
    for step, (first, second) in enumerate([(10.0, 30.0), (9.0, 90.0), (11.0, 60.0)], start=1):
        run.log_validation(step, {"a": (first, 10), "b": (second, 20)}, best_by)
    assert run.best_step() == best
    assert [run.has_stalled(patience) for patience in (1, 2, 3)] == [True, best == 1, False]


def test_two_processes_hold_out_the_same_rows_and_log_the_same_sets(
    server: ForkServer, world: Path, tmp_path: Path, run: Run
) -> None:
    argv = [str(world / "my.yaml"), *EPOCH, "--data.test", "0.2", "--lora.dropout", "0"]
    paths = {name: str(Path(path).absolute()) for name, path in sets_of(world).items()}
    sets = ["--data.validation", json.dumps(paths)]
    logs: dict[int, list[dict[str, Any]]] = {}
    kept: dict[int, list[str]] = {}
    for ranks in (1, 2):
        for name, flags in {"shares": [], "sets": sets}.items():
            folder = tmp_path / f"{name}-{ranks}"
            assert server.run([*argv, *flags, "--run.output_dir", str(folder)], tmp_path, ranks=ranks) == [0] * ranks
            kept.setdefault(ranks, []).append((folder / HELD_OUT).read_text())
        logs[ranks] = read_log(folder / VALIDATION)
    assert kept[1] == kept[2]
    for one, two in zip(logs[1], logs[2], strict=True):
        assert one["num_targets"] == two["num_targets"]
        for name, values in one["sets"].items():
            assert two["sets"][name]["num_targets"] == values["num_targets"]
            assert two["sets"][name]["loss"] == pytest.approx(values["loss"], rel=1e-5)


def test_a_signal_between_two_sets_saves_first_and_both_are_validated_in_the_end(
    server: ForkServer, world: Path, tmp_path: Path, run: Run
) -> None:
    paths = {name: str(Path(path).absolute()) for name, path in sets_of(world).items()}
    argv = [str(world / "my.yaml"), *EPOCH, "--data.validation", json.dumps(paths), "--run.output_dir"]
    assert server.run([*argv, "whole"], tmp_path, ranks=2) == [0, 0]
    lots = At("SIGTERM", "chatlora.data.loader:Loader.in_order", 4)  # the second set of the second validation
    assert server.run([*argv, "cut"], tmp_path, ranks=2, at=lots) == [75, 75]
    assert [line["step"] for line in read_log(tmp_path / "cut" / VALIDATION)] == [2]
    assert server.run([*argv, "cut"], tmp_path, ranks=2) == [0, 0]
    assert (tmp_path / "cut" / VALIDATION).read_bytes() == (tmp_path / "whole" / VALIDATION).read_bytes()
