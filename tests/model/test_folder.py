"""A folder that is no whole model is told by what is missing or broken in it, with what to copy there."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chatlora.config import ModelConfig
from chatlora.errors import ModelError
from chatlora.model.folder import find_adapter, refuse_no_model
from chatlora.model.loading import load_base_model, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def told(world: Path, tmp_path: Path) -> Callable[..., str]:
    """`told(remove, write)`: what is said of the world's model without some files, and with others written over."""

    def load_from(*removed: str, **written: str | bytes) -> str:
        folder = tmp_path / "model"
        shutil.copytree(world / "model", folder)
        for name in removed:
            (folder / name).unlink()
        for stem, content in written.items():
            (path,) = folder.glob(f"{stem}.*")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        model = ModelConfig(name_or_path=str(folder))
        try:
            load_tokenizer(model)
            load_base_model(model, dtype=torch.float32)
        except ModelError as error:
            return str(error)
        pytest.fail("nothing was said")

    return load_from


def test_a_folder_without_tokenizer(told: Callable[..., str]) -> None:
    sentence = told("tokenizer.json")
    assert "holds no tokenizer: none of tokenizer.json, " in sentence
    assert "Copy tokenizer.json and tokenizer_config.json" in sentence
    assert "sentencepiece" not in sentence


def test_a_folder_without_config(told: Callable[..., str]) -> None:
    assert "config.json is not there" in told("config.json")


def test_a_folder_without_weights(told: Callable[..., str]) -> None:
    assert "holds no weights: model.safetensors, or model.safetensors.index.json" in told("model.safetensors")


@pytest.mark.parametrize("stem", ["model", "tokenizer"])
def test_what_git_left_without_lfs(told: Callable[..., str], stem: str) -> None:
    sentence = told(**{stem: POINTER})
    assert f"holds Git LFS pointers in place of {stem}." in sentence
    assert "git lfs pull" in sentence


@pytest.mark.parametrize("stem", ["config", "tokenizer"])
def test_settings_that_were_cut_off(told: Callable[..., str], stem: str) -> None:
    sentence = told(**{stem: "{"})
    assert f"model/{stem}.json cannot be read (" in sentence
    assert "copy it again" in sentence


def test_weights_that_were_cut_off(told: Callable[..., str], world: Path) -> None:
    assert "copy or download it again" in told(model=(world / "model" / "model.safetensors").read_bytes()[:5000])


def test_a_folder_with_pickled_weights(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights only.*save_pretrained"):
        load_base_model(ModelConfig(name_or_path=str(tmp_path / "model")), dtype=torch.float32)


@pytest.mark.parametrize("text", ["{oops", "[]", ""])
def test_an_adapters_settings_that_are_broken(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").touch()
    for look in (lambda: find_adapter(tmp_path), lambda: refuse_no_model(ModelConfig(name_or_path=str(tmp_path)))):
        with pytest.raises(ModelError, match=r"adapter_config\.json .*copy the adapter's folder again"):
            look()
