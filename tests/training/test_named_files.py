"""What a config names and is not there is told at once: all of it, without torch, and before there is a run folder."""

import subprocess
import sys
from pathlib import Path

import pytest

import train
from chatlora.config import Config
from chatlora.errors import ConfigError
from chatlora.training.named_files import refuse_missing_files

REPOSITORY = Path(__file__).resolve().parents[2]
MISSING = {
    "data.train": "nowhere/rows.jsonl",
    "data.validation": "rwos.jsonl",
    "data.test": "*.csv",
    "model.name_or_path": "./modle",
    "model.chat_template": "own.jinja",
    "lora.init_from": "model",
}


def test_all_that_is_missing_is_told_at_once_and_leaves_no_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    flags = [word for setting, value in MISSING.items() for word in (f"--{setting}", value)]
    with pytest.raises(ConfigError) as caught:
        train.main([str(world / "my.yaml"), *flags, "--run.output_dir", str(tmp_path / "run")])
    assert [problem.split(": ")[0] for problem in caught.value.problems] == list(MISSING)
    assert "did you mean 'rows.jsonl'?" in caught.value.problems[1]
    assert "did you mean 'model'?" in caught.value.problems[3]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["data.train", "model.name_or_path", "model.chat_template", "lora.init_from"])
def test_a_name_that_no_file_can_have_is_told(setting: str) -> None:
    section, _, name = setting.partition(".")
    with pytest.raises(ConfigError, match=rf"{setting}: .*: File name too long"):
        refuse_missing_files(Config.model_validate({section: {name: "./" + "a" * 300}}))


def test_a_folder_in_place_of_a_template_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name the file in it"):
        refuse_missing_files(Config.model_validate({"model": {"chat_template": str(tmp_path)}}))


def test_torch_is_not_imported_for_it(world: Path) -> None:
    code = (
        "import sys, train\nfrom chatlora.errors import ConfigError\n"
        f"try: train.main(['{world}/my.yaml', '--data.train', 'none.jsonl'])\n"
        "except ConfigError: sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.train", "owner/name"),
        ("data.train", "embedded:demo/train.jsonl"),
        ("model.name_or_path", "owner/model"),
        ("model.name_or_path", "embedded:smollm2-135m-instruct"),
    ],
)
def test_what_the_hub_or_the_package_has_is_not_missing(
    setting: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    section, _, name = setting.partition(".")
    refuse_missing_files(Config.model_validate({section: {name: value}}))


def test_a_home_folder_is_meant_by_a_tilde(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world))
    refuse_missing_files(
        Config.model_validate({"data": {"train": "~/rows.jsonl"}, "model": {"name_or_path": "~/model"}})
    )
