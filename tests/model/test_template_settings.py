"""An adapter brings what its chat template was told in training, and the revision of its base."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import evaluate
from chatlora.config import DataConfig, ModelConfig
from chatlora.errors import ModelError
from chatlora.model.adapter_folder import SETTINGS, as_adapter_was_trained, save_template_settings
from chatlora.model.loading import renderer_for
from chatlora.reading.formats import parse_row
from tests.tiny_models import CHATML
from tests.tiny_tokenizers import QWEN3, THINK_TOKENS, tiny_tokenizer

TOLD = "{{ greeting | default('nothing') }} on {{ strftime_now('%Y-%m-%d') }}\n" + CHATML


def test_settings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": "owner/model", "revision": "v2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model = ModelConfig(name_or_path="owner/model")
    assert as_adapter_was_trained(model, tmp_path) == ModelConfig(name_or_path="owner/model", revision="v2")
    other = ModelConfig(name_or_path="owner/other")
    assert as_adapter_was_trained(other, tmp_path) == other
    save_template_settings(tmp_path, {"tone": "kühl"}, date(2024, 2, 29))
    told = as_adapter_was_trained(other, tmp_path)
    assert (told.chat_template_kwargs, told.chat_template_date) == ({"tone": "kühl"}, date(2024, 2, 29))
    (tmp_path / SETTINGS).write_text('{"chat_template_date": "soon"}')
    with pytest.raises(ModelError, match=r"chatlora\.json cannot be used.*chat_template_date"):
        as_adapter_was_trained(other, tmp_path)
    (tmp_path / SETTINGS).write_text('{"chat_template_kwargs": {}, "name_or_path": "owner/third"}')
    with pytest.raises(ModelError, match=r"cannot be used: name_or_path is none of chat_template_kwargs, "):
        as_adapter_was_trained(other, tmp_path)


def test_the_rows_settings_reach_the_renderer(tmp_path: Path) -> None:
    tokenizer, model = (
        tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS),
        ModelConfig(name_or_path=str(tmp_path)),
    )
    row = parse_row({"prompt": "<think>", "completion": "<think>\na\n</think>\n\nb"})

    def told(**data: Any) -> tuple[dict[str, Any], tuple[str, int]]:
        renderer = renderer_for(tokenizer, model, DataConfig(**data), any_reasoning=True)
        [example] = renderer.render(row, max_length=999).examples
        tags = tokenizer.convert_tokens_to_ids(list(THINK_TOKENS))
        said = tokenizer.decode(example.input_ids)
        return renderer.chat_template_kwargs, (
            "thought" if "a\n" in said else "none",
            sum(id in tags for id in example.input_ids),
        )

    assert told() == told(reasoning="field") == ({}, ("thought", 2))
    assert told(reasoning="text") == ({}, ("thought", 4))  # behind the empty one that this template writes
    assert told(control_text="token") == ({}, ("thought", 3))
    assert told(reasoning="drop") == ({"enable_thinking": False}, ("none", 2))  # no thought is left to make room for


def test_an_adapter_by_itself_is_prompted_as_its_run_was(run: Callable[..., Path], world: Path, tmp_path: Path) -> None:
    (tmp_path / "told.jinja").write_text(TOLD)
    folder = run(
        *("--model.chat_template", str(tmp_path / "told.jinja"), "--model.chat_template_kwargs", "{greeting: hello}"),
        *("--model.chat_template_date", "2020-01-02", "--model.revision", "v2", "--optim.max_steps", "1"),
    )
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["revision"] == "v2"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((world / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)[:2]), "utf-8")
    words = ["--model", str(world / "model"), "--adapter", str(folder / "adapter"), "--data", str(rows)]
    evaluate.main([*words, "--evaluation.max_new_tokens", "1", "--output_dir", "out"])
    lines = (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert lines
    assert all(json.loads(line)["prompt"].startswith("hello on 2020-01-02\n") for line in lines)
    flags = ["--model.chat_template_kwargs", "{greeting: bye}", "--evaluation.max_new_tokens", "1"]
    evaluate.main([*words, *flags, "--output_dir", "other"])
    assert '"bye on 2020-01-02' in (tmp_path / "other" / "predictions.jsonl").read_text("utf-8")
