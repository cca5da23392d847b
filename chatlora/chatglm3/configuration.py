"""ChatGLM3's `config.json` -> the native GLM's; and what is not ChatGLM3 is refused by name.

ChatGLM-6B, ChatGLM2 and GLM-4 call themselves `chatglm` too. ChatGLM2 has the very shapes and the very tokenizer.model
of ChatGLM3 and other prompts, so it is told apart by what stands in the folder beside the weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatlora.chatglm3.tokenizer import PAD_ID, STOP_IDS
from chatlora.errors import ModelError

NUMBERS = (
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "multi_query_group_num",
    "kv_channels",
    "seq_length",
)
# What the native model computes. A checkpoint that says otherwise computes something else.
FIXED: dict[str, Any] = {
    "multi_query_attention": True,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "rmsnorm": True,
    "original_rope": True,
    "fp32_residual_connection": False,
    "tie_word_embeddings": False,
}
ROPE_THETA = 10_000.0  # times rope_ratio, which the 32k and 128k variants set
GLM4_VOCABULARY = 151_552
CHATGLM2_LENGTH = 32_768  # of ChatGLM2-6B; ChatGLM3's variant of that length has a rope_ratio


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a ChatGLM3 folder. Raises ModelError with everything in it that cannot be converted."""
    config = _read_json(folder / "config.json")
    other = _other_model(config, folder)
    problems = [other] if other else list(_problems(config))
    if problems:
        raise ModelError(*(f"{folder}: {problem}" for problem in problems))
    return config


def native_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of the same model as `GlmForCausalLM`. dtype: of the weights, e.g. `float16`."""
    rope = {"rope_theta": ROPE_THETA * config.get("rope_ratio", 1), "partial_rotary_factor": 0.5}
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "attention_bias": True,
        "attention_dropout": config.get("attention_dropout", 0.0),
        "bos_token_id": None,
        "dtype": dtype,
        "eos_token_id": list(STOP_IDS),
        "head_dim": config["kv_channels"],
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "max_position_embeddings": config["seq_length"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_layers"],
        "num_key_value_heads": config["multi_query_group_num"],
        "pad_token_id": PAD_ID,
        "rms_norm_eps": config.get("layernorm_epsilon", 1e-5),
        "rope_parameters": {"rope_type": "default", **rope},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config["padded_vocab_size"],
    }


def native_generation_config() -> dict[str, Any]:
    """All three stop tokens: eos ends a conversation, `<|user|>` a reply, `<|observation|>` a call."""
    return {"eos_token_id": list(STOP_IDS), "pad_token_id": PAD_ID}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: has no {path.name}; give the folder of a ChatGLM3 checkpoint") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return value


def _other_model(config: Mapping[str, Any], folder: Path) -> str | None:
    """A sentence about which model this is, if it is not ChatGLM3."""
    kind = config.get("model_type")
    if kind == "glm":
        return "is a native `glm` checkpoint already; use it as it is"
    if kind != "chatglm":
        return f"is a model of the type {kind!r}, not ChatGLM3; only model_type 'chatglm' is converted"
    if "position_encoding_2d" in config or "inner_hidden_size" in config or "padded_vocab_size" not in config:
        return "is ChatGLM-6B, the first generation: another architecture, for which there is no native model"
    if config["padded_vocab_size"] == GLM4_VOCABULARY:
        return "is GLM-4-9B, which has native checkpoints: use zai-org/glm-4-9b-chat-hf or a GLM-4-0414 model"
    if _is_chatglm2(config, folder):
        return "is ChatGLM2: the same shapes as ChatGLM3, but other prompts without role tokens; it is not converted"
    return None


def _is_chatglm2(config: Mapping[str, Any], folder: Path) -> bool:
    told = json.dumps([config.get("_name_or_path"), config.get("auto_map")]).lower()
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        told += settings.read_text(encoding="utf-8", errors="replace").lower()
    if "chatglm2" in told or "codegeex2" in told:
        return True
    code = folder / "tokenization_chatglm.py"  # read, never run
    if code.is_file():
        return "<|user|>" not in code.read_text(encoding="utf-8", errors="replace")
    return "chatglm3" not in told and config.get("seq_length") == CHATGLM2_LENGTH and "rope_ratio" not in config


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("quantization_bit") or config.get("quantization_config"):
        yield "its weights are quantised (config.json says so); convert the original half-precision checkpoint"
    if config.get("pre_seq_len"):
        yield (
            f"has a P-Tuning prefix (pre_seq_len {config['pre_seq_len']}), which the native model has no place for; "
            "convert the base model and train a LoRA adapter"
        )
    for name in NUMBERS:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"config.json: {name} is {value!r}, not a positive number"
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            yield f"config.json: {name} is {config[name]!r}; the native model computes {name} {value!r} only"
    ratio = config.get("rope_ratio", 1)
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or ratio <= 0:
        yield f"config.json: rope_ratio is {ratio!r}, not a positive number"
