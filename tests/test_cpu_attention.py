"""The CPU's attention against fp64, beside torch's own kernel."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from chatlora.model.attention import packed_attention
from chatlora.model.cpu_attention import BLOCK, QUICKEST, CausalAttention

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
    return CausalAttention.apply(q, k, v, None if scale else 0.9 * q.shape[-1] ** -0.5)


def errors(
    computed: Attention, shape: tuple[int, int, int, int, float | None], length: int, dtype: torch.dtype
) -> tuple[float, float, float, float]:
    """Of output and gradients, relative to fp64."""

    def all_of(function: Attention, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        output = function(*leaves, shape[4])
        return [output.detach(), *torch.autograd.grad(output, leaves, tensors[3])]

    given = inputs(shape, length, dtype)
    exact = all_of(torchs_own, *(tensor.double() for tensor in given))
    found = all_of(computed, *given)
    assert [each.dtype for each in found] == [dtype] * 4
    return tuple(float((got.double() - it).norm() / it.norm()) for got, it in zip(found, exact, strict=True))


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


def test_conversations_of_all_lengths_in_one_row_go_their_ways() -> None:
    lengths = [64, BLOCK + 7, 3, QUICKEST.stop, 200]
    q, k, v, _ = inputs(SHAPES[0], sum(lengths))
    boundaries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    output, _ = packed_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=boundaries, max_length_q=max(lengths))
    parts = zip(*(tensor.double().split(lengths, 2) for tensor in (q, k, v)), strict=True)
    wanted = torch.cat([torchs_own(*part, None) for part in parts], 2).transpose(1, 2)
    assert output.dtype == torch.bfloat16
    for got, it in zip(output.split(lengths, 1), wanted.split(lengths, 1), strict=True):
        assert float((got.double() - it).norm() / it.norm()) < TOLERANCE[q.dtype]
