"""The same command once more: what a finished run says, what it refuses, what it makes good."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from chatlora.config_files import config_from_file
from chatlora.errors import ConfigError, DataError
from chatlora.run_directory import read_status
from chatlora.scripts import load_script
from tests.runs import noted

evaluate = load_script("evaluate")  # as train.main has it
Run = Callable[..., Path]
SHORT = ("--optim.max_steps", "1", "--data.validation", "0")


def own_rows(world: Path, name: str, count: int = 72) -> None:
    lines = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path(name).write_text("".join(lines[:count]), encoding="utf-8")


def test_other_rows_under_the_same_path_are_refused_by_name(world: Path, run: Run) -> None:
    own_rows(world, "own.jsonl")
    run(*SHORT, "--data.train", "own.jsonl")
    own_rows(world, "own.jsonl", 60)
    with pytest.raises(ConfigError, match=r"the contents of data\.train changed since the run in run was finished"):
        run(*SHORT, "--data.train", "own.jsonl")
    own_rows(world, "own.jsonl")
    run(*SHORT, "--data.train", "own.jsonl")


def test_another_template_under_the_same_path_is_refused_by_name(world: Path, run: Run) -> None:
    shutil.copy(world / "model" / "chat_template.jinja", "own.jinja")
    run(*SHORT, "--model.chat_template", "own.jinja")
    with Path("own.jinja").open("a") as file:
        file.write("{# another #}")
    with pytest.raises(ConfigError, match=r"the contents of model\.chat_template changed"):
        run(*SHORT, "--model.chat_template", "own.jinja")


def test_a_lost_adapter_is_exported_again(run: Run) -> None:
    folder = run(*SHORT)
    before, log = load_file(folder / "adapter" / "adapter_model.safetensors"), (folder / "log.jsonl").read_bytes()
    shutil.rmtree(folder / "adapter")
    run(*SHORT)
    after = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert (folder / "log.jsonl").read_bytes() == log
    assert read_status(folder)["state"] == "done"


def test_a_finished_run_is_finished_by_its_adapter(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    free = ("--optim.schedule", "constant", "--optim.warmup_ratio", "0", "--data.validation", "0")
    folder = run(*free, "--optim.max_steps", "1")
    shutil.rmtree(folder / "checkpoints")
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    run(*free, "--optim.max_steps", "1")
    assert "run is finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"lora\.rank is 2, but the run in run was begun with 4"):
        run(*free, "--optim.max_steps", "1", "--lora.rank", "2")
    with pytest.raises(ConfigError, match=r"without its checkpoints it cannot go on.* --run\.output_dir"):
        run(*free, "--optim.max_steps", "2")
    with pytest.raises(ConfigError, match="resume is never, but run holds a finished run"):
        run(*free, "--optim.max_steps", "1", "--checkpoint.resume", "never")
    assert {path: path.read_bytes() for path in left} == left
    assert not (folder / "checkpoints").exists()


def test_an_attempt_that_was_not_accepted_leaves_a_finished_run_done(run: Run) -> None:
    longer = ("--optim.schedule", "constant", "--optim.warmup_ratio", "0", "--data.validation", "0")
    folder = run(*longer, "--optim.max_steps", "1")
    done = read_status(folder)
    Path("bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        run(*longer, "--optim.max_steps", "2", "--evaluation.after_training", "true", "--data.test", "bad.jsonl")
    assert read_status(folder) == done
    run(*longer, "--optim.max_steps", "1")
    run(*longer, "--optim.max_steps", "2")
    assert read_status(folder)["step"] == 2


def test_a_finished_run_without_its_log_still_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(*SHORT)
    (folder / "log.jsonl").write_text("")
    run(*SHORT)
    assert "is finished: log.jsonl is missing or empty" in capsys.readouterr().out


def test_the_share_of_the_proof_is_told_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(*SHORT)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "to prove the targets exact" in line]
    assert re.fullmatch(r"rendering took [\d.]+ s of work when it was done, [1-9]\d?% of it to prove .*", line)


def test_an_empty_config_is_told_as_such(run: Run) -> None:
    folder = run(*SHORT)
    (folder / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml is empty"):
        run(*SHORT)


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_place_of_the_run_directory_is_told(run: Run, below: str) -> None:
    Path("file").touch()
    with pytest.raises(ConfigError, match=r"run\.output_dir is file.*where no run can be written"):
        run(*SHORT, name=f"file{below}")


def test_a_run_is_known_from_another_folder(
    world: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_rows(world, "own.jsonl")
    (tmp_path / "base").symlink_to(world / "model")
    flags = (*SHORT, "--data.train", "own.jsonl", "--model.name_or_path", "base")
    folder = run(*flags)
    config = config_from_file(folder / "config.yaml")
    assert config.model.name_or_path == str(tmp_path / "base")
    assert config.data.train[0].path == str(tmp_path / "own.jsonl")
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    run(*flags)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    evaluate.main([str(folder), "--data", str(world / "rows.jsonl"), "--evaluation.max_new_tokens", "1"])
    assert "is finished" in capsys.readouterr().out


def test_test_rows_are_looked_at_before_training(run: Run) -> None:
    Path("bad.jsonl").write_text('{"messages": [{"role": "asistant", "content": "x"}]}\n')
    for name, sentence in {"none.jsonl": "no such file", "bad.jsonl": "did you mean 'assistant'"}.items():
        with pytest.raises((ConfigError, DataError), match=sentence):
            run(*SHORT, "--evaluation.after_training", "true", "--data.test", name)
    assert not Path("run/log.jsonl").exists()


def test_scores_are_made_once_and_anew_for_what_is_new(
    world: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_rows(world, "test.jsonl", 4)
    flags = (*SHORT, "--evaluation.after_training", "true", "--data.test", "test.jsonl", "--evaluation.max_new_tokens")
    passes: list[Any] = []
    generate = evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda *given: generate(*noted(passes, given)))
    folder = run(*flags, "2")
    assert len(passes) == 2, "base and adapter"
    capsys.readouterr()
    run(*flags, "2")
    assert len(passes) == 2
    assert "rouge-l" in capsys.readouterr().out
    run(*flags, "3")
    assert len(passes) == 4
    assert json.loads((folder / "eval/test/scores.json").read_text())["decoding"]["max_new_tokens"] == 3
    own_rows(world, "test.jsonl", 5)
    run(*flags, "3")
    assert len(passes) == 6
