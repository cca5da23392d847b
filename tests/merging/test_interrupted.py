"""A run's merge, killed: finished or begun anew by the same command, never half. And what travels with it."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chatlora.config import ModelConfig
from chatlora.errors import ModelError
from chatlora.evaluation.command_line import parse
from chatlora.evaluation.setup import rendered
from chatlora.merging.asked import asked_for, folder_of
from chatlora.merging.travelling import files_that_travel
from chatlora.model.loading import load_for_inference
from tests.fork_server import At, ForkServer
from tests.merges import SHARD
from tests.runs import FLAGS
from tests.tiny_tokenizers import QWEN3

WRITE, GATE, NAME = "write_merged", "pass_gate", "settle"


@pytest.fixture(scope="module")
def folder(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, whose base is in base/ too, in several files, and merged/."""
    folder = tmp_path_factory.mktemp("merging")
    assert server.run([str(world / "my.yaml"), *FLAGS], folder) == [0]
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    model.to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder / "base")
    (folder / "base/README.md").write_text("# the base's card")
    (folder / "base/LICENSE").write_text("the base's licence")
    assert server.run(argv("merged"), folder, script="chatlora.commands.merge:run") == [0]
    return folder


def argv(target: str) -> list[str]:
    return ["run", target, "--base", "base"]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def assert_whole(folder: Path, target: str) -> None:
    assert weights(folder / target) == weights(folder / "merged")
    assert {path.name for path in (folder / target).iterdir()} == {path.name for path in (folder / "merged").iterdir()}
    assert not (folder / f".{target}.merging").exists()


@pytest.mark.parametrize(("place", "call"), [(WRITE, 2), (GATE, 1), (NAME, 1)])
def test_killed_and_the_same_command_again(server: ForkServer, folder: Path, place: str, call: int) -> None:
    target = f"killed-in-{place}"
    at = At("SIGKILL", f"chatlora.merging.merge:{place}", call)
    assert server.run(argv(target), folder, script="chatlora.commands.merge:run", at=at) == [-signal.SIGKILL]
    assert not (folder / target).exists(), "it has no name before it is whole"
    begun = {path.name: path.stat().st_ino for path in (folder / f".{target}.merging").glob("*.safetensors")}
    assert len(begun) == (1 if place == WRITE else len(weights(folder / "base")))
    assert server.run(argv(target), folder, script="chatlora.commands.merge:run") == [0]
    assert_whole(folder, target)
    kept = {name for name, inode in begun.items() if (folder / target / name).stat().st_ino == inode}
    assert kept == set(begun), "what was finished is not written again"


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(20))
def test_killed_at_any_instant(server: ForkServer, folder: Path, draw: int) -> None:
    target, began = f"killed-{draw}", time.monotonic()
    assert server.run(argv(f"timed-{draw}"), folder, script="chatlora.commands.merge:run") == [0]
    whole = time.monotonic() - began
    (pid,) = server.start(argv(target), folder, script="chatlora.commands.merge:run")
    time.sleep(random.Random(draw).random() * whole)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    finished = server.wait([pid]) == [0]
    assert finished or not (folder / target).exists() or (folder / target / "merge.json").is_file()
    if not (folder / target).exists():
        assert server.run(argv(target), folder, script="chatlora.commands.merge:run") == [0]
    assert_whole(folder, target)


def test_an_adapter_that_was_trained_on_meanwhile_is_not_mixed_in(server: ForkServer, folder: Path) -> None:
    at = At("SIGKILL", f"chatlora.merging.merge:{WRITE}", 2)
    assert server.run(argv("mixed"), folder, script="chatlora.commands.merge:run", at=at) == [-signal.SIGKILL]
    words = ["run/adapter-other", "mixed", "--base", "base"]
    other = folder / "run/adapter-other"
    other.mkdir()
    for path in (folder / "run/adapter").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    assert server.run(words, folder, script="chatlora.commands.merge:run") == [2]
    assert "holds a merge of other files" in server.log.read_text()
    assert not (folder / "mixed").exists()


# ---- what travels


def test_the_merged_folder_is_a_model_of_its_own(folder: Path) -> None:
    """Opened by plain transformers, it says what the run's adapter says on the base."""
    run, merged = folder / "run", folder / "merged"
    adapted, tokenizer = load_for_inference(run)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "5. Where is Rome?"}], add_generation_prompt=True, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    again = AutoTokenizer.from_pretrained(merged)
    assert again.chat_template == tokenizer.chat_template
    assert (
        GenerationConfig.from_pretrained(merged).eos_token_id
        == GenerationConfig.from_pretrained(run / "adapter").eos_token_id
    )
    told = [each.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist() for each in (adapted, model)]
    assert told[0] == told[1]


def test_files_that_travel(folder: Path) -> None:
    merged = folder / "merged"
    assert (merged / "chatlora.json").read_bytes() == (folder / "run/adapter/chatlora.json").read_bytes()
    assert (merged / "chat_template.jinja").read_bytes() == (folder / "run/adapter/chat_template.jinja").read_bytes()
    assert (merged / "config.json").read_bytes() == (folder / "base/config.json").read_bytes()
    assert (merged / "LICENSE").read_text() == "the base's licence"
    left = {"README.md", "adapter_config.json", "adapter_model.safetensors", ".lock"}
    assert not left & {path.name for path in merged.iterdir()}
    dtypes = {tensor.dtype for path in merged.glob("*.safetensors") for tensor in load_file(path).values()}
    assert dtypes == {torch.bfloat16}


def test_what_is_true_of_the_base_alone_stays_there(folder: Path, tmp_path: Path) -> None:
    """An adapter of another maker says nothing of its template, and gets nothing of a merged base's."""
    (tmp_path / "adapter_config.json").write_text("{}")
    found = files_that_travel(folder / "merged", tmp_path)
    assert not {"merge.json", "chatlora.json"} & found.keys()
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"} == (
        found.keys() - {"tokenizer_config.json"}
    )


def test_a_base_of_the_hub_is_found_in_its_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--owner--model"
    shutil.copytree(folder / "base", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/v2").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("chatlora.merging.asked.why_unreachable", lambda: "nobody listens")
    found = folder_of(ModelConfig(name_or_path="owner/model", revision="v2"))
    assert found == cache / "snapshots" / commit
    with pytest.raises(ModelError, match=r"owner/model: its files cannot be had \(nobody listens\); --base FOLDER"):
        folder_of(ModelConfig(name_or_path="owner/model", revision="v3"))


def test_a_merged_model_is_evaluated_as_it_was_trained(folder: Path, world: Path, tmp_path: Path) -> None:
    """`evaluate.py --model merged` tells the template what it was told in training, unless the flag says another."""
    shutil.copytree(folder / "merged", tmp_path / "merged")
    (tmp_path / "merged/chatlora.json").write_text('{"chat_template_kwargs": {"tone": "dry"}}')
    words = ["--model", str(tmp_path / "merged"), "--data", str(world / "rows.jsonl")]
    assert rendered(parse(words)).renderer.chat_template_kwargs == {"tone": "dry"}
    words += ["--model.chat_template_kwargs", '{"tone": "warm"}']
    assert rendered(parse(words)).renderer.chat_template_kwargs == {"tone": "warm"}


@pytest.mark.parametrize("word", ["run", "run/adapter", "run/adapter-best"])
def test_an_adapter_in_a_run_is_checked_on_the_run_s_rows(folder: Path, word: str) -> None:
    request = asked_for(folder / word, str(folder / "base"), None, torch.float32).request
    assert request is not None
    assert (request.run_dir, request.split) == (folder / "run", "validation")


def test_a_share_that_held_out_no_row_is_passed_over(folder: Path, tmp_path: Path) -> None:
    """Two of a hundred of the training rows are held out unless another share is named: of 20, none."""
    shutil.copytree(folder / "run", tmp_path / "run")
    kept = json.loads((tmp_path / "run/held_out.json").read_text())
    (tmp_path / "run/held_out.json").write_text(json.dumps(kept | {"validation": []}))
    assert asked_for(tmp_path / "run", str(folder / "base"), None, torch.float32).request is None


def test_other_rows_are_read_under_the_settings_of_the_run(folder: Path, world: Path) -> None:
    request = asked_for(folder / "run", str(folder / "base"), str(world / "rows.jsonl"), torch.float32).request
    assert request is not None
    assert request.config.data.max_length == 256, "as the run's config says"


def test_what_training_told_the_template_holds_for_rows_without_thoughts(
    folder: Path, world: Path, tmp_path: Path
) -> None:
    """A run with thoughts tells its template nothing; rows without any would switch them off in another model."""
    shutil.copytree(folder / "merged", tmp_path / "merged")
    (tmp_path / "merged/chat_template.jinja").write_text(QWEN3)
    words = ["--model", str(tmp_path / "merged"), "--data", str(world / "rows.jsonl")]
    (tmp_path / "merged/chatlora.json").write_text('{"chat_template_kwargs": {}}')
    assert rendered(parse(words)).renderer.chat_template_kwargs == {}
    (tmp_path / "merged/chatlora.json").unlink()
    assert rendered(parse(words)).renderer.chat_template_kwargs == {"enable_thinking": False}


def test_a_merged_model_is_a_base_like_any_other(server: ForkServer, folder: Path) -> None:
    """Its receipt does not take the place of the new one: a kill in the gate is gone on from."""
    words = ["run", "twice", "--base", "merged"]
    at = At("SIGKILL", f"chatlora.merging.merge:{GATE}", 1)
    assert server.run(words, folder, script="chatlora.commands.merge:run", at=at) == [-signal.SIGKILL]
    assert server.run(words, folder, script="chatlora.commands.merge:run") == [0]
    assert json.loads((folder / "twice/merge.json").read_text())["source"]["base"] == "merged"


def test_no_file_of_a_merged_model_has_a_path_of_this_machine(folder: Path) -> None:
    for path in (folder / "merged").iterdir():
        assert str(folder).encode() not in path.read_bytes(), path.name


def test_it_is_checked_on_the_run_s_validation_rows(server: ForkServer, folder: Path) -> None:
    log = server.log.read_text()
    assert "checked on 8 of" in log
    assert json.loads((folder / "merged/merge.json").read_text())["gate"]["texts"] == 4
