"""train.py from the outside: what it leaves on disk, that it repeats itself, and how it tells mistakes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train
from chatlora.config_files import load_config
from chatlora.errors import ConfigError, LaunchError, ModelError, NonFiniteError
from chatlora.run_directory import read_status
from chatlora.run_log import read_log
from chatlora.training.schedule import Schedule
from tests.engine_runs import environment_of
from tests.fork_server import ForkServer
from tests.runs import noted
from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
Run = Callable[..., Path]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_what_it_promises(run: Run, world: Path) -> None:
    folder = run()
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "status.json",
        "ledger.json",
        "log.jsonl",
        "validation.jsonl",
        "adapter",
        "adapter-best",
        "checkpoints",
    }
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "tokenizer.json",
    }
    assert read_status(folder)["state"] == "done"
    (account,) = json.loads((folder / "ledger.json").read_text())["sources"]
    assert account["rows_read"] == 72 == account["rows_used"] + account["rows_held_out"] + len(account["set_aside"])
    log = read_log(folder / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    assert log[-1]["epoch"] == 2
    assert log[-1]["loss"] < log[0]["loss"]
    assert sum(line["num_targets"] for line in log) == 2 * account["targets"]
    validation = read_log(folder / "validation.jsonl")
    assert [line["step"] for line in validation] == [5, 10] == [5, len(log)]
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000005", "step-000010"]


def test_the_learning_rate_in_the_log_is_the_closed_form(run: Run, world: Path) -> None:
    config = load_config([str(world / "my.yaml")], default="demo").config
    log = read_log(run() / "log.jsonl")
    schedule = Schedule(config.optim, len(log) // 2, 5)
    assert [line["learning_rate"] for line in log] == [schedule.learning_rate(step) for step in range(len(log))]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(run: Run) -> None:
    one, again, other = adapter_of(run()), adapter_of(run(name="again")), adapter_of(run("--run.seed", "1", name="o"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_budget_of_a_micro_batch_changes_nothing(run: Run) -> None:
    flags = ("--lora.dropout", "0")
    large, small = run(*flags), run(*flags, "--optim.max_tokens_per_micro_batch", "256", name="small")
    for one, other in zip(read_log(large / "log.jsonl"), read_log(small / "log.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_the_adapter_loads_in_plain_peft_in_another_process(run: Run, world: Path) -> None:
    """Same logits as the model had when training ended, without network and without this package."""
    folder = run()
    code = (
        "import sys, torch, json\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"base = AutoModelForCausalLM.from_pretrained('{world}/model')\n"
        f"model = PeftModel.from_pretrained(base, '{folder}/adapter').eval()\n"
        f"tokenizer = AutoTokenizer.from_pretrained('{folder}/adapter')\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Where is Oslo?'}], return_tensors='pt',"
        " add_generation_prompt=True)['input_ids']\n"
        "assert 'chatlora' not in sys.modules\n"
        "print(json.dumps([ids.tolist(), model(ids).logits.double().tolist(), base.name_or_path]))\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin", "http_proxy": "http://127.0.0.1:9"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert told.returncode == 0, told.stderr
    ids, logits, base_name = json.loads(told.stdout)
    assert base_name == json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    from chatlora.model.loading import load_for_inference

    model, _ = load_for_inference(folder)
    ours = model(torch.tensor(ids)).logits.double()
    assert float((ours - torch.tensor(logits)).abs().max()) <= 1e-5
    with model.disable_adapter():
        assert float((model(torch.tensor(ids)).logits.double() - ours).abs().max()) > 1e-2


def test_logits_after_loading_are_those_of_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained module itself, kept from the run, against the saved adapter."""
    kept: list[Any] = []
    from chatlora.training import setup

    load_model = setup.load_model
    monkeypatch.setattr(setup, "load_model", lambda *given: noted(kept, load_model(*given)))
    folder = run()
    ids = torch.arange(20)[None]
    trained = kept[0][0].eval()
    trained.get_base_model().set_attn_implementation("sdpa")
    fresh = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(trained.get_base_model().name_or_path), str(folder / "adapter")
    )
    with torch.no_grad():
        assert float((trained(ids).logits - fresh(ids).logits).abs().max()) <= 1e-5


def test_a_finished_run_says_so_and_is_not_run_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    before = (folder / "log.jsonl").read_bytes()
    run()
    assert "is finished" in capsys.readouterr().out
    assert (folder / "log.jsonl").read_bytes() == before


def test_another_trajectory_in_the_same_directory_is_refused_by_name(run: Run) -> None:
    run()
    with pytest.raises(ConfigError, match=r"optim\.learning_rate is 0\.1, but the run in run was begun with 0\.005"):
        run("--optim.learning_rate", "0.1")


def test_its_config_repeats_a_run_elsewhere(run: Run, tmp_path: Path) -> None:
    first = run()
    train.main([str(first / "config.yaml"), "--run.output_dir", "repeated"])
    one, other = adapter_of(first), adapter_of(tmp_path / "repeated")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_a_directory_the_name_is_the_config_and_its_hash(world: Path, run: Run, tmp_path: Path) -> None:
    train.main([str(world / "my.yaml"), "--optim.max_steps", "1"])
    train.main([str(world / "my.yaml"), "--optim.max_steps", "1", "--run.cpu_threads", "2"])
    train.main([str(world / "my.yaml"), "--optim.max_steps", "1", "--lora.rank", "2"])
    assert len(list((tmp_path / "runs").glob("my-????????"))) == 2


def test_a_second_process_in_the_same_directory_is_refused(run: Run, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(LaunchError, match="another process is training in run"):
        run()


def test_a_non_finite_gradient_updates_nothing_and_names_the_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatlora.distributed.runtime import Runtime
    from chatlora.training import setup

    prepared: list[Any] = []
    prepare = setup.prepare_for_engine
    monkeypatch.setattr(setup, "prepare_for_engine", lambda *a, **b: noted(prepared, prepare(*a, **b)))
    backward, calls = Runtime.backward, []

    def poisoned(self: Runtime, loss: torch.Tensor) -> None:
        calls.append(loss)
        backward(self, loss * float("inf") if len(calls) == 3 else loss)

    monkeypatch.setattr(Runtime, "backward", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        run()
    told = str(caught.value)
    assert "rows.jsonl:" in told
    assert "optim.learning_rate" in told
    assert read_status(Path("run"))["state"] == "failed"
    assert all(p.isfinite().all() for p in prepared[0][0].parameters())


@pytest.mark.parametrize(
    ("flags", "error", "sentence"),
    [
        (["--data.train", "none.jsonl"], ConfigError, "data.train: none.jsonl: no such file"),
        (["--model.name_or_path", "./no-such-folder"], ConfigError, "does not exist"),
        (["--lora.target_modules", "[q_porj]"], ModelError, "did you mean 'q_proj'?"),
        (["--data.train", "null"], ConfigError, "data.train"),
        (["--model.chat_template", "none.jinja"], ConfigError, "model.chat_template"),
    ],
)
def test_mistakes_are_told_with_their_remedy(run: Run, flags: list[str], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        run(*flags)
    assert sentence in str(caught.value)


def test_bad_rows_end_with_status_2_and_without_a_traceback(world: Path, run: Run) -> None:
    first, *rows = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    bad = ['{"messages": [{"role": "asistant", "content": "x"}]}', '{"messages": [{"role": "user", "content": "x"']
    Path("bad.jsonl").write_text("\n".join([first, *bad, *rows]) + "\n", encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "train.py"), str(world / "my.yaml"), "--data.train", "bad.jsonl"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "Traceback" not in told.stderr
    assert all(f"bad.jsonl:{number}" in told.stderr for number in (2, 3))
    assert "did you mean 'assistant'?" in told.stderr


def test_a_base_model_without_a_template_is_told_the_setting(world: Path, run: Run, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.save_pretrained(tmp_path / "bare")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        run("--model.name_or_path", str(tmp_path / "bare"))
    (tmp_path / "chatml.jinja").write_text(AutoTokenizer.from_pretrained(world / "model").chat_template)
    folder = run("--model.name_or_path", str(tmp_path / "bare"), "--model.chat_template", "chatml.jinja", name="two")
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template


def test_two_processes_compute_what_one_computes(world: Path, run: Run, server: ForkServer, tmp_path: Path) -> None:
    flags = ("--lora.dropout", "0", "--optim.epochs", "1")
    argv = [str(world / "my.yaml"), "--run.output_dir", "two", *flags]
    assert server.run(argv, tmp_path, ranks=2, environment=environment_of("multi_gpu")) == [0, 0]
    assert json.loads(Path("two/environment.json").read_text())["engine"] == "ddp"
    one = run(*flags)
    assert json.loads((one / "environment.json").read_text())["engine"] == "single"
    for mine, theirs in zip(read_log(one / "log.jsonl"), read_log(Path("two/log.jsonl")), strict=True):
        assert mine["num_targets"] == theirs["num_targets"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-6)
    alone, together = adapter_of(one), adapter_of(tmp_path / "two")
    for name in alone:
        assert float((alone[name] - together[name]).norm() / alone[name].norm().clamp(min=1e-3)) < 2e-5


REAL = [
    ("kdconv_travel.jsonl", None),
    ("e2e.jsonl", None),
    ("identity.json", None),
    ("glaive_toolcall_zh_demo.json", "qwen2_5.jinja"),
    ("glaive_toolcall_en_demo.json", "qwen2_5.jinja"),
]


@pytest.mark.parametrize(("file", "template"), REAL)
def test_real_data_every_row_trained_on_or_named(
    shared: Path, smollm2: Path, run: Run, tmp_path: Path, file: str, template: str | None
) -> None:
    """SmolLM2's tokenizer and template over the whole file; a small random model takes its steps."""
    import trl

    model = tmp_path / "small"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(model)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, num_key_value_heads=1)).save_pretrained(model)
    flags = ["--model.name_or_path", str(model), "--data.train", str(shared / "data" / file)]
    flags += ["--data.max_length", "2048", "--optim.max_tokens_per_micro_batch", "2048", "--optim.max_steps", "6"]
    flags += ["--optim.global_batch_size", "4", "--optim.learning_rate", "2e-2", "--data.validation", "0"]
    if template:
        flags += ["--model.chat_template", str(Path(trl.__file__).parent / "chat_templates" / template)]
    folder = run(*flags)
    (account,) = json.loads((folder / "ledger.json").read_text())["sources"]
    assert account["rows_read"] == account["rows_used"] + account["rows_held_out"] + len(account["set_aside"])
    assert account["rows_used"] > 0.8 * account["rows_read"]
    assert all(entry["place"] and entry["reason"] for entry in account["set_aside"])
    log = read_log(folder / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
