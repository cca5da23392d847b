"""One adapter folder on four servers: the same strength everywhere, or a refusal that the export foretells."""

import json
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model

from chatlora.config import ExpertFormat, LoraConfig
from chatlora.errors import ModelError
from chatlora.model.adapter_folder import put_on, save_adapter
from chatlora.model.lora import add_lora, trainable, without_false_alarms
from chatlora.model.servers import not_taken_in
from chatlora.model.targets import find_targets
from tests.model_families import FAMILIES, build_base
from tests.servers import SERVERS, Adapter, RefusedError, adapter_in, logits, scales, serve

WITH_EXPERTS = ("Qwen3-MoE", "Qwen3-Next", "Mixtral", "DeepSeek-V3", "Granite-4 hybrid", "gpt-oss")
FORMS: tuple[ExpertFormat, ...] = ("stacked", "per_expert")
DRAWS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 6, "alpha": 8, "variant": "rslora"},
}
DORA = {"rank": 4, "alpha": 8, "variant": "dora"}


def adapted(family: str, draw: str) -> PeftModel:
    """A model whose adapter does something, drawn and not trained."""
    base = build_base(family)
    if draw == "mixed ranks":
        targets = find_targets(base, "all-linear")
        kinds = {re.escape(name): 1 + 2 * i for i, name in enumerate((*targets.modules, *targets.parameters))}
        settings = PeftLoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets.modules,
            target_parameters=targets.parameters or None,
            rank_pattern=kinds,
            alpha_pattern={name: 3 * rank for name, rank in list(kinds.items())[::2]},
            task_type="CAUSAL_LM",
        )
        with without_false_alarms():
            model = get_peft_model(base, settings)
        assert isinstance(model, PeftModel)
    else:
        model = add_lora(base, LoraConfig(**{**DRAWS, "dora": DORA}[draw]), seed=0)
    torch.manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def weights_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in trainable(model).items()}


def errors(family: str, adapter: Adapter, trained: torch.Tensor) -> dict[str, float | str]:
    """Server -> how far its logits are from training's, as a share of them, or why it takes no such adapter."""
    found: dict[str, float | str] = {}
    computed: dict[tuple[tuple[str, float], ...], float] = {}
    base = build_base(family)
    for server in SERVERS:
        try:
            plan = scales(server, adapter, base)
        except RefusedError as refusal:
            found[server] = str(refusal)
            continue
        key = tuple(sorted(plan.items()))
        if key not in computed:
            there = logits(serve(build_base(family), adapter, plan).eval())
            computed[key] = apart(there, trained)
        found[server] = computed[key]
    return found


def slow(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def refused(found: dict[str, float | str]) -> set[str]:
    return {server.split()[0] for server, error in found.items() if isinstance(error, str)}


def told(model: PeftModel, folder: Path) -> set[str]:
    """The servers that an export names."""
    return {*not_taken_in(model.get_base_model(), folder)}


@pytest.mark.parametrize("draw", [*DRAWS, "mixed ranks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_server_that_takes_the_adapter_computes_what_training_did(family: str, draw: str, tmp_path: Path) -> None:
    model = adapted(family, draw)
    trained = logits(model)
    save_adapter(model, weights_of(model), tmp_path)
    found = errors(family, adapter_in(tmp_path), trained)
    assert told(model, tmp_path) == refused(found)
    assert all(error < 1e-5 for error in found.values() if isinstance(error, float)), found
    with model.disable_adapter():
        assert apart(logits(model), trained) > 1e-2


@pytest.mark.parametrize(
    ("family", "expert_format"),
    [(family, form) for family in WITH_EXPERTS for form in FORMS if (family, form) != ("gpt-oss", "per_expert")],
)
def test_both_forms_of_experts_are_the_same_adapter(family: str, expert_format: ExpertFormat, tmp_path: Path) -> None:
    model = adapted(family, "rslora")
    save_adapter(model, weights_of(model), tmp_path, expert_format)
    adapter = adapter_in(tmp_path)
    assert bool(adapter.stacked) == (expert_format == "stacked")
    assert bool(adapter.single) == (expert_format == "per_expert")
    found = errors(family, adapter, logits(model))
    assert all(error < 1e-5 for error in found.values() if isinstance(error, float)), found
    assert told(model, tmp_path) - {"PEFT"} == refused(found)


def test_single_experts_of_a_family_without_any_are_refused_before_training() -> None:
    with pytest.raises(ModelError, match=r"per_expert, but no names of single experts are known for gpt_oss.*stacked"):
        add_lora(build_base("gpt-oss"), LoraConfig(expert_format="per_expert"), seed=0)


@pytest.mark.parametrize(
    "family", ["Mixtral", "Granite-4 hybrid", *map(slow, ("Qwen3-MoE", "Qwen3-Next", "DeepSeek-V3", "gpt-oss"))]
)
def test_peft_alone_opens_what_auto_writes(family: str, tmp_path: Path) -> None:
    """And nothing is opened as less than it is without the export's word."""
    model = adapted(family, "plain")
    forms: tuple[ExpertFormat, ...] = ("auto", *FORMS[: 1 if family == "gpt-oss" else 2])
    for form in forms:
        save_adapter(model, weights_of(model), tmp_path / form, form)
        ours = put_on(build_base(family), tmp_path / form).eval()
        assert apart(logits(ours), logits(model)) < 1e-5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = PeftModel.from_pretrained(build_base(family), tmp_path / form).eval()
        same = apart(logits(alone), logits(model)) < 1e-5
        assert same == ("PEFT" not in told(model, tmp_path / form))
        assert same or form == "per_expert"


def test_an_adapter_on_some_layers_experts_alone_comes_back(tmp_path: Path) -> None:
    base = build_base("Qwen3-MoE")
    wanted = r".*layers\.1\.mlp\.experts\.gate_up_proj|.*layers\.0\.mlp\.experts\.down_proj"
    model = add_lora(base, LoraConfig(rank=4, alpha=8, target_modules=wanted), seed=0)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model.eval(), weights_of(model), tmp_path)
    assert adapter_in(tmp_path).single
    assert apart(logits(put_on(build_base("Qwen3-MoE"), tmp_path).eval()), logits(model)) < 1e-5
    found = errors("Qwen3-MoE", adapter_in(tmp_path), logits(model))
    assert all(error < 1e-5 for error in found.values() if isinstance(error, float)), found


@pytest.mark.parametrize("family", ["Llama", "Qwen2.5", "GLM (ChatGLM3, GLM-4-9b)"])
def test_dora_is_right_in_peft_and_the_export_says_who_refuses_it(family: str, tmp_path: Path) -> None:
    model = adapted(family, "dora")
    save_adapter(model, weights_of(model), tmp_path)
    found = errors(family, adapter_in(tmp_path), logits(model))
    assert found.pop("PEFT") == pytest.approx(0, abs=1e-5)
    assert {*found.values()} == {"DoRA"}
    assert refused(found) == {"vLLM", "SGLang", "llama.cpp"}
    assert told(model, tmp_path) == refused(found) | {
        "transformers"
    }  # by itself: tests/chat/test_transformers_serve.py
    assert apart(logits(put_on(build_base(family), tmp_path).eval()), logits(model)) < 1e-5


# ---- what PEFT writes by itself


@pytest.mark.parametrize(
    ("family", "draw", "wrong"),
    [
        ("Llama", "rslora", {"SGLang 0.5.23", "llama.cpp"}),
        ("gpt-oss", "plain", {"vLLM before September 2026"}),
        ("gpt-oss", "rslora", {"vLLM before September 2026"}),
        ("Llama", "mixed ranks", {"vLLM before September 2026", "SGLang 0.5.23", "llama.cpp"}),
    ],
)
def test_the_trained_ranks_and_scales_are_wrong_on_servers(
    family: str, draw: str, wrong: set[str], tmp_path: Path
) -> None:
    """Without a word: the adapter is loaded, and has another strength."""
    model = adapted(family, draw)
    model.save_pretrained(tmp_path)
    found = errors(family, adapter_in(tmp_path), logits(model))
    assert {server for server, error in found.items() if isinstance(error, float) and error > 1e-3} == wrong
    assert found["PEFT"] == pytest.approx(0, abs=1e-5)


def test_one_wrong_scale_is_seen(tmp_path: Path) -> None:
    """The comparison itself: one of 28 modules off by a hundredth."""
    model = adapted("Llama", "plain")
    save_adapter(model, weights_of(model), tmp_path)
    adapter = adapter_in(tmp_path)
    plan = scales("PEFT", adapter, build_base("Llama"))
    plan[next(iter(plan))] *= 1.01
    there = logits(serve(build_base("Llama"), adapter, plan).eval())
    assert apart(there, logits(model)) > 1e-5


# ---- the loaders themselves


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two servers' LoRA loaders out of their wheels: plain Python, which needs no GPU and none of the rest."""
    folder = tmp_path_factory.mktemp("wheels")
    for wheel in ("vllm==0.33.0", "sglang==0.5.23"):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), wheel]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        if done.returncode:
            pytest.skip(f"{wheel} cannot be downloaded here: {done.stderr.strip()[-300:]}")
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel_file:
            wheel_file.extractall(folder, [n for n in wheel_file.namelist() if n in LOADERS])
    return folder


LOADERS = (
    "vllm/lora/peft_helper.py",
    "vllm/lora/utils.py",
    "sglang/srt/lora/lora.py",
    "sglang/srt/lora/lora_config.py",
    "sglang/srt/lora/utils.py",
)


def asked(server: str, wheels: Path, *adapters: Path) -> list[dict[str, Any]]:
    """What the server's own loader says of each, asked in a process of its own."""
    script = Path(__file__).parent.parent / "asked_loaders.py"
    command = [sys.executable, str(script), server, str(wheels), *(str(adapter) for adapter in adapters)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_vllm_and_sglang_themselves_say_the_same(wheels: Path, tmp_path: Path) -> None:
    folders: dict[tuple[str, str], Path] = {}
    for family, draw in ((family, draw) for family in FAMILIES for draw in (*DRAWS, "mixed ranks")):
        folders[family, draw] = tmp_path / str(len(folders))
        model = adapted(family, draw)
        save_adapter(model, weights_of(model), folders[family, draw])
    answers = zip(
        folders.items(),
        asked("vllm", wheels, *folders.values()),
        asked("sglang", wheels, *folders.values()),
        strict=True,
    )
    for (of, folder), vllm, sglang in answers:
        adapter = adapter_in(folder)
        mine = scales("PEFT", adapter, build_base(of[0]))
        assert vllm == {"scales": pytest.approx(mine), "refused": []}, of
        assert all(sglang["scaling"] == pytest.approx(scale) for scale in mine.values()), of
        assert bool(sglang["without_place"]) == bool(adapter.stacked), (of, sglang["without_place"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_loaders_read_the_trained_form_as_the_rules_here_say(wheels: Path, tmp_path: Path) -> None:
    """PEFT's own file of an rslora adapter: vLLM right, SGLang at less than half of the strength."""
    model = adapted("Llama", "rslora")
    model.save_pretrained(tmp_path)
    adapter, base = adapter_in(tmp_path), build_base("Llama")
    (vllm,), (sglang,) = asked("vllm", wheels, tmp_path), asked("sglang", wheels, tmp_path)
    assert vllm["scales"] == pytest.approx(scales("vLLM 0.33", adapter, base))
    assert {sglang["scaling"]} == {*scales("SGLang 0.5.23", adapter, base).values()}
    assert sglang["scaling"] < 0.5 * min(vllm["scales"].values())
