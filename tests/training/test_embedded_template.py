"""A run with a chat template of the package: what its adapter carries, and what later versions of it alter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import evaluate
from chatlora.config import Config
from chatlora.errors import ConfigError, DataError
from chatlora.rendering import embedded
from chatlora.rendering.thoughts import PUT
from chatlora.training.named_files import refuse_missing_files
from tests.tiny_models import CHATML

Run = Callable[..., Path]
COMPLETED = ("--model.chat_template", "embedded:completed")


@pytest.fixture
def thoughtful(tmp_path: Path) -> tuple[str, ...]:
    """Rows with thoughts, for which the world's ChatML template has no place."""
    rows = tmp_path / "thoughtful.jsonl"
    messages = [
        {"role": "user", "content": "Where is Oslo?"},
        {"role": "assistant", "content": "In Norway.", "reasoning_content": "A map helps."},
    ]
    rows.write_text(f"{json.dumps({'messages': messages})}\n" * 4, "utf-8")
    return ("--data.train", str(rows), "--data.validation", "0", "--data.test", str(rows), "--optim.max_steps", "1")


def changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version of the package might have it."""
    text = embedded._text
    monkeypatch.setattr(embedded, "_text", lambda file: text(file).replace("</think>\\n\\n", "</think>\\n"))


def references(folder: Path) -> list[str]:
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["reference"] for line in lines]


def test_a_refused_source_names_the_template_that_renders_it(run: Run, thoughtful: tuple[str, ...]) -> None:
    told = r"4 x the chat template drops reasoning .*; take model\.chat_template embedded:completed, which renders all"
    with pytest.raises(DataError, match=told):
        run(*thoughtful, "--data.reasoning", "field")


def test_thoughts_are_trained_and_asked_for_in_the_text(run: Run, thoughtful: tuple[str, ...]) -> None:
    folder = run(*thoughtful)
    assert json.loads((folder / "ledger.json").read_text("utf-8"))["sources"][0]["altered"] == {PUT: 4}
    evaluate.main([str(folder), "--evaluation.max_new_tokens", "1"])
    assert references(folder / "eval" / "test")[0].startswith("<think>\nA map helps.\n</think>\n\nIn Norway.")
    out = ["--data.reasoning", "drop", "--output_dir", "dropped"]
    evaluate.main([str(folder), "--evaluation.max_new_tokens", "1", *out])
    assert references(Path("dropped"))[0].startswith("In Norway.")


def test_the_adapter_carries_the_template_that_trained_it(
    run: Run, thoughtful: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = run(*thoughtful, *COMPLETED)
    carried = (folder / "adapter" / "chat_template.jinja").read_text("utf-8")
    assert carried == embedded.behind(["thoughts", "tools"], CHATML)
    changed(monkeypatch)
    brief = ["--evaluation.max_new_tokens", "1"]
    evaluate.main([str(folder), *brief])
    assert references(folder / "eval" / "test")[0].startswith("<think>\nA map helps.\n</think>\n\nIn Norway.")
    evaluate.main([str(folder), *brief, *COMPLETED, "--output_dir", "asked"])  # by its name, it is the package's now
    assert references(tmp_path / "asked")[0].startswith("<think>\nA map helps.\n</think>\nIn Norway.")


def test_a_run_is_evaluated_without_the_file_that_its_template_came_from(
    run: Run, thoughtful: tuple[str, ...], tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(embedded.behind(["thoughts"], CHATML), "utf-8")
    folder = run(*thoughtful, "--model.chat_template", str(own))
    own.unlink()
    evaluate.main([str(folder), "--evaluation.max_new_tokens", "1"])
    assert references(folder / "eval" / "test")[0].startswith("<think>\nA map helps.\n</think>")


def test_a_run_does_not_go_on_with_a_changed_template(
    run: Run, thoughtful: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(*thoughtful, *COMPLETED)
    run(*thoughtful, *COMPLETED)  # finished: it says so
    changed(monkeypatch)
    with pytest.raises(ConfigError, match=r"the contents of model\.chat_template changed"):
        run(*thoughtful, *COMPLETED)
    (folder / "adapter" / "adapter_config.json").unlink()  # killed while it put its adapter away
    with pytest.raises(ConfigError, match=r"chat template.* changed since the run in run was begun"):
        run(*thoughtful, *COMPLETED)


def test_a_name_that_the_package_does_not_have_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"model\.chat_template: .* 'complete'; did you mean 'completed'\?"):
        refuse_missing_files(Config.model_validate({"model": {"chat_template": "embedded:complete"}}))
