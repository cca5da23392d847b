"""Whether a run directory is gone on with: every setting is either free to change or refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatlora.config import FREE_SETTINGS, Config, trajectory_hash
from chatlora.config_files import config_text
from chatlora.errors import ConfigError
from chatlora.run_lock import INPUTS, lock_run, refuse_other_inputs, resume_source

# Another value for every setting. One that is missing here fails the test: somebody has to decide.
OTHER: dict[str, Any] = {
    "model.name_or_path": "other",
    "model.revision": "v2",
    "model.gradient_checkpointing": True,
    "model.chat_template": "other.jinja",
    "model.chat_template_kwargs": {"enable_thinking": True},
    "model.chat_template_date": "2020-02-02",
    "lora.rank": 3,
    "lora.alpha": 7.0,
    "lora.dropout": 0.3,
    "lora.target_modules": ["q_proj"],
    "lora.variant": "rslora",
    "lora.expert_format": "stacked",
    "lora.init_from": "other/adapter",
    "data.train": [{"path": "other.jsonl"}],
    "data.validation": 0.3,
    "data.test": 0.1,
    "data.system": "Be brief.",
    "data.max_length": 77,
    "data.over_length": "cut",
    "data.on_bad_row": "set_aside",
    "data.on_leak": "drop",
    "data.supervise": "last",
    "data.reasoning": "drop",
    "data.control_text": "token",
    "optim.epochs": 7.0,
    "optim.max_steps": 77,
    "optim.global_batch_size": 7,
    "optim.max_tokens_per_micro_batch": 7777,
    "optim.learning_rate": 7e-5,
    "optim.lr_ratio_b": 7.0,
    "optim.schedule": "linear",
    "optim.warmup_ratio": 0.2,
    "optim.weight_decay": 0.1,
    "optim.max_grad_norm": 7.0,
    "checkpoint.every_steps": 7,
    "checkpoint.keep_last": 7,
    "checkpoint.keep_best": False,
    "checkpoint.best_by": "first",
    "checkpoint.stop_after_no_gain": 7,
    "evaluation.max_new_tokens": 7,
    "evaluation.max_prompt_length": 7,
    "evaluation.max_tokens_per_batch": 4096,
    "evaluation.style": "chatglm3",
    "evaluation.after_training": True,
    "run.seed": 7,
    "run.precision": "fp32",
    "run.cpu_threads": 7,
}
NEW_DIRECTORY = {"checkpoint.resume", "run.output_dir"}  # they say which run it is
SETTINGS = sorted(f"{section}.{name}" for section, fields in Config().as_dict().items() for name in fields)


def changed(config: Config, setting: str, value: Any) -> Config:
    section, _, name = setting.partition(".")
    values = config.as_dict()
    values[section][name] = value
    return Config.model_validate(values)


@pytest.fixture
def begun(tmp_path: Path) -> Config:
    """A run with a checkpoint."""
    config = Config().with_values("run", output_dir=tmp_path / "run")
    config = changed(config, "data.train", [{"path": "rows.jsonl"}])
    settled, lock = lock_run(config, "my", dict)
    lock.release()
    (tmp_path / "run" / "config.yaml").write_text(config_text(settled.config), encoding="utf-8")
    (tmp_path / "run" / "checkpoints" / "step-000100").mkdir(parents=True)
    return config


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting not in NEW_DIRECTORY])
def test_every_setting_is_free_or_refused_by_name(begun: Config, setting: str) -> None:
    other = changed(begun, setting, OTHER[setting])
    assert other != begun
    if setting in FREE_SETTINGS:
        _, lock = lock_run(other, "my", dict)
        lock.release()
        assert trajectory_hash(other) == trajectory_hash(begun)
    else:
        with pytest.raises(ConfigError) as refused:
            lock_run(other, "my", dict)
        assert refused.value.problems[0].startswith(f"{setting} is ")
        assert "run.output_dir" in refused.value.problems[-1]
        assert trajectory_hash(other) != trajectory_hash(begun)


def test_test_rows_that_are_no_training_rows_are_free(begun: Config) -> None:
    for value in ("test.jsonl", 0, ["a.jsonl", "b.jsonl"]):
        other = changed(begun, "data.test", value)
        _, lock = lock_run(other, "my", dict)
        lock.release()
        assert trajectory_hash(other) == trajectory_hash(begun)


def test_all_changed_settings_are_told_at_once(begun: Config) -> None:
    other = changed(changed(begun, "run.seed", 7), "lora.rank", 3)
    with pytest.raises(ConfigError) as refused:
        lock_run(other, "my", dict)
    assert len(refused.value.problems) == 3


def test_a_directory_without_a_checkpoint_takes_any_config(begun: Config, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-000100").rmdir()
    settled, lock = lock_run(changed(begun, "lora.rank", 3), "my", dict)
    lock.release()
    assert settled.config.lora.rank == 3
    assert not settled.finished


@pytest.mark.parametrize("name", INPUTS)
def test_every_other_input_is_refused_by_name(begun: Config, tmp_path: Path, name: str) -> None:
    facts = dict.fromkeys(INPUTS, "as it was")
    (tmp_path / "run" / "environment.json").write_text(json.dumps(facts))
    refuse_other_inputs(begun, facts)
    with pytest.raises(ConfigError) as refused:
        refuse_other_inputs(begun, {**facts, name: "another"})
    assert refused.value.problems[0].startswith(INPUTS[name])
    assert len(refused.value.problems) == 2


def test_a_run_that_begins_elsewhere_is_held_to_where_it_begins(begun: Config, tmp_path: Path) -> None:
    home = tmp_path / "run" / "checkpoints" / "step-000100"
    (home / "manifest.json").touch()
    fork = changed(begun, "run.output_dir", str(tmp_path / "fork"))
    fork = changed(fork, "checkpoint.resume", str(home))
    assert resume_source(fork) == tmp_path / "run"
    _, lock = lock_run(fork, "my", dict)
    lock.release()
    with pytest.raises(ConfigError, match=r"run\.seed is 7"):
        lock_run(changed(fork, "run.seed", 7), "my", dict)
    (tmp_path / "fork" / "checkpoints" / "step-000200").mkdir(parents=True)
    assert resume_source(fork) == tmp_path / "fork"
