"""Attention over packed conversations, each seeing only itself, and the probe that says whether a model can be packed.

T: tokens of all conversations of a micro-batch together; H, K: query and key/value heads; D: head size.
"""

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from chatlora.data.collate import pack
from chatlora.data.loader import to_device
from chatlora.distributed.zero3 import full_shape
from chatlora.model.cpu_attention import QUICKEST, CausalAttention
from chatlora.rendering.examples import Example

PACKED = "chatlora_packed"
PROBE_LENGTHS = (37, QUICKEST.start + 13)  # on a CPU each takes another kernel

# Keyword arguments of transformers' attention functions that change nothing in a packed causal forward pass. Any other
# one that is not None changes the function (soft-capping, sinks, biases): ignoring it would give a wrong gradient.
HARMLESS = frozenset(
    {
        "cu_seq_lens_k",
        "max_length_k",
        "seq_idx",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "is_causal",
    }
)


class NotPackable(Exception):
    """This attention function does not compute what the model asks for."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed conversation.

    query: [1, H, T, D]; key, value: [1, K, T, D] -> [1, T, H, D]. cu_seq_lens_q: int32 [B + 1], the boundaries.
    sliding_window: a token sees itself and the `sliding_window - 1` tokens before it. Raises NotPackable where the
    model asks for anything else.
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    if unknown:
        raise NotPackable(f"its attention takes {', '.join(unknown)}, which no packed kernel here computes")
    if attention_mask is not None or dropout or others.get("is_causal") is False:
        raise NotPackable("its attention is masked, dropped or not causal")
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotPackable("it does not hand the boundaries of conversations on to its attention")
    if _varlen_kernel_takes(query):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    return _segments(query, key, value, lengths, scaling, sliding_window), None


def _varlen_kernel_takes(query: torch.Tensor) -> bool:
    """torch.nn.attention.varlen: flash attention, so CUDA, 16 bit, head sizes in steps of 8 up to 256."""
    head_size = query.shape[-1]
    return query.is_cuda and query.dtype == torch.bfloat16 and head_size % 8 == 0 and head_size <= 256


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    output = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def _segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Each conversation for itself."""
    parts = zip(*(torch.split(each, lengths, 2) for each in (query, key, value)), strict=True)
    with torch.autocast("cpu", enabled=False):  # it would take fp32 back to bf16
        return torch.cat([_segment(q, k, v, scaling, window) for q, k, v in parts], 2).transpose(1, 2)


def _segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """scaled_dot_product_attention of one conversation, but for the lengths at which a CPU has a quicker way."""
    dtype, length, on_cpu = q.dtype, q.shape[2], q.device.type == "cpu"
    band = None if window is None or length <= window else _band(length, window, q.device)
    if on_cpu and length in QUICKEST and band is None and dtype == k.dtype == v.dtype:
        quick: torch.Tensor = CausalAttention.apply(q, k, v, scaling)  # type: ignore[no-untyped-call]
        return quick
    if on_cpu:  # whose kernel is no quicker in bf16, and up to twice slower for short rows
        q, k, v = q.float(), k.float(), v.float()
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=grouped
    ).to(dtype)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [length, length]: row i may see columns i - window + 1 to i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


AttentionInterface.register(PACKED, packed_attention)


@torch.no_grad()
def why_not_packed(model: PreTrainedModel, *, exact: bool) -> str | None:
    """None if packing leaves this model's function as it is, else the reason, as half a sentence.

    Asked of the loaded model, not of a list of names: do two conversations in one row give the logits that each gives
    alone under the model's own attention (relative to their norm), and does a change in the first leave the second's
    as they are? On return the model has its own attention again. exact: the model is in fp32; bf16 kernels of different
    shapes round differently.
    """
    tolerance = 1e-4 if exact else 5e-2
    own = model.config._attn_implementation
    was_training = model.training
    model.eval()
    first, other, second = _probe_conversations(model)
    alone = [_logits(model, {"input_ids": torch.tensor([ids])}) for ids in (first, second)]
    try:
        model.set_attn_implementation(PACKED)
        together = _logits(model, _packed(first, second))
        changed = _logits(model, _packed(other, second))
    except (NotPackable, NotImplementedError, ImportError, TypeError, ValueError, RuntimeError) as refusal:
        # The last two: what models with recurrent layers raise where their packed kernels are missing.
        return f"{refusal}".splitlines()[0]
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)
    boundary = len(first)
    leak = _distance(changed[:, boundary:], together[:, boundary:])
    if leak > tolerance / 100:  # the same shapes and kernels twice: nothing to round differently
        return f"a change in one conversation reaches the next one's logits (by {leak:.1e} of their norm)"
    error = _distance(together, torch.cat(alone, 1))
    if error > tolerance:
        return f"two conversations in one row give other logits than each alone (by {error:.1e} of their norm)"
    return None


def _probe_conversations(model: PreTrainedModel) -> tuple[list[int], list[int], list[int]]:
    """Two conversations and a first one with other tokens, drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    size = full_shape(model.get_input_embeddings().weight)[0]
    lengths = (PROBE_LENGTHS[0], PROBE_LENGTHS[0], PROBE_LENGTHS[1])
    first, other, second = (torch.randint(size, (length,), generator=draw).tolist() for length in lengths)
    return first, other, second


def _packed(*conversations: list[int]) -> dict[str, Any]:
    batch = pack([Example(input_ids=ids, labels=ids) for ids in conversations])
    del batch["labels"]
    return batch


def _logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(**to_device(batch, model.device), use_cache=False).logits
    return logits.float()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
