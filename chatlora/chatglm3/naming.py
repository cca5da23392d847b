"""Every tensor of a ChatGLM3 checkpoint: its shape, and what it is called in the native model.

heads: query heads of size d (`kv_channels`); groups: key/value heads. The fused `query_key_value` holds
[heads * d, groups * d, groups * d] rows for q, k and v.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FUSED = "query_key_value"
MODULES: dict[str, tuple[str, ...]] = {  # the original's module -> the native ones, in the order of its rows
    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.dense": ("self_attn.o_proj",),
    "mlp.dense_h_to_4h": ("mlp.gate_up_proj",),
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
}
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # a buffer that the native model computes itself


@dataclass(frozen=True, slots=True)
class Part:
    """One native tensor, or one of the three that a fused one becomes."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """A tensor of the original: its shape and the native tensors that its rows become, none if it is left out."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def known_tensors(config: Mapping[str, Any]) -> dict[str, Known]:
    """The original's name -> what becomes of it. `config` as `read_config` gives it."""
    hidden, inner, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    attention = config["num_attention_heads"] * config["kv_channels"]
    rows = fused_rows(config)
    tensors = {
        "transformer.embedding.word_embeddings.weight": _renamed("model.embed_tokens.weight", vocabulary, hidden),
        "transformer.encoder.final_layernorm.weight": _renamed("model.norm.weight", hidden),
        "transformer.output_layer.weight": _renamed("lm_head.weight", vocabulary, hidden),
        INV_FREQ: Known((config["kv_channels"] // 4,), ()),
    }
    for layer in range(config["num_layers"]):
        old, new = f"transformer.encoder.layers.{layer}", f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{old}.{norm}.weight"] = _renamed(f"{new}.{norm}.weight", hidden)
        projections = tuple(zip(MODULES["self_attention.query_key_value"], rows, strict=True))
        for kind, columns in (("weight", (hidden,)), ("bias", ())):
            tensors[f"{old}.self_attention.query_key_value.{kind}"] = Known(
                (sum(rows), *columns),
                tuple(Part(f"{new}.{name}.{kind}", (size, *columns)) for name, size in projections),
            )
        tensors[f"{old}.self_attention.dense.weight"] = _renamed(f"{new}.self_attn.o_proj.weight", hidden, attention)
        tensors[f"{old}.mlp.dense_h_to_4h.weight"] = _renamed(f"{new}.mlp.gate_up_proj.weight", 2 * inner, hidden)
        tensors[f"{old}.mlp.dense_4h_to_h.weight"] = _renamed(f"{new}.mlp.down_proj.weight", hidden, inner)
    return tensors


def fused_rows(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """The rows of q, k and v in `query_key_value`."""
    groups = config["multi_query_group_num"] * config["kv_channels"]
    return config["num_attention_heads"] * config["kv_channels"], groups, groups


def _renamed(name: str, *shape: int) -> Known:
    return Known(shape, (Part(name, shape),))
