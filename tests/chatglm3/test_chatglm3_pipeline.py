"""From a ChatGLM3 folder and an old project's rows to an adapter and its scores, by the commands of docs/chatglm3.md.

Run: pytest tests/chatglm3/test_chatglm3_pipeline.py
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train
from chatlora import commands
from chatlora.config_files import load_config
from chatlora.evaluation.metrics import MEASURES, score
from chatlora.run_directory import read_status
from chatlora.run_log import read_log
from tests.chatglm3_checkpoints import TINY, Original, write_checkpoint

ROWS = [
    {
        "conversations": [
            {"role": "user", "content": f"类型#裤*颜色#{color}"},
            {"role": "assistant", "content": f"一条{color}色的裤子。"},
        ]
    }
    for color in "红橙黄绿青蓝紫黑白灰"
]
WITH_TOOL: dict[str, Any] = {
    "tools": [{"name": "get_weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}],
    "conversations": [
        {"role": "system", "content": "你是助手"},
        {"role": "user", "content": "<|user|> sop 北京？"},
        {"role": "tool", "name": "get_weather", "parameters": {"city": "北京"}, "observation": "晴"},
        {"role": "assistant", "content": "北京今天晴。"},
    ],
}
FLAGS = ["--optim.max_steps", "6", "--checkpoint.every_steps", "3", "--run.precision", "fp32", "--run.cpu_threads", "1"]


@pytest.fixture(scope="module")
def project(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's folder as people have it, rows in the old form, and the converted model."""
    folder = tmp_path_factory.mktemp("project")
    write_checkpoint(folder / "chatglm3-6b", TINY | {"padded_vocab_size": 65024}, num_shards=3, dtype=torch.float32)
    shutil.copy(shared / "chatglm3/tokenizer/tokenizer.model", folder / "chatglm3-6b")
    lines = [json.dumps(row, ensure_ascii=False) for row in [*ROWS, WITH_TOOL]]
    (folder / "train.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dev.json").write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    commands.dispatch(["convert-chatglm3", str(folder / "chatglm3-6b"), str(folder / "native")])
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATLORA_CACHE", str(project / "cache"))
        patch.chdir(project)
        data = ["--data.train", "train.json", "--data.validation", "dev.json", "--data.test", "train.json"]
        lengths = ["--evaluation.max_new_tokens", "32"]
        train.main(["chatglm3", "--model.name_or_path", "native", *data, *lengths, *FLAGS, "--run.output_dir", "run"])
        evaluate.main(["run", "--compare", "base"])
    return project / "run"


def test_the_preset_trains_on_every_row_of_an_old_project(trained: Path) -> None:
    assert read_status(trained)["state"] == "done"
    account, _ = json.loads((trained / "ledger.json").read_text())["sources"]
    assert (account["rows_read"], account["rows_used"], account["set_aside"]) == (11, 11, [])
    assert len(read_log(trained / "log.jsonl")) == 6
    assert [line["step"] for line in read_log(trained / "validation.jsonl")] == [3, 6]


def test_what_is_trained_are_the_original_s_tokens(trained: Path, project: Path, shared: Path) -> None:
    """As many targets as the original had."""
    original = Original(shared / "chatglm3/tokenizer/tokenizer.model")
    account, _ = json.loads((trained / "ledger.json").read_text())["sources"]
    counts = []
    for row in ROWS:
        _, labels = original.training(row["conversations"], 769)
        counts.append(sum(label != -100 for label in labels))
    call = original.message("assistant", "```python\ntool_call(city='北京')\n```", metadata="get_weather")
    counts.append(len(call) + len(original.message("assistant", WITH_TOOL["conversations"][3]["content"])))
    assert account["targets"] == sum(counts)


def test_the_adapter_and_its_tokenizer_load_without_this_package(trained: Path, project: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(project / "native")
    model = PeftModel.from_pretrained(base, trained / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert ids["input_ids"].tolist() == [[64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]]
    output = model.generate(**ids, do_sample=False, max_new_tokens=3)
    assert output.shape[1] <= 11
    assert model.generation_config.eos_token_id == [2, 64795, 64797]


def test_evaluation_scores_as_the_original_did(trained: Path) -> None:
    folder = trained / "eval/test"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12  # ten rows of one turn, a call and the answer to its result
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["style"] == "chatglm3"
    assert scores["decoding"]["stop_ids"] == [2, 64795, 64797]
    expected = score([row["prediction_raw"] for row in rows], [row["reference"] for row in rows], style="chatglm3")
    assert {name: scores["scores"][name]["value"] for name in MEASURES} == {
        name: expected.values[name] for name in MEASURES
    }
    (injected,) = [row for row in rows if row["turn"] == 0 and "北京？" in row["prompt"]]
    assert injected["prompt"].endswith("<|user|> \n <|user|> sop 北京？<|assistant|>")
    assert injected["reference"] == "get_weather\n ```python\ntool_call(city='北京')\n```"
    assert (trained / "eval/test-base/scores.json").is_file()


def test_recorded_predictions_decode_and_score_as_in_the_original(project: Path, shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(project / "native")
    for recorded in json.loads((shared / "chatglm3/compute_metrics_ids.json").read_text(encoding="utf-8")):
        texts = [tokenizer.decode([id for id in recorded[f"{side}_ids"] if id >= 0]) for side in ("pred", "label")]
        assert [text.strip() for text in texts] == [recorded["pred_text"], recorded["label_text"]]
        if "metrics" in recorded:
            found = score([texts[0]], [texts[1]], style="chatglm3").per_sample[0]
            assert found == pytest.approx(recorded["metrics"], abs=1e-9)


def test_the_preset_holds_the_original_s_settings() -> None:
    config = load_config(["chatglm3", "--data.train", "my.json"], default="demo").config
    told: dict[str, Any] = {
        "max_length": config.data.max_length,
        "max_prompt_length": config.evaluation.max_prompt_length,
        "max_new_tokens": config.evaluation.max_new_tokens,
        "max_steps": config.optim.max_steps,
        "learning_rate": config.optim.learning_rate,
        "batch": config.optim.global_batch_size,
        "save": config.checkpoint.every_steps,
        "lora": (config.lora.rank, config.lora.alpha, config.lora.dropout),
    }
    assert told == {
        "max_length": 256 + 512 + 1,
        "max_prompt_length": 256,
        "max_new_tokens": 512,
        "max_steps": 3000,
        "learning_rate": 5e-5,
        "batch": 4,
        "save": 500,
        "lora": (8, 32, 0.1),
    }
    assert (config.data.over_length, config.evaluation.style, config.optim.schedule) == ("cut", "chatglm3", "linear")
    assert (config.optim.warmup_ratio, config.optim.weight_decay, config.optim.max_grad_norm) == (0, 0, 1)


# ---- the page


PAGES = [Path(__file__).resolve().parents[2] / "docs" / name for name in ("chatglm3.md", "chatglm3.zh.md")]


def test_every_setting_on_the_pages_exists() -> None:
    config = load_config(["demo"], default="demo").config.as_dict()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("lora.yaml", "")
        named = re.findall(r"`(model|lora|data|optim|checkpoint|evaluation|run)\.(\w+)`", text)
        assert len(named) > 20
        assert [f"{section}.{field}" for section, field in named if field not in config.get(section, {})] == []


def test_the_two_pages_say_the_same() -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in PAGES)
    for form in (r"```bash\n(.*?)```", r"^\| `?([\w.:]+)", r"^## (GLM-4)$"):
        found = re.findall(form, english, re.DOTALL | re.MULTILINE)
        translated = re.findall(form, chinese, re.DOTALL | re.MULTILINE)
        assert len(found) == len(translated)
        if "bash" in form:
            assert found == translated
    assert english.count("\n| ") == chinese.count("\n| ")


def test_the_four_commands_are_commands() -> None:
    first = re.findall(r"```bash\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)[0]
    install, convert, fine_tune, score_it = first.splitlines()
    assert install.startswith("pip install")
    assert convert.split()[:2] == ["chatlora", "convert-chatglm3"]
    assert "convert-chatglm3" in commands.COMMANDS
    config = load_config(fine_tune.split()[3:], default="demo").config
    assert str(config.run.output_dir) == score_it.split()[3]
    assert config.model.name_or_path == convert.split()[3]
