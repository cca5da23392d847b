"""Converting a checkpoint's files: every byte accounted for, little memory, kills, damage, and what is refused.

Run: pytest tests/chatglm3/test_chatglm3_conversion.py          (all 28 layers of the 6B model: -m slow)
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from chatlora.chatglm3.checkpoint import convert_checkpoint
from chatlora.chatglm3.naming import fused_rows, known_tensors
from chatlora.disk import sha256_of
from chatlora.errors import ModelError
from tests.chatglm3_checkpoints import TINY, write_checkpoint
from tests.runs import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
MB = 2**20
SIX_B = TINY | {
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "seq_length": 8192,
}


def convert(source: Path, target: Path) -> list[str]:
    lines: list[str] = []
    convert_checkpoint(source, target, lines.append)
    return lines


def native_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def flip(path: Path, position: int) -> None:
    """Change one bit. position: bytes from the start, or from the end if negative."""
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def assert_converted(original: dict[str, torch.Tensor], config: dict[str, Any], target: Path) -> None:
    found = native_weights(target)
    q, k, v = fused_rows(config)
    for name, known in known_tensors(config).items():
        sizes = [q, k, v] if len(known.parts) == 3 else [len(original[name])]
        for part, rows in zip(known.parts, original[name].split(sizes), strict=bool(known.parts)):
            assert torch.equal(found.pop(part.name), rows), part.name
    assert not found


# ---- what comes out


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tensor_arrives_bit_for_bit(tmp_path: Path, suffix: str, num_shards: int, dtype: torch.dtype) -> None:
    weights = write_checkpoint(tmp_path / "old", TINY, num_shards=num_shards, suffix=suffix, dtype=dtype)
    convert(tmp_path / "old", tmp_path / "new")
    assert_converted(weights, TINY, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert (type(model).__name__, model.dtype) == ("GlmForCausalLM", dtype)
    assert GenerationConfig.from_pretrained(tmp_path / "new").eos_token_id == [2, 64795, 64797]


def test_an_old_pickle_is_read_too(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "old", TINY, suffix="bin")
    torch.save(weights, tmp_path / "old/pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old", tmp_path / "new")
    assert_converted(weights, TINY, tmp_path / "new")


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "old", TINY)
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"never opened")
    convert(tmp_path / "old", tmp_path / "new")
    assert_converted(weights, TINY, tmp_path / "new")


def test_the_receipt_names_every_tensor_with_its_hash(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", TINY, num_shards=2)
    convert(tmp_path / "old", tmp_path / "new")
    receipt = json.loads((tmp_path / "new/conversion.json").read_text())
    assert receipt["state"] == "verified"
    hashed = {name: digest for entry in receipt["shards"].values() for name, digest in entry["tensors"].items()}
    left_out = [name for entry in receipt["shards"].values() for name in entry["left_out"]]
    assert left_out == ["transformer.rotary_pos_emb.inv_freq"]
    assert {*hashed, *left_out} == set(known_tensors(TINY))
    assert all(len(digest) == 64 for digest in hashed.values())


# ---- interruption and damage


def test_a_finished_conversion_is_checked_again_and_a_flipped_byte_is_found(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "old", TINY, num_shards=3)
    convert(tmp_path / "old", tmp_path / "new")
    assert any("is there already" in line for line in convert(tmp_path / "old", tmp_path / "new"))
    damaged = tmp_path / "new/model-00002-of-00003.safetensors"
    flip(damaged, -7)
    with pytest.raises(ModelError, match=r"model-00002-of-00003.safetensors: is damaged: model.layers.\S+ is not what"):
        convert(tmp_path / "old", tmp_path / "new")
    damaged.unlink()  # the remedy
    convert(tmp_path / "old", tmp_path / "new")
    assert_converted(weights, TINY, tmp_path / "new")


def test_a_byte_that_flips_in_the_original_after_its_shard_was_converted_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", TINY, num_shards=3)
    convert(tmp_path / "old", tmp_path / "new")
    flip(tmp_path / "old/model-00001-of-00003.safetensors", -7)
    with pytest.raises(ModelError, match=r"model-00001-of-00003.safetensors: transformer.* is not what it was"):
        convert(tmp_path / "old", tmp_path / "new")


def test_a_byte_that_flips_while_a_shard_is_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "old", TINY)
    replace = Path.replace

    def damage(path: Path, target: Path) -> Path:
        if path.suffix == ".partial" and ".safetensors." in path.name:
            flip(path, -7)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", damage)
    with pytest.raises(ModelError, match="is damaged"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new/config.json").exists(), "what is not verified cannot be loaded"


def test_a_damaged_download_is_found_by_the_hub_s_hash(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", TINY)
    notes = tmp_path / "old/.cache/huggingface/download"
    notes.mkdir(parents=True)
    weights = tmp_path / "old/model.safetensors"
    (notes / "model.safetensors.metadata").write_text(f"{'c' * 40}\n{sha256_of(weights)}\n1700000000.0\n")
    convert(tmp_path / "old", tmp_path / "sound")
    flip(weights, -7)
    with pytest.raises(ModelError, match=r"model.safetensors: is damaged: its sha256 is not the model hub's"):
        convert(tmp_path / "old", tmp_path / "new")


def test_a_damaged_pickle_is_found_by_its_own_checksum(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", TINY, suffix="bin")
    path = tmp_path / "old/pytorch_model.bin"
    flip(path, path.read_bytes().index(load_bytes(path)))
    with pytest.raises(ModelError, match=r"pytorch_model.bin: is damaged"):
        convert(tmp_path / "old", tmp_path / "new")


def load_bytes(path: Path) -> bytes:
    return bytes(torch.load(path, weights_only=True)["transformer.output_layer.weight"].numpy().tobytes()[:64])


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_shard_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    for suffix, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        folder = tmp_path / suffix
        write_checkpoint(folder, TINY, suffix=suffix)
        (folder / name).write_bytes((folder / name).read_bytes()[:size])
        with pytest.raises(ModelError, match=f"{name}: "):
            convert(folder, tmp_path / "new")


# ---- the 6B model's true shapes


def write_six_b(folder: Path, num_layers: int) -> None:
    """Shards as the original's: the embedding with the first layers, the head with the last ones. Random fp16 bits."""
    config = SIX_B | {"num_layers": num_layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = list(known_tensors(config))
    layers = [name for name in names if ".layers." in name]
    groups = [names[:1], *(layers[i : i + 28] for i in range(0, len(layers), 28)), names[1:4]]
    if num_layers == 2:
        groups = [names[:1], layers[:7], layers[7:], names[1:4]]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_random(folder / file, {name: known_tensors(config)[name].shape for name in group})
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    noise = np.random.default_rng(len(shapes)).bytes(32 * MB + 4093)  # a length that no tensor repeats at its rows
    header, position = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + 2 * prod(shape)]}
        position += 2 * prod(shape)
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        while position > 0:
            position -= file.write(noise[:position])


def start(source: Path, target: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chatlora", "convert-chatglm3", str(source), str(target)]
    with source.with_name("told.txt").open("wb") as told:
        return subprocess.Popen(command, cwd=REPOSITORY, stderr=told)


def finish(process: subprocess.Popen[bytes]) -> int:
    """The most memory that the process held, in bytes. Not from getrusage, which begins with its parent's."""
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        peak = int(found[1]) * 1024 if found else peak
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, emptied at once: pytest keeps the folders of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_two_layers_of_the_6b_model_survive_a_kill_in_little_memory_and_a_flipped_byte_is_found(room: Path) -> None:
    source, target = room / "old", room / "new"
    write_six_b(source, num_layers=2)
    killed = start(source, target)
    wait_until(lambda: any(target.glob(".model-00002-of-00004.safetensors.*.partial")))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (target / "config.json").exists()

    peak = finish(start(source, target))
    assert "model-00001-of-00004.safetensors is there already" in (room / "told.txt").read_text()
    largest_shard = max(file.stat().st_size for file in source.glob("*.safetensors"))
    assert peak <= largest_shard + 1e9, "the promise"
    assert peak <= 300 * MB, "what streaming really takes, the same for a shard of any size"
    assert_same_rows(source, target, num_layers=2)

    flip(target / "model-00003-of-00004.safetensors", 200 * MB)
    with pytest.raises(ModelError, match=r"model-00003-of-00004.safetensors: is damaged: model.layers.1.mlp"):
        convert(source, target)


def assert_same_rows(source: Path, target: Path, num_layers: int) -> None:
    config = SIX_B | {"num_layers": num_layers}
    old, new = (
        {
            name: file
            for path in folder.glob("*.safetensors")
            for file in [safe_open(path, "np")]
            for name in names(file)
        }
        for folder in (source, target)
    )
    for name, known in known_tensors(config).items():
        if name.endswith(("query_key_value.weight", "query_key_value.bias", "norm.weight")):
            rows = np.concatenate([new[part.name].get_tensor(part.name) for part in known.parts])
            assert np.array_equal(old[name].get_tensor(name).view(np.uint16), rows.view(np.uint16)), name
    assert set(new) == {part.name for known in known_tensors(config).values() for part in known.parts}


def names(file: Any) -> list[str]:
    return list(file.keys())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_28_layers_of_the_6b_model(room: Path) -> None:
    write_six_b(room / "old", num_layers=28)
    peak = finish(start(room / "old", room / "new"))
    assert peak <= 300 * MB
    assert_same_rows(room / "old", room / "new", num_layers=28)
    with torch.device("meta"):
        assert (
            len(AutoModelForCausalLM.from_pretrained(room / "new", device_map="meta").state_dict()) == 199 + 2 * 2 * 28
        )


@pytest.mark.slow
def test_a_pickle_of_the_6b_model_s_shapes_takes_no_more_memory_than_itself(room: Path) -> None:
    config = SIX_B | {"num_layers": 2}
    (room / "old").mkdir()
    (room / "old/config.json").write_text(json.dumps(config))
    path = room / "old/pytorch_model.bin"
    torch.save({name: torch.ones(known.shape).half() for name, known in known_tensors(config).items()}, path)
    assert finish(start(room / "old", room / "new")) <= path.stat().st_size + 500 * MB


# ---- what is refused


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def put(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    """Add or replace a tensor; None: take it out."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights.pop(name, None)
        save_file(weights if tensor is None else {**weights, name: tensor}, folder / "model.safetensors")

    return change


def write_file(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


NORM = "transformer.encoder.final_layernorm.weight"
PREFIX = "transformer.prefix_encoder.embedding.weight"
CODE = 'SPECIAL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]'
NAMED = '{"name_or_path": "THUDM/chatglm2-6b", "tokenizer_class": "ChatGLMTokenizer"}'
FIRST = {"inner_hidden_size": 16384, "position_encoding_2d": True, "padded_vocab_size": ...}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "ChatGLM-6B": (change_config(**FIRST), "is ChatGLM-6B"),
    "ChatGLM2 by its name": (change_config(_name_or_path="THUDM/chatglm2-6b"), "is ChatGLM2"),
    "ChatGLM2 by its tokenizer's name": (write_file("tokenizer_config.json", NAMED), "is ChatGLM2"),
    "ChatGLM2 by its code": (write_file("tokenization_chatglm.py", CODE), "is ChatGLM2"),
    "ChatGLM2 by its length": (change_config(_name_or_path="/data/model", seq_length=32768), "is ChatGLM2"),
    "GLM-4-9B": (change_config(padded_vocab_size=151552), "is GLM-4-9B, which has native checkpoints"),
    "native already": (change_config(model_type="glm"), "native `glm` checkpoint already"),
    "Llama": (change_config(model_type="llama"), "a model of the type 'llama'"),
    "quantised by its config": (change_config(quantization_bit=4), "weights are quantised"),
    "quantised by its tensors": (put(NORM, torch.ones(16, dtype=torch.int8)), "quantised weights cannot be converted"),
    "P-Tuning by its config": (change_config(pre_seq_len=128), "P-Tuning prefix"),
    "P-Tuning by its tensors": (put(PREFIX, torch.ones(2, 2)), "P-Tuning prefix"),
    "another norm": (change_config(rmsnorm=False), "rmsnorm is False"),
    "biases": (change_config(add_bias_linear=True), "add_bias_linear is True"),
    "a number that is none": (change_config(num_layers="28"), "num_layers is '28', not a positive number"),
    "a broken rope ratio": (change_config(rope_ratio=0), "rope_ratio is 0"),
    "an unknown tensor": (put("transformer.extra", torch.ones(2)), "1 tensors are not known: transformer.extra"),
    "a missing tensor": (put(NORM, None), f"1 tensors are missing: {NORM}"),
    "another shape": (put(NORM, torch.ones(17)), r"has the shape \[17\], and by config.json it should have \[16\]"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a broken config": (write_file("config.json", "{"), "config.json: cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_chatglm3_is_refused_by_name_and_reason(tmp_path: Path, case: str) -> None:
    change, reason = REFUSED[case]
    write_checkpoint(tmp_path / "old", TINY)
    change(tmp_path / "old")
    with pytest.raises(ModelError, match=reason):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new/config.json").exists()


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", TINY)
    change_config(rmsnorm=False, pre_seq_len=8, hidden_size=None)(tmp_path / "old")
    with pytest.raises(ModelError) as caught:
        convert(tmp_path / "old", tmp_path / "new")
    assert len(caught.value.problems) == 3


def test_a_missing_shard_and_a_wrong_index_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", TINY, num_shards=3, suffix="bin")
    second = tmp_path / "old/pytorch_model-00002-of-00003.bin"
    shutil.copy(tmp_path / "old/pytorch_model-00001-of-00003.bin", second)
    with pytest.raises(ModelError, match=r"00002-of-00003.bin: holds other tensors than the index says"):
        convert(tmp_path / "old", tmp_path / "new")
    second.unlink()
    with pytest.raises(ModelError, match=r"00002-of-00003.bin: is missing"):
        convert(tmp_path / "old", tmp_path / "other")
    (tmp_path / "old/pytorch_model.bin.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ModelError, match="is no index of a checkpoint"):
        convert(tmp_path / "old", tmp_path / "other")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["EVIL_FOLDER"])),)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "was-here"))
    weights = write_checkpoint(tmp_path / "old", TINY, suffix="bin")
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({**weights, NORM: Evil()}, tmp_path / "old/pytorch_model.bin")
        with pytest.raises(ModelError, match="holds more than tensors"):
            convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "was-here").exists()


def test_the_target_must_be_new_or_the_same_conversion(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", TINY)
    with pytest.raises(ModelError, match="give another one for the result"):
        convert(tmp_path / "old", tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new")
    write_checkpoint(tmp_path / "other", TINY | {"num_layers": 3})
    with pytest.raises(ModelError, match="holds a conversion of other files"):
        convert(tmp_path / "other", tmp_path / "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match=r"is not empty \(thesis.txt\)"):
        convert(tmp_path / "old", tmp_path / "mine")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "old", TINY)
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ModelError, match=r"GB free, and .* GB are needed"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.safetensors*"))


def test_the_command_tells_mistakes_in_one_block_and_leaves_with_2(tmp_path: Path) -> None:
    assert start(tmp_path / "nowhere", tmp_path / "new").wait() == 2
    told = (tmp_path / "told.txt").read_text()
    assert "has no config.json; give the folder of a ChatGLM3 checkpoint" in told
    assert "Traceback" not in told
