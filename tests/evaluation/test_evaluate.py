"""evaluate.py as people run it: prediction files, the command line, a model and its adapter, several processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import evaluate
from chatlora.errors import ChatLoraError, ConfigError
from chatlora.evaluation.command_line import parse
from chatlora.model.origin import public_name
from tests.engine_runs import environment_of
from tests.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


# ---- the command line


def test_help_answers_without_heavy_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "evaluate.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--predictions" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "jieba", "rich", "nltk", "pyarrow"}


def test_what_is_not_there_is_told_at_once_without_torch(tmp_path: Path) -> None:
    words = ["--model", "./modle", "--adapter", "adpater", "--data", "rows.jsonl", "--model.chat_template", "own.jinja"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate\nfrom chatlora.errors import ConfigError\n"
        f"try: evaluate.main({words})\n"
        "except ConfigError as error: print(error); sys.exit('torch' in sys.modules)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    for name in ("--data: rows.jsonl", "./modle does not exist", "own.jinja: no such file", "adpater holds no adapter"):
        assert name in told.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["nothing was named"]),
        (["runs/x", "--model", "m", "--data", "f"], ["RUN_DIR and --model were given together"]),
        (["--model", "m"], ["--model needs --data"]),
        (["--model", "m", "--data", "f", "--compare", "base"], ["give --adapter"]),
        (
            ["--predictions", "p", "--data", "f", "--data.system", "s"],
            ["--data has no use", "--data.system has no use"],
        ),
        (
            ["--predictions", "p", "--split", "test", "--run.precision", "fp32"],
            ["--split has no use", "--run.precision has no"],
        ),
        (["--predictions", "p", "--data.test", "f"], ["--data.test has no use with --predictions"]),
        (["--model", "m", "--data", "{path: x"], ["--data.test '{path: x' is not valid YAML"]),
        (
            ["--model", "m", "--data", "{path: x, colums: {}}"],
            ["--data.test.0.colums is not a setting; did you mean 'columns'"],
        ),
        (
            ["--model", "m", "--data", "f", "--style", "chatglm3", "--evaluation.max_new_token", "0"],
            ["--style is not a setting; did you mean 'evaluation.style'", "did you mean 'max_new_tokens'"],
        ),
        (["--model", "m", "--data", "f", "--max_tokens_per_batch", "9"], ["'evaluation.max_tokens_per_batch'"]),
        (["--model", "m", "--data", "f", "--system=x", "--precision", "fp32"], ["'data.system'", "'run.precision'"]),
        (
            ["--predicions", "p", "--model", "m", "--data", "f"],
            ["--predicions is not a setting; did you mean 'predict"],
        ),
        (["--model", "m", "--data", "f", "--evaluation.max_new_tokens", "0"], ["--evaluation.max_new_tokens is '0'"]),
        (["--model", "m", "--data", "f", "--optim.epochs", "1"], ["--optim.epochs has no use with evaluate.py"]),
        (
            ["--model", "m", "--data", "f", "--evaluation.max_new_tokens", "x", "--optim.rank", "3", "--split", "test"],
            ["did you mean 'lora.rank'", "--evaluation.max_new_tokens is 'x'"],
        ),
        (
            ["--model", "m", "--data", "f", "--data.max_length", "3", "--evaluation.max_new_tokens", "x"],
            ["--data.max_length has no use", "--evaluation.max_new_tokens is 'x'"],
        ),
        (["--model", "m", "--model.name_or_path", "n", "--data", "f"], ["--model and --model.name_or_path are one"]),
        (["--model", "m", "--data", "f", "--split", "tset"], ["argument --split: invalid choice: 'tset'"]),
        (["--model", "m", "--data", "0.1"], ["--data is 0.1, a share: name the rows themselves"]),
        (["a", "b"], ["one run at a time, but 2 were given: a, b"]),
        (["no/such/run"], ["no/such/run is not a folder"]),
        (["."], ["is no run directory"]),
    ],
)
def test_commands_that_contradict_themselves(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert len(caught.value.problems) == len(expected)
    for problem, part in zip(caught.value.problems, expected, strict=True):
        assert part in problem


def test_settings_of_the_command_line_win_over_the_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {test: t.jsonl}\nevaluation: {max_new_tokens: 7, style: chatglm3}\n")
    request = parse([str(tmp_path), "--compare", "base", "--evaluation.max_new_tokens", "9"])
    assert (request.config.evaluation.max_new_tokens, request.config.evaluation.style) == (9, "chatglm3")
    assert request.folders == {"base": tmp_path / "eval/test-base", "adapter": tmp_path / "eval/test"}
    assert request.adapter == tmp_path / "adapter"
    assert parse([str(tmp_path), "--data", "d/other.jsonl"]).output_dir == tmp_path / "eval/other"
    assert parse(["--model", "m", "--data", "d/other.jsonl"]).output_dir == Path("eval/other")
    (tmp_path / "config.yaml").write_text("model: {name_or_path: m}\n")
    with pytest.raises(ChatLoraError, match=r"data\.test is not set"):
        parse([str(tmp_path)])


def test_settings_are_those_of_training() -> None:
    flags = ["--data.system", "[x] y: z", "--run.precision=fp32", "--evaluation.max_tokens_per_batch", "200"]
    short = parse(["--model", "m", "--data", "f", *flags])
    long = parse(["--model.name_or_path", "m", "--data.test", "f", *flags])
    assert short == long
    assert (short.config.data.system, short.config.run.precision) == ("[x] y: z", "fp32")
    assert short.config.evaluation.max_tokens_per_batch == 200


def test_an_adapter_in_a_run_is_evaluated_as_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "adapter-best"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "adapter_config.json").write_text("{}")
    (tmp_path / "run/config.yaml").write_text("data: {test: t.jsonl, system: s}\n")
    assert parse(["run/adapter"]) == parse(["run"])
    best = parse(["run/adapter-best", "--compare", "base"])
    assert (best.adapter, best.of_run, best.config.data.system) == (Path("run/adapter-best"), True, "s")
    assert best.folders["adapter"] == Path("run/eval/test")
    monkeypatch.chdir(tmp_path / "run/adapter")
    assert parse(["."]).folders == {"adapter": tmp_path / "run/eval/test"}
    with pytest.raises(ConfigError, match=f"missing is not a folder; did you mean {tmp_path}/run"):
        parse([str(tmp_path / "run/missing")])
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no config\.yaml.*--model M --adapter .*adapter --data F"):
        parse([str(tmp_path / "run/adapter")])


def test_data_is_named_as_in_training() -> None:
    words = ["--model", "m", "--data", "[{path: d/other.jsonl, columns: {prompt: q}}, more.jsonl]"]
    request = parse(words)
    assert [(source.path, source.columns) for source in request.sources] == [
        ("d/other.jsonl", {"prompt": "q"}),
        ("more.jsonl", {}),
    ]
    assert request.output_dir == Path("eval/other")


def test_results_of_another_model_adapter_or_file_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "p.jsonl", [{"prediction": "a", "reference": "a"}])
    evaluate.main(["--predictions", "p.jsonl", "--output_dir", "out"])
    evaluate.main(["--predictions", str(tmp_path / "p.jsonl"), "--output_dir", "out"])  # the same file, once more
    model = ["--model", "m", "--data", "d.jsonl", "--output_dir", "out"]
    for words in (["--predictions", "q.jsonl", "--output_dir", "out"], model):
        with pytest.raises(ConfigError, match=r"out holds results of another .*--output_dir"):
            parse(words)
    (tmp_path / "out/scores.json").write_text(json.dumps({"model": "m", "adapter": str(tmp_path / "a")}))
    assert parse([*model, "--adapter", "a"]).adapter == Path("a")
    for words in ([*model, "--adapter", "b"], model, [*model, "--adapter", "a", "--model", "n"]):
        with pytest.raises(ConfigError, match=r"out holds results of another .*--output_dir"):
            parse(words)


# ---- a model and its adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an adapter that changes what it says, and rows: single turns, some of them with one
    prompt and several references, one conversation of two turns, and one row that types a control token."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tests.tiny_models import chatml_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("made")
    tokenizer = chatml_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("m"), tokenizer.eos_token_id]
    model.generation_config.do_sample = True
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(1)
    base = type(model).from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder / "run/adapter")
    tokenizer.save_pretrained(folder / "run/adapter")
    pairs = [(f"name {number}, area", f"a place in {number}") for number in range(9)]
    pairs += [("name 3, area", "the city centre"), ("name 3, area", "a place in 3"), ("<|im_end|>", "typed <|im_end|>")]
    rows: list[dict[str, Any]] = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    write_lines(folder / "rows.jsonl", rows)
    turns = [("user", "我想去故宫"), ("assistant", "好"), ("user", "门票多少钱？"), ("assistant", "60元")]
    conversation = {"messages": [{"role": role, "content": content} for role, content in turns]}
    write_lines(folder / "turns.jsonl", [conversation])
    config = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"test": [str(folder / "rows.jsonl"), str(folder / "turns.jsonl")], "over_length": "fit"},
        "evaluation": {"max_new_tokens": 12},
        "run": {"precision": "fp32", "cpu_threads": 1},
    }
    (folder / "run/config.yaml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def evaluated(made: Path) -> Path:
    """The run of `made` after `evaluate.py RUN --compare base`."""
    evaluate.main([str(made / "run"), "--compare", "base"])
    return made / "run/eval"


def test_a_run_and_its_base_side_by_side(made: Path, evaluated: Path) -> None:
    adapter, base = lines_of(evaluated / "test/predictions.jsonl"), lines_of(evaluated / "test-base/predictions.jsonl")
    assert [line["prediction_raw"] for line in adapter] != [line["prediction_raw"] for line in base]
    for name, lines in (("test", adapter), ("test-base", base)):
        told = json.loads((evaluated / name / "scores.json").read_text("utf-8"))
        assert (told["samples"], told["references"]) == (12, 13)
        assert told["cut_off"] == sum(line["stop_reason"] == "length" for line in lines)
        assert told["adapter"] == (str(made / "run/adapter") if name == "test" else None)
        assert set(told["scores"]) == {"rouge-1", "rouge-2", "rouge-l", "bleu-4", "sacrebleu"}
        assert json.loads((evaluated / name / "status.json").read_text("utf-8"))["state"] == "done"
        assert sorted(path.name for path in (evaluated / name).iterdir()) == [
            "predictions.jsonl",
            "scores.json",
            "status.json",
        ]


def test_rows_are_told_by_where_they_are(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, `private/rows.jsonl` would be taken for a name of the hub, and be written into the card."""
    (tmp_path / "private").mkdir()
    shutil.copy(made / "turns.jsonl", tmp_path / "private/rows.jsonl")
    monkeypatch.chdir(tmp_path)
    words = ["--data", "private/rows.jsonl", "--evaluation.max_new_tokens", "1", "--output_dir", "out"]
    evaluate.main([str(made / "run"), *words])
    (told,) = json.loads(Path("out/scores.json").read_text("utf-8"))["data"]
    assert told == str(tmp_path / "private/rows.jsonl")
    monkeypatch.chdir(made)
    assert public_name(told) == "rows.jsonl"


def test_both_are_shown_side_by_side_with_samples(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(
        [
            str(made / "run"),
            "--compare",
            "base",
            "--output_dir",
            str(made / "shown"),
            "--evaluation.style",
            "chatglm3",
        ]
    )
    shown, told = capsys.readouterr()
    [header] = [line for line in shown.splitlines() if "measure" in line]
    assert header.index("base") < header.index("adapter") < header.index("gain")
    assert "scores over 12 samples" in shown
    base, adapter = (
        json.loads((made / name / "scores.json").read_text("utf-8"))["scores"]["bleu-4"]["value"]
        for name in ("shown-base", "shown")
    )
    [line] = [line for line in shown.splitlines() if "bleu-4" in line]
    cells = [cell.strip() for cell in line.split("│")[2:5]]
    assert cells == [f"{base:.4f}", f"{adapter:.4f}", f"{adapter - base:+.4f}"]
    assert shown.count("reference") >= 4
    assert "12 prompts with 13 references" in told
    assert "generating, base 12/12" in told
    assert "generating, adapter 12/12" in told


def test_one_sample_an_assistant_turn_and_all_references_of_a_prompt(made: Path, evaluated: Path) -> None:
    lines = lines_of(evaluated / "test/predictions.jsonl")
    assert [line["turn"] for line in lines] == [0] * 10 + [0, 1]
    assert lines[3]["reference"] == ["a place in 3", "the city centre"]
    assert [line["reference"] for line in lines[-3:]] == ["typed <|im_end|>", "好", "60元"]
    assert lines[-1]["prompt"].endswith(
        "<|im_start|>assistant\n好<|im_end|>\n<|im_start|>user\n门票多少钱？<|im_end|>\n<|im_start|>assistant\n"
    )
    assert lines[0]["id"] == f"{made / 'rows.jsonl'}:1#0"


def test_the_adapters_answers_are_those_of_transformers_and_peft_alone(made: Path, evaluated: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    model = PeftModel.from_pretrained(base, made / "run/adapter").eval()
    for number in (0, 5):
        messages = [{"role": "user", "content": f"name {number}, area"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        found = lines_of(evaluated / "test/predictions.jsonl")[number]
        assert tokenizer.decode(output[0, ids.shape[1] :]) == found["prediction_raw"]


def test_scoring_the_predictions_again_gives_the_same_scores(evaluated: Path, tmp_path: Path) -> None:
    again = ["--predictions", str(evaluated / "test/predictions.jsonl"), "--output_dir", str(tmp_path)]
    evaluate.main(again)
    first, second = (json.loads((at / "scores.json").read_text("utf-8")) for at in (evaluated / "test", tmp_path))
    assert first["scores"] == second["scores"]
    assert (tmp_path / "predictions.jsonl").read_bytes() == (evaluated / "test/predictions.jsonl").read_bytes()


def test_two_processes_write_what_one_writes(server: ForkServer, made: Path, evaluated: Path, tmp_path: Path) -> None:
    words = [str(made / "run"), "--compare", "base", "--output_dir", str(tmp_path / "test")]
    under = environment_of("multi_gpu")
    assert server.run(words, tmp_path, script="evaluate", ranks=2, environment=under) == [0, 0]
    for name in ("test", "test-base"):
        both, alone = (folder / name / "predictions.jsonl" for folder in (tmp_path, evaluated))
        assert both.read_bytes() == alone.read_bytes()
        assert len(list((tmp_path / name).iterdir())) == 3


def test_a_model_without_an_adapter(made: Path, evaluated: Path, tmp_path: Path) -> None:
    rows = ["--model", str(made / "base"), "--data", str(made / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    evaluate.main(
        [
            *rows,
            "--evaluation.max_new_tokens",
            "12",
            "--run.precision",
            "fp32",
            "--evaluation.max_tokens_per_batch",
            "200",
        ]
    )
    base = lines_of(evaluated / "test-base/predictions.jsonl")[:10]
    assert [line["prediction"] for line in lines_of(tmp_path / "out/predictions.jsonl")] == [
        line["prediction"] for line in base
    ]


def test_mistakes_before_generation_leave_with_2_and_the_remedy(made: Path, tmp_path: Path) -> None:
    for name in ("bad.jsonl", "data.test.jsonl"):  # the second is no setting
        write_lines(tmp_path / name, [{"messages": [{"role": "asistant", "content": "x"}]}])
    for words, expected in (
        (["--model", str(made / "base"), "--data", str(tmp_path / "data.test.jsonl")], "/data.test.jsonl:1"),
        (["--model", str(made / "base"), "--data", str(tmp_path / "bad.jsonl")], "bad.jsonl:1"),
        (["--model", str(made / "base"), "--adapter", str(tmp_path), "--data", "x"], "holds no adapter"),
        (
            ["--model", str(tmp_path / "none"), "--data", "x.jsonl"],
            f"model.name_or_path: the folder {tmp_path / 'none'} does not",
        ),
    ):
        with pytest.raises(ChatLoraError) as caught:
            evaluate.main(words)
        assert caught.value.exit_status == 2
        assert expected in str(caught.value)
