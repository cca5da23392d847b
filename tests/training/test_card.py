"""The card of an adapter: names in place of paths, metadata that the hub takes, lines that run, later scores."""

import errno
import getpass
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

import evaluate
from chatlora.config import LoraConfig, ModelConfig
from chatlora.disk import sha256_of
from chatlora.model.adapter_folder import save_adapter
from chatlora.model.lora import add_lora, trainable
from chatlora.model.origin import Origin, hub_data, origin_of, public_name
from chatlora.model.servers import MIXED_FLAG, not_taken_in
from chatlora.training import card
from chatlora.training.card_scores import END, NONE_YET, START, refresh_cards, scores_of, with_scores
from tests.model_families import build_base
from tests.tiny_models import CHATML

TONES = "{{ tone | default('none') }}\n" + CHATML
PROMPTS = ["Who are you?", *(f"{number}. Where is {city}?" for number, city in enumerate(["北京", "Oslo", "Lima"] * 7))]
ROUGE = {"value": 8.4477, "interval": None, "signature": "style:chatlora|words:jieba"}


def read(text: str) -> ModelCardData:
    """The metadata of a card as the hub's library takes it."""
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data


def results_in(text: str) -> list[EvalResult]:
    results = read(text).eval_results
    assert isinstance(results, list)
    return results


def private_in(folder: Path, *secrets: str) -> dict[str, list[str]]:
    """File -> which of these it holds, and absolute paths, in whatever it is written."""
    found: dict[str, list[str]] = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        content = path.read_bytes()
        held = [secret for secret in secrets if secret.encode() in content]
        held += [one.decode() for one in re.findall(rb"/(?:home|root|Users|tmp|data|mnt)/[\w./-]+", content)]
        if held:
            found[path.name] = held
    return found


def answers_of(block: str, folder: Path, prompts: list[str]) -> tuple[list[str], list[str]]:
    """What the card's own lines print to each, in a process of their own, without chatlora or network.

    Beside it what they print where the template is not told its settings.
    """
    loading, _, asking = block.partition("messages = ")
    asking = f"messages = {asking}".replace("'Who are you?'", "asked")
    untold = asking.replace(", tone='kind'", "")
    assert "asked" in asking != untold
    code = loading
    for lines in (asking, untold):
        code += f"\nfor asked in {prompts!r}:\n    print('@@', end='')\n    " + lines.replace("\n", "\n    ")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin",
        "http_proxy": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    told = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, env=environment, check=False
    )
    assert told.returncode == 0, told.stderr.decode()
    answers = [answer.removesuffix("\n") for answer in told.stdout.decode().split("@@")[1:]]
    return answers[: len(prompts)], answers[len(prompts) :]


def test_its_lines_say_what_evaluate_says_and_nothing_private_is_beside_it(
    run: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "completion": "I am number 7."} for prompt in PROMPTS]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tones.jinja").write_text(TONES)
    flags = ["--model.chat_template", "tones.jinja", "--model.chat_template_kwargs", "{tone: kind}"]
    folder = run(*flags, "--data.system", "You are 'terse'.", "--data.test", "asked.jsonl", "--optim.max_steps", "6")
    evaluate.main([str(folder), "--compare", "base", "--evaluation.max_new_tokens", "40"])
    predictions = [json.loads(line) for line in (folder / "eval/test/predictions.jsonl").read_text().splitlines()]
    wanted = [one["prediction"] for one in predictions]
    assert len(set(wanted)) > 10

    text = (folder / "adapter" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    shorter = block.replace("max_new_tokens=512", "max_new_tokens=40")
    answers, untold = answers_of(shorter, folder / "adapter", PROMPTS)
    assert answers == wanted
    assert untold != wanted  # a line that does less would be seen

    base = str(world / "model")
    secrets = (str(tmp_path), str(world), platform.node(), f"/{getpass.getuser()}/")
    assert private_in(folder / "adapter", *secrets) == {"adapter_config.json": [str(world), base]}
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings.pop("base_model_name_or_path") == base  # whoever loads the adapter by its folder needs it
    assert base not in json.dumps(settings)
    published = shutil.copytree(folder / "adapter", tmp_path / "published")  # as docs/serving.md says
    (published / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "Org/M"}))
    assert private_in(published, *secrets) == {}
    (published / "left.txt").write_bytes(str(world).encode())
    assert list(private_in(published, *secrets)) == ["left.txt"]

    data = read(text)
    assert data.base_model is None
    assert "# base_model: the hub id" in text
    assert "# adapter_config.json:" in text
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    told = json.loads((folder / "eval/test/scores.json").read_text())["scores"]
    results = {one.metric_name: (one.metric_value, one.metric_args) for one in results_in(text)}
    assert results == {n: (round(s["value"], 4), {"signature": s["signature"]}) for n, s in told.items()}
    assert "| rows.jsonl | 65 | 7 |" in text
    assert "`test`: 22 samples of asked.jsonl" in text
    logged = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    best = min(logged, key=lambda line: line["loss"])
    assert (
        f"{logged[-1]['loss']:.4f} nats a target at the end, best {best['loss']:.4f} after step {best['step']}" in text
    )
    assert f"that of step {best['step']} |" in (folder / "adapter-best" / "README.md").read_text()


# ---- what is known of a base


def test_a_base_has_a_hub_id_where_something_here_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    apache = "---\nlicense: apache-2.0\nbase_model: Org/Parent\n---\n# A model\n"
    plain, cached = tmp_path / "tiny", tmp_path / "hub/models--Org--Some.Model/snapshots" / ("a" * 40)
    for folder in (plain, cached):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(apache)
        (folder / "config.json").write_text('{"_name_or_path": "Org/Parent"}')
    licence = {"license": "apache-2.0"}
    assert origin_of(ModelConfig(name_or_path="tiny")) == Origin("tiny", licence=licence)
    assert origin_of(ModelConfig(name_or_path=str(cached))) == Origin(
        "Org/Some.Model", "Org/Some.Model", "a" * 40, licence
    )
    (cached / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    linked = origin_of(ModelConfig(name_or_path=str(cached))).licence["license_link"]
    assert linked == "https://huggingface.co/Org/Some.Model/blob/main/LICENSE"
    (plain / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert origin_of(ModelConfig(name_or_path="tiny")).licence == {}
    hub = origin_of(ModelConfig(name_or_path="Org/Some.Model", revision="v2"))
    assert hub == Origin("Org/Some.Model", "Org/Some.Model", "v2")
    assert origin_of(ModelConfig(name_or_path="/gone/since/model")) == Origin("model")
    embedded = origin_of(ModelConfig(name_or_path="embedded:smollm2-135m-instruct"))
    assert (embedded.hub_id, embedded.licence) == ("HuggingFaceTB/SmolLM2-135M-Instruct", licence)


def test_data_is_named_and_not_located(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    named = {
        str(tmp_path / "rows.jsonl"): ("rows.jsonl", None),
        f"{tmp_path}/*.jsonl": ("*.jsonl", None),
        "/gone/since.jsonl": ("since.jsonl", None),
        "embedded:demo/train.jsonl": ("embedded:demo/train.jsonl", None),
        "org/some-data": ("org/some-data", "org/some-data"),
        "org/some-data:zh": ("org/some-data:zh", "org/some-data"),
    }
    assert {path: (public_name(path), hub_data(path)) for path in named} == named


@pytest.mark.parametrize(
    ("origin", "known"),
    [
        (Origin("tiny"), {}),
        (Origin("Org/M", "Org/M", "v2", {"license": "mit"}), {"base_model": "Org/M", "license": "mit"}),
        (Origin("no: #yaml", None, None, {"license": "a: b"}), {"license": "a: b"}),
    ],
    ids=lambda value: value.name if isinstance(value, Origin) else "",
)
def test_the_hub_library_reads_the_metadata(origin: Origin, known: dict[str, str]) -> None:
    settings = {"base_model_name_or_path": origin.hub_id or "/data/tiny"}
    metadata = card._metadata(origin, settings, ["/data/rows.jsonl", "org/data:zh"])
    values = read(f"---\n{metadata}---\n\n# A card\n").to_dict()
    assert values == {**known, **{name: values[name] for name in ("library_name", "pipeline_tag", "tags", "datasets")}}
    assert values["datasets"] == ["org/data"]
    if origin.hub_id:
        validate_repo_id(values["base_model"])
    assert ("# base_model" in metadata, "# adapter_config.json" in metadata) == (not origin.hub_id, not origin.hub_id)


@pytest.mark.parametrize(("rank", "flag"), [(1, "1"), (4, "8"), (16, "16"), (20, "32"), (300, "320"), (600, None)])
def test_vllm_is_told_a_rank_that_it_takes(rank: int, flag: str | None) -> None:
    settings = {"r": 1, "rank_pattern": {"experts": rank}, "use_dora": False}
    line = card._vllm(settings, "Org/M", card.Use("", {"enable_thinking": False}, {}))
    if flag is None:
        assert "no rank beyond 512" in line
        return
    assert f"--max-lora-rank {flag} --lora" in line
    assert """--default-chat-template-kwargs '{"enable_thinking": false}'""" in line


@pytest.mark.parametrize(
    ("family", "variant", "line", "said"),
    [
        ("Llama", None, "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules", []),
        ("Llama", "dora", "# vLLM takes no DoRA adapter", ["vLLM", "SGLang", "llama.cpp", "transformers"]),
        ("Granite-4 hybrid", None, f"--max-lora-rank 8 {MIXED_FLAG} --lora-modules", ["SGLang", "llama.cpp", "vLLM"]),
        ("Qwen3-MoE", None, "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules", []),
    ],
)
def test_servers_that_take_it_otherwise_are_named(
    family: str, variant: Literal["dora"] | None, line: str, said: list[str], tmp_path: Path
) -> None:
    model = add_lora(build_base(family), LoraConfig(rank=4, variant=variant), seed=0)
    save_adapter(model, dict(trainable(model)), tmp_path)
    use = card.Use("AnyClass", {}, not_taken_in(model.get_base_model(), tmp_path))
    told = card._use(json.loads((tmp_path / "adapter_config.json").read_text()), Origin("tiny"), use, None)
    assert line in told
    assert re.findall(r"^- (\S+) ", told, re.MULTILINE) == said


# ---- scores


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A run directory with an adapter, its card, and scores of it and of its base."""
    run = tmp_path / "my-run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    text = f"---\nlicense: mit  # mine\ntags: [lora]\n---\n\n# Mine\n\n{START}\n{NONE_YET}\n{END}\n\nMy own words.\n"
    (run / "adapter" / "README.md").write_text(text)
    sha256 = sha256_of(run / "adapter" / "adapter_model.safetensors")
    tell(run, "test", sha256, adapter=str(run / "adapter"))
    tell(run, "test-base", sha256, adapter=None)
    return run


def tell(run: Path, name: str, sha256: str, *, adapter: str | None, **more: Any) -> None:
    told = {
        "scores": {"rouge-1": ROUGE},
        "samples": 12,
        "adapter": adapter,
        "data": ["/home/me/secret/rows.jsonl"],
        "decoding": {"max_new_tokens": 512, "precision": "fp32"},
        "inputs": {"adapter_sha256": sha256},
    }
    (run / "eval" / name).mkdir(parents=True, exist_ok=True)
    (run / "eval" / name / "scores.json").write_text(json.dumps(told | more))


def test_scores_are_written_and_all_else_stays_letter_by_letter(scored: Path) -> None:
    path = scored / "adapter" / "README.md"
    mine = path.read_text().replace("\n", "\r\n")  # of an editor on another system
    path.write_text(mine, newline="")
    assert refresh_cards(scored) == [path]
    text = path.read_bytes().decode()
    assert "| rouge-1 | 8.45 | 8.45 | `style:chatlora\\|words:jieba` |" in text
    assert "secret" not in text
    (result,) = results_in(text)
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("rows.jsonl", "test", "rouge")
    without = re.sub(r"model-index:\n(?:(?:  |- ).*\n)*", "", text)
    assert re.sub(f"{START}.*{END}", "", without, flags=re.DOTALL) == re.sub(
        f"{START}.*{END}", "", mine, flags=re.DOTALL
    )
    assert refresh_cards(scored) == []

    shutil.rmtree(scored / "eval")
    assert refresh_cards(scored) == [path]
    assert path.read_bytes().decode().replace("\r\n", "\n") == mine.replace("\r\n", "\n")


def test_results_of_others_stay_and_a_card_without_the_marks_too(scored: Path) -> None:
    path = scored / "adapter" / "README.md"
    other = (
        "model-index:\n- name: Mine\n  results:\n  - task: {type: text-generation}\n    dataset: {type: x, name: X}\n"
        "    metrics:\n    - {type: accuracy, value: 0.5}\nlanguage: en\n"
    )
    path.write_text(path.read_text().replace("tags: [lora]\n", other))
    refresh_cards(scored)
    data = read(path.read_text())
    assert [one.metric_type for one in results_in(path.read_text())] == ["rouge", "accuracy"]
    assert (data.model_name, data.language) == ("Mine", "en")

    for text in (path.read_text().replace(END, ""), path.read_text() + f"{START}\n{END}\n"):
        assert with_scores(text, "my-run", []) == text
    odd = path.read_text().replace(
        "results:", "results: 3 #", 1
    )  # metadata of another form stays, the section is filled
    assert with_scores(odd, "my-run", []).partition("# Mine")[0] == odd.partition("# Mine")[0]


def test_scores_of_other_weights_or_in_broken_files_are_none_of_it(scored: Path) -> None:
    sha256 = sha256_of(scored / "adapter" / "adapter_model.safetensors")
    tell(scored, "of-others", "0" * 64, adapter="/elsewhere")
    tell(scored, "validation", sha256, adapter=str(scored / "adapter"))
    tell(scored, "validation-base", sha256, adapter=None, inputs={"adapter_sha256": sha256, "max_new_tokens": 9})
    (scored / "eval" / "cut").mkdir()
    (scored / "eval" / "cut" / "scores.json").write_text('{"scores": {"rou')
    found = scores_of(scored, scored / "adapter")
    assert [(one.name, one.base is not None) for one in found] == [("test", True), ("validation", False)]
    (scored / "adapter" / "adapter_model.safetensors").write_bytes(b"trained on")
    assert scores_of(scored, scored / "adapter") == []


def test_a_full_disk_leaves_the_card_as_it_was_and_no_litter(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        there.extend(str(path.relative_to(scored)) for path in scored.rglob(".*"))
        raise OSError(errno.ENOSPC, "no space left")

    before, there = {path: path.read_bytes() for path in scored.rglob("*") if path.is_file()}, list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            refresh_cards(scored)
    assert {path: path.read_bytes() for path in scored.rglob("*") if path.is_file()} == before
    (beside,) = there  # a killed process leaves it in the run, not in the folder that is published
    assert "/" not in beside


def test_a_card_that_cannot_be_written_costs_no_scores(scored: Path) -> None:
    from chatlora.evaluation.setup import _told_to_cards

    (scored / "adapter" / "README.md").write_bytes("Öl".encode("latin-1"))
    (line,) = _told_to_cards(scored)
    assert line.startswith("the scores are not in the run's cards")
    (scored / "adapter" / "README.md").unlink()
    assert _told_to_cards(scored) == []
    assert [each.name for each in (scored / "adapter").iterdir()] == ["adapter_model.safetensors"]
