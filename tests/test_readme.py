"""What the READMEs claim is checked: their tree, their commands, their example.

`python tests/test_readme.py` prints the tree as it should stand in README.md.
"""

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = ("README.md", "README.zh.md")
FOLDERS = (
    "reading",
    "rendering",
    "data",
    "distributed",
    "model",
    "inspection",
    "chatglm3",
    "training",
    "evaluation",
    "chat",
    "pages",
    "commands",
)


def tree() -> str:
    """Every module of the project with the first sentence of its docstring."""
    lines = [described(REPOSITORY / name, "") for name in ("train.py", "evaluate.py")]
    package = REPOSITORY / "chatlora"
    lines += ["chatlora/", *(described(path, "  ") for path in modules(package))]
    for folder in FOLDERS:
        if (package / folder).is_dir():
            lines += [f"  {folder}/", *(described(path, "    ") for path in modules(package / folder))]
    return "\n".join(lines)


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def described(path: Path, indent: str) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(docstring.split("\n\n")[0].split())
    first = re.split(r"(?<=[.])\s", sentence)[0].rstrip(".")
    return f"{indent}{path.name:<{24 - len(indent)}} {first}"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_tree_is_the_house() -> None:
    assert tree() in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_files_and_presets_that_are_named_exist(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (REPOSITORY / link).exists(), link
    for config in re.findall(r"accelerate_configs/([a-z0-9_]+\.yaml)", text):
        assert (REPOSITORY / "accelerate_configs" / config).is_file(), config


def test_both_readmes_give_the_same_commands() -> None:
    """Comments are translated, commands are not."""
    english, chinese = (
        [
            re.sub(r"\s+#.*", "", line)
            for block in blocks((REPOSITORY / name).read_text(encoding="utf-8"), "bash")
            for line in block.splitlines()
        ]
        for name in FILES
    )
    assert english == chinese


def test_both_readmes_name_the_same_versions_that_were_tried_last() -> None:
    """Which these are is printed by .ci/newest.py, beside what it has just tried."""
    libraries = ("transformers", "peft", "accelerate", "datasets", "torch")
    english, chinese = (
        re.findall(rf"\b({'|'.join(libraries)}) (\d[\d.]*\d)", (REPOSITORY / name).read_text(encoding="utf-8"))
        for name in FILES
    )
    assert {name for name, _ in english} == set(libraries)
    assert set(english) == set(chinese)


def test_every_command_is_one_that_the_project_has() -> None:
    """Programs, scripts, subcommands and settings of all command lines, without running hours of training."""
    from chatlora.commands import COMMANDS
    from chatlora.config_files import load_config

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for line in (line for block in blocks(text, "bash") for line in block.splitlines()):
        words = shlex.split(line.split(" && ")[-1], comments=True)
        if words[:2] == ["pip", "install"]:
            continue
        if "train.py" in words:
            given = [word for word in words[words.index("train.py") + 1 :] if word != "my.yaml"]
            load_config(given if "my.yaml" not in words else ["demo", *given], default="demo")
        elif words and words[0] == "chatlora":
            assert words[1] in COMMANDS
        else:
            assert {"evaluate.py", "pytest", "accelerate"} & set(words), line


def test_six_commands_lead_from_rows_to_a_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's own lines, on a tiny model, whatever they are; the installation is what runs this test."""
    from chatlora.commands import dispatch
    from tests.worlds import make_base, make_rows

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- six commands -->\n```bash\n(.*?)```", text, re.DOTALL)
    install, *lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert shlex.join(install) in text.partition("## Six commands")[0]  # of the lines that .ci/run runs
    assert [words[1] for words in lines] == ["inspect", "train", "evaluate", "chat", "merge"]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one thread: tests run side by side
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATLORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    make_rows(tmp_path / "my.jsonl", 200)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Where is Oslo?\n")))  # chat is told by a pipe
    for words in lines:
        dispatch(words[1:])
        told = capsys.readouterr()
        assert told.out or told.err, words
    scores = json.loads((tmp_path / "runs/my/eval/test/scores.json").read_text(encoding="utf-8"))
    assert scores["samples"] > 10
    assert "| rouge-1 |" in (tmp_path / "runs/my/adapter/README.md").read_text(encoding="utf-8")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is Oslo?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert merged.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]


def test_prediction_files_are_scored_as_told(tmp_path: Path) -> None:
    row = {"prediction": "今天天气很好", "reference": "今天天气不错"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "evaluate.py"), "--predictions", "predictions.jsonl"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert list(tmp_path.glob("eval/*/scores.json"))


def test_the_example_row_has_the_targets_shown(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    from chatlora import parse_row, render

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (row,), (shown,) = blocks(text, "json"), blocks(text, "text")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    (example,) = render(parse_row(json.loads(row)), tokenizer, max_length=512)
    start = next(i for i, label in enumerate(example.labels) if label != -100)
    end = len(example.labels) - next(i for i, label in enumerate(reversed(example.labels)) if label != -100)
    decode = tokenizer.decode
    marked = f"{decode(example.input_ids[:start])}→{decode(example.input_ids[start:end])}←"
    assert marked == shown.rstrip("\n")


if __name__ == "__main__":
    print(tree())
