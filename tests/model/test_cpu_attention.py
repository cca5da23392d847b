"""The CPU's attention against fp64, beside torch's own kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from chatlora.model.attention import packed_attention
from chatlora.model.cpu_attention import BLOCK, QUICKEST, CausalAttention
from tests.model.test_lean_lora import distance

# Relative, in norm. bf16 has 8 bits, and a gradient rounds two to three times.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 7e-3}
SHAPES = [(9, 3, 64, 64, None), (4, 4, 48, 32, 0.3), (6, 1, 16, 16, 1.0)]  # H, K, D, Dv, scale
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


def inputs(
    shape: tuple[int, int, int, int, float | None], length: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the gradient of the output, laid out as a model lays them out."""
    heads, kv_heads, size, value_size, _ = shape
    draw = torch.Generator().manual_seed(length)
    sizes = [(heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size)]
    return tuple(torch.randn(1, length, *each, generator=draw).to(dtype).transpose(1, 2) for each in sizes)


def torchs_own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Broken on purpose: another scale than was asked for."""
    output: torch.Tensor = CausalAttention.apply(q, k, v, None if scale else 0.9 * q.shape[-1] ** -0.5)
    return output


def errors(
    computed: Attention, shape: tuple[int, int, int, int, float | None], length: int, dtype: torch.dtype
) -> tuple[float, ...]:
    """Of output and gradients, relative to fp64."""

    def all_of(function: Attention, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        q, k, v = leaves
        output = function(q, k, v, shape[4])
        return [output.detach(), *torch.autograd.grad(output, leaves, tensors[3])]

    given = inputs(shape, length, dtype)
    exact = all_of(torchs_own, *(tensor.double() for tensor in given))
    found = all_of(computed, *given)
    assert [each.dtype for each in found] == [dtype] * 4
    return tuple(distance(got.double(), it) for got, it in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [BLOCK, 300, QUICKEST.stop - 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_near_to_fp64_as_the_precision_allows(
    shape: tuple[int, int, int, int, float | None], length: int, dtype: torch.dtype
) -> None:
    ours, torchs = errors(CausalAttention.apply, shape, length, dtype), errors(torchs_own, shape, length, dtype)
    print(f"{shape}, {length} tokens, {dtype}: {ours}, torch's own kernel {torchs}")
    assert max(ours) < TOLERANCE[dtype]
    assert max(errors(unscaled, shape, length, dtype)) > 2 * TOLERANCE[dtype]


def test_no_token_sees_a_later_one() -> None:
    q, k, v, _ = inputs(SHAPES[0], 300)
    before = CausalAttention.apply(q, k, v, None)
    for position in (0, BLOCK - 1, BLOCK, 298):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, :, position + 1 :] += 1
        changed_v[:, :, position + 1 :] += 1
        after = CausalAttention.apply(q, changed_k, changed_v, None)
        assert torch.equal(after[:, :, : position + 1], before[:, :, : position + 1])
        assert not torch.equal(after[:, :, position + 1], before[:, :, position + 1])


@pytest.mark.parametrize("window", [None, BLOCK])
def test_conversations_of_all_lengths_in_one_row_go_their_ways(window: int | None) -> None:
    lengths = [64, BLOCK + 7, 3, QUICKEST.stop, 200]
    *tensors, gradient = inputs(SHAPES[0], sum(lengths))
    boundaries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        where: dict[str, Any] = {"cu_seq_lens_q": boundaries, "max_length_q": max(lengths), "sliding_window": window}
        return packed_attention(torch.nn.Module(), q, k, v, None, **where)[0]

    def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outputs = []
        for queries, keys, values in zip(*(tensor.split(lengths, 2) for tensor in (q, k, v)), strict=True):
            position = torch.arange(queries.shape[2])
            behind = position[:, None] - position
            seen = (behind >= 0) & (behind < (window or len(position)))
            outputs.append(scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=True))
        return torch.cat(outputs, 2).transpose(1, 2)

    results = []
    for function, dtype in ((packed, torch.bfloat16), (one_by_one, torch.float64)):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        output = function(*leaves)
        output.backward(gradient.transpose(1, 2).to(dtype))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for got, it, tokens in zip(*results, (1, 2, 2, 2), strict=True):
        assert got.dtype == torch.bfloat16
        for one, other in zip(got.split(lengths, tokens), it.split(lengths, tokens), strict=True):
            assert distance(one.double(), other) < TOLERANCE[got.dtype]


def test_mixed_precisions_go_torchs_way() -> None:
    q, k, v, _ = inputs(SHAPES[0], 200)
    boundaries = torch.tensor([0, 200], dtype=torch.int32)
    wanted = torchs_own(q.double(), k.double(), v.double(), None).transpose(1, 2)
    for mixed in ((q.float(), k.float(), v), (q, k.float(), v)):
        output, _ = packed_attention(torch.nn.Module(), *mixed, None, cu_seq_lens_q=boundaries, max_length_q=200)
        assert output.dtype == mixed[0].dtype
        assert distance(output.double(), wanted) < TOLERANCE[torch.bfloat16]
