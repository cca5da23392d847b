"""What must not get its name: damaged files, wrong changes, another tokenizer; and what cannot be merged at all."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatlora.commands import dispatch
from chatlora.errors import MergeError, ModelError
from chatlora.merging import changes, merge, probes, travelling, writing
from chatlora.merging.answers import Answers, Text
from chatlora.merging.asked import asked_for
from chatlora.merging.changes import Change
from chatlora.merging.judgement import distance, judge
from chatlora.model.loading import load_adapter
from tests.merges import loaded, write_adapter, write_base, write_peft_adapter

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def quietly(line: str) -> None:
    pass


@pytest.fixture(
    scope="module", params=[pytest.param(FP32, marks=pytest.mark.slow, id="fp32"), pytest.param(BF16, id="bf16")]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/ and adapter/. The base's q_proj and o_proj are square."""
    folder = tmp_path_factory.mktemp("trained")
    write_adapter(folder / "adapter", write_base(folder / "base", "Llama", request.param))
    return folder


@pytest.fixture(autouse=True)
def two_short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "TEXTS", probes.TEXTS[:2])
    monkeypatch.setattr("chatlora.merging.answers.NEW_TOKENS", 8)


def merged(trained: Path, target: Path) -> Any:
    return merge.merge(asked_for(trained / "adapter", None, None, FP32), target, quietly)


def test_a_merge_passes_and_leaves_nothing_beside_it(trained: Path, tmp_path: Path) -> None:
    verdict = merged(trained, tmp_path / "merged")
    assert not verdict.faults
    assert verdict.merged == verdict.rounding
    assert verdict.merged.kl < 0.01 * verdict.base.kl
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    receipt = json.loads((tmp_path / "merged/merge.json").read_text())
    assert receipt["state"] == "merged"
    assert receipt["gate"]["faults"] == []


# ---- broken on purpose


def wrong_way_round(change: Change) -> torch.Tensor:
    delta: torch.Tensor = (change.b @ change.a) * change.scale
    return delta.T if delta.shape[0] == delta.shape[1] else delta


def of_another_scale(change: Change) -> torch.Tensor:
    delta: torch.Tensor = (change.b @ change.a) * change.scale * 1.05
    return delta


def of_its_root(change: Change) -> torch.Tensor:
    """As a server that takes rslora's scale where there is none."""
    delta: torch.Tensor = (change.b @ change.a) * change.scale * len(change.a) ** 0.5
    return delta


@pytest.mark.parametrize("delta", [wrong_way_round, of_another_scale, of_its_root])
def test_a_wrong_change_is_refused_with_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delta: Callable[[Change], torch.Tensor]
) -> None:
    monkeypatch.setattr(Change, "delta", delta)
    verdict = merged(trained, tmp_path / "merged")
    assert any("KL divergence in nats is" in fault for fault in verdict.faults)
    assert not [*tmp_path.iterdir()], "what is refused is not left"


@pytest.mark.parametrize(("times", "passes"), [(1.0, True), (1.5, False)])
def test_it_can_be_checked_in_bf16(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float, passes: bool
) -> None:
    right = Change.delta
    monkeypatch.setattr(Change, "delta", lambda change: right(change) * times)
    verdict = merge.merge(asked_for(trained / "adapter", None, None, BF16), tmp_path / "merged", quietly)
    assert (not verdict.faults) == passes


def test_one_module_of_another_scale_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = changes.changes_of

    def wrong(*given: Any) -> dict[str, Change]:
        found = right(*given)
        name = "model.layers.1.mlp.down_proj.weight"
        return {**found, name: replace(found[name], scale=found[name].scale / 2)}

    monkeypatch.setattr(merge, "changes_of", wrong)
    assert merged(trained, tmp_path / "merged").faults


def test_one_flipped_byte_is_refused_and_the_same_command_mends_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = writing.damaged_files

    def flipping(folder: Path, receipt: Mapping[str, Any]) -> dict[str, str]:
        path = sorted(folder.glob("*.safetensors"))[1]
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)
        return check(folder, receipt)

    monkeypatch.setattr(merge, "damaged_files", flipping)
    with pytest.raises(MergeError, match=r"model-00002-of-\d+.safetensors: is damaged: .* is not what was written"):
        merged(trained, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(merge, "damaged_files", check)
    lines: list[str] = []
    verdict = merge.merge(asked_for(trained / "adapter", None, None, FP32), tmp_path / "merged", lines.append)
    assert not verdict.faults
    assert sum("is there already" in line for line in lines) == len([*(trained / "base").glob("*.safetensors")]) - 1


def test_another_tokenizer_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = travelling.copy_all

    def with_another_template(files: Mapping[str, Path], target: Path) -> None:
        copy(files, target)
        (target / "chat_template.jinja").write_text("{{ messages }}")

    monkeypatch.setattr(merge, "copy_all", with_another_template)
    with pytest.raises(MergeError, match="its chat template is not the one of training"):
        merged(trained, tmp_path / "merged")


def without_stop_tokens(target: Path) -> None:
    (target / "generation_config.json").write_text("{}")


def without_its_file(target: Path) -> None:
    (target / "generation_config.json").unlink()


@pytest.mark.parametrize("lose", [without_stop_tokens, without_its_file])
def test_lost_stop_tokens_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Path], None]
) -> None:
    copy = travelling.copy_all

    def losing(files: Mapping[str, Path], target: Path) -> None:
        copy(files, target)
        lose(target)

    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    monkeypatch.setattr(merge, "copy_all", losing)
    with pytest.raises(MergeError, match=r"its stop tokens are \[\], and those of training \[7, 9\]"):
        merged(tmp_path, tmp_path / "merged")


def test_the_command_ends_with_1_and_says_the_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Change, "delta", of_another_scale)
    with pytest.raises(MergeError, match="nothing was left") as refused:
        dispatch(["merge", str(trained / "adapter"), str(tmp_path / "merged")])
    assert refused.value.exit_status == 1
    shown = capsys.readouterr().out
    assert "merged, from the disk" in shown
    assert "rounding alone" in shown


# ---- the rule


def answers(logits: torch.Tensor, ids: list[int], margin: float = 1.0) -> Answers:
    return Answers(logits, [Text(ids, [margin] * len(ids))])


def test_twice_the_rounding_is_the_tolerance() -> None:
    torch.manual_seed(0)
    reference, noise = 10 * torch.randn(20, 50), 0.01 * torch.randn(20, 50)
    ours, rounded = answers(reference, [1]), answers(reference + noise, [1])
    for times, passes in ((1.9, True), (-1.9, True), (2.1, False)):
        kl_grows_with_the_square = times if passes else 2.1
        found = answers(reference + kl_grows_with_the_square * noise, [1])
        verdict = judge(ours, rounded, reference, found)
        assert any(fault.startswith("the largest difference of logits") for fault in verdict.faults) == (not passes)
    assert distance(reference, reference) == distance(reference, reference + 1.0).__class__(0.0, 0.0, 0.0, 1.0)


def test_texts_may_part_at_a_near_tie_only() -> None:
    logits = torch.randn(4, 8)
    for margin, passes in ((1e-9, True), (0.5, False)):
        verdict = judge(answers(logits, [1, 2], margin), answers(logits, [1, 2]), logits, answers(logits, [1, 3]))
        assert (not verdict.faults) == passes
        assert (verdict.same_texts, verdict.texts) == (0, 1)


def test_what_is_not_finite_is_refused() -> None:
    logits = torch.randn(4, 8)
    broken = logits.clone()
    broken[1, 1] = torch.nan
    assert judge(answers(logits, [1]), answers(logits, [1]), logits, answers(broken, [1])).faults


# ---- what cannot be merged


@pytest.mark.parametrize("named", [{"base_model_name_or_path": None}, {"base_model_name_or_path": ""}, {}])
def test_an_adapter_that_names_no_base_is_told(trained: Path, tmp_path: Path, named: dict[str, Any]) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["base_model_name_or_path"]
    path.write_text(json.dumps(settings | named))
    with pytest.raises(ModelError, match="does not name a base model; name it with --base"):
        asked_for(tmp_path / "adapter", None, None, FP32)
    assert asked_for(tmp_path / "adapter", str(trained / "base"), None, FP32).folder == trained / "base"
    other = write_base(tmp_path / "other", "Qwen3-MoE", FP32)
    with pytest.raises(ModelError, match="does not belong to the model"):
        load_adapter(loaded(other), tmp_path / "adapter")


def test_a_base_that_is_gone_is_told_with_the_flag(trained: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder /no/base does not exist\n  --base M names"):
        asked_for(trained / "adapter", "/no/base", None, FP32)


def test_an_adapter_that_is_cut_off_is_told(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors cannot be read .*: copy the adapter's folder"):
        merged(tmp_path, tmp_path / "merged")


def test_a_place_that_cannot_be_written_is_told_at_once(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"file cannot be written .*; give another folder"):
        merged(trained, tmp_path / "file/merged")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="link: is there already"):
        merged(trained, tmp_path / "link")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_folder_that_is_there_is_left_alone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="is there already"):
        merged(trained, tmp_path / "merged")


def test_too_small_a_disk_is_told_before_anything_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ModelError, match=r"has 0.0 GB free, and 0.0 GB are needed"):
        merged(trained, tmp_path / "merged")
    assert not [*tmp_path.rglob("*.safetensors")]


def test_an_adapter_on_tied_embeddings_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "Qwen3", FP32)
    for target, other in (("embed_tokens", "lm_head.weight"), ("lm_head", "model.embed_tokens.weight")):
        write_peft_adapter(tmp_path / target, base, target_modules=[target])
        with pytest.raises(ModelError, match=f"{target}.weight, which is one tensor with {other} in this model"):
            merge.merge(asked_for(tmp_path / target, None, None, FP32), tmp_path / "merged", quietly)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: it holds whole modules of its own"),
        ({"bias": "lora_only"}, "bias: it trains the base's biases"),
        ({"lora_bias": True}, "lora_bias: it holds biases of its own"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa belongs to a base that it changed itself"),
    ],
)
def test_adapters_that_are_more_than_products_are_refused(
    trained: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ModelError, match=told):
        merge.merge(asked_for(tmp_path / "adapter", None, None, FP32), tmp_path / "merged", quietly)


def test_another_model_s_adapter_is_refused(trained: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", "Qwen3-MoE", FP32)
    with pytest.raises(ModelError, match="does not belong to the model"):
        merge.merge(asked_for(trained / "adapter", str(other), None, FP32), tmp_path / "merged", quietly)


def test_what_fp16_cannot_hold_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", "Llama", FP16)
    write_adapter(tmp_path / "adapter", base)
    right = Change.delta
    monkeypatch.setattr(Change, "delta", lambda change: right(change) * 1e7)
    with pytest.raises(ModelError, match=r"values up to .*, which float16 cannot hold"):
        merged(tmp_path, tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"auto_map": {"AutoConfig": "configuration_x.XConfig"}, "model_type": "x"}, "comes with code of its own"),
        ({"model_type": "of tomorrow"}, "no model can be read from .* model type `of tomorrow`"),
    ],
)
def test_a_base_that_transformers_does_not_know_is_told(
    trained: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    shutil.copytree(trained / "base", tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ModelError, match=told):
        merge.merge(asked_for(trained / "adapter", str(tmp_path / "base"), None, FP32), tmp_path / "merged", quietly)


def test_a_quantised_base_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "base", tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="is quantised"):
        merge.merge(asked_for(trained / "adapter", str(tmp_path / "base"), None, FP32), tmp_path / "merged", quietly)
