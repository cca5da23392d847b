"""A LoRA adapter of the original model -> one of the native model that computes the same function.

The fused `query_key_value` has one A [r, hidden] and one B [rows, r]. Its rows are q's, k's and v's, so each of the
three gets a copy of A and its own rows of B. Other modules are renamed. Trained further, the three copies of A go their
own ways.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chatlora.chatglm3.naming import FUSED, MODULES
from chatlora.disk import write_json, written_beside
from chatlora.errors import ModelError
from chatlora.model.folder import CHANGE_THE_BASE
from chatlora.weights.shards import Shard, Stored, open_shard, write_safetensors

KEPT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "task_type")
MUST_BE_EMPTY = ("fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication")
OUTSIDE_LAYERS = {"output_layer": "lm_head", "embedding.word_embeddings": "model.embed_tokens"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_NAME = re.compile(
    r"base_model\.model\.transformer\.(?:encoder\.layers\.(?P<layer>\d+)\.)?(?P<module>[\w.]+?)"
    r"\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?P<end>\.weight)?"
)


class Factor(NamedTuple):
    """A tensor of the old adapter: the native modules it acts on, and the end of its name (`lora_A.weight`)."""

    modules: tuple[str, ...]
    end: str


class Native(NamedTuple):
    """A tensor of the native adapter. data: its bytes, row after row."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def convert_adapter(source: Path, target: Path, base: Path | None, say: Callable[[str], None]) -> None:
    """Write the native adapter. `base`: the converted model, whose name and tokenizer the adapter then carries.

    Raises ModelError where the adapter is of another kind or model, or says what cannot be carried over.
    """
    settings = _read_settings(source)
    if target.exists() and any(target.iterdir()):
        raise ModelError(f"{target}: is not empty; give a new folder")
    file = _weights_file(source)
    with open_shard(file) as shard:
        factors = _factors(file, shard)
        native = dict(_native_tensors(file, shard, factors))
    modules = sorted({module for factor in factors.values() for module in factor.modules})
    if base is not None:
        _check_base(base, native)
    target.mkdir(parents=True, exist_ok=True)
    with written_beside(target / "adapter_model.safetensors") as beside:
        described = {name: (tensor.dtype, tensor.shape) for name, tensor in native.items()}
        write_safetensors(beside, described, (tensor.data for tensor in native.values()))
    for name in TOKENIZER_FILES:
        if base is not None and (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    targets = _targets(modules, every_layer=settings.get("layers_to_transform") is None)
    write_json(
        target / "adapter_config.json",
        {
            "peft_type": "LORA",
            **{name: settings[name] for name in KEPT if settings.get(name) is not None},
            "base_model_name_or_path": None if base is None else str(base.resolve()),
            "bias": "none",
            "inference_mode": True,
            "target_modules": targets,
        },
    )
    say(f"{target}: {len(factors)} tensors became {len(native)}, on {len(modules)} modules")


def _read_settings(source: Path) -> dict[str, Any]:
    path = source / "adapter_config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{source}: holds no adapter (adapter_config.json)") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f"is an adapter of the kind {settings.get('peft_type')}; only LoRA has a native counterpart")
    if settings.get("bias", "none") != "none":
        problems.append(f"trains biases (bias: {settings['bias']}), which the native model has elsewhere")
    problems += [
        f"{name} is {settings[name]!r}, which is not converted" for name in MUST_BE_EMPTY if settings.get(name)
    ]
    beginning = str(settings.get("init_lora_weights")).lower()
    if beginning.startswith(CHANGE_THE_BASE):
        problems.append(f"init_lora_weights is {beginning!r}: such an adapter belongs to a changed base model")
    if problems:
        raise ModelError(*(f"{path}: {problem}" for problem in problems))
    return settings


def _weights_file(source: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (source / name).is_file():
            return source / name
    raise ModelError(f"{source}: holds no weights (adapter_model.safetensors or adapter_model.bin)")


def _factors(file: Path, shard: Shard) -> dict[str, Factor]:
    """What each tensor of the adapter acts on. Raises ModelError naming those that are not known."""
    found, unknown = {}, []
    for name in shard.tensors:
        match = _NAME.fullmatch(name)
        modules = _native_modules(match["layer"], match["module"]) if match else ()
        if match is None or not modules:
            unknown.append(name)
        else:
            found[name] = Factor(modules, match["factor"] + (match["end"] or ""))
    if unknown:
        shown = ", ".join(unknown[:5])
        raise ModelError(f"{file}: {len(unknown)} tensors are no LoRA factors of ChatGLM3's modules: {shown}")
    return found


def _native_modules(layer: str | None, module: str) -> tuple[str, ...]:
    if layer is None:
        return (OUTSIDE_LAYERS[module],) if module in OUTSIDE_LAYERS else ()
    return tuple(f"model.layers.{layer}.{name}" for name in MODULES.get(module, ()))


def _native_tensors(file: Path, shard: Shard, factors: Mapping[str, Factor]) -> Iterator[tuple[str, Native]]:
    for name, (modules, end) in factors.items():
        stored = shard.tensors[name]
        data = memoryview(b"".join(shard.read(name)))
        if len(modules) == 1 or end.startswith("lora_A"):
            parts = [(stored.shape, data)] * len(modules)
        else:
            parts = list(_rows(data, stored, _sizes(file, name, shard)))
        for module, (shape, piece) in zip(modules, parts, strict=True):
            yield f"base_model.model.{module}.{end}", Native(stored.dtype, shape, piece)


def _sizes(file: Path, name: str, shard: Shard) -> tuple[int, int, int]:
    """The rows of q, k and v: q has as many as A has columns, k and v share the rest."""
    (rows, *_), a = shard.tensors[name].shape, shard.tensors.get(f"{name.partition(FUSED)[0]}{FUSED}.lora_A.weight")
    queries = a.shape[1] if a is not None else 0
    if not 0 < queries < rows or (rows - queries) % 2:
        raise ModelError(f"{file}: {name} has {rows} rows, which cannot be those of q, k and v")
    return queries, (rows - queries) // 2, (rows - queries) // 2


def _rows(data: memoryview, stored: Stored, sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], memoryview]]:
    row, start = len(data) // stored.shape[0], 0
    for size in sizes:
        yield (size, *stored.shape[1:]), data[start * row : (start + size) * row]
        start += size


def _check_base(base: Path, native: Mapping[str, Native]) -> None:
    """Raises ModelError unless the tensors fit the native base model."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        rows = {
            "q_proj": config["num_attention_heads"] * config["head_dim"],
            "k_proj": config["num_key_value_heads"] * config["head_dim"],
            "o_proj": config["hidden_size"],
            "gate_up_proj": 2 * config["intermediate_size"],
            "down_proj": config["hidden_size"],
        }
        layers = config["num_hidden_layers"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"--base {base}: is no converted model ({error}); convert it first") from None
    for name, tensor in native.items():
        module, _, factor = name.partition(".lora_")
        layer, expected = module.split(".")[4:5], rows.get(module.rpartition(".")[2])
        if ".layers." in name and int(layer[0]) >= layers:
            raise ModelError(f"{name}: {base} has {layers} layers only; this is another model's adapter")
        if factor.startswith("B") and expected is not None and tensor.shape[0] != expected:
            raise ModelError(f"{name} has {tensor.shape[0]} rows, and {base} has {expected}; this is another model's")


def _targets(modules: list[str], *, every_layer: bool) -> list[str]:
    """`target_modules`: short names where each layer has the same ones, else every module in full."""
    inside = [module for module in modules if module.startswith("model.layers.")]
    layers = {module.split(".")[2] for module in inside}
    kinds = {module.rpartition(".")[2] for module in inside}
    if not every_layer or len(inside) != len(layers) * len(kinds):
        return modules
    return sorted({module.rpartition(".")[2] for module in modules})
