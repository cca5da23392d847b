"""Examples -> what a model takes in.

B: examples, T: tokens of all examples together, P: tokens of the longest one.
"""

from collections.abc import Sequence
from typing import Any

import torch

from chatlora.rendering.examples import IGNORE_INDEX, Example

FILLER = Example(input_ids=[0], labels=[IGNORE_INDEX])  # an empty micro-batch: a rank runs it to enter the collectives


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """One flat row without padding.

    input_ids, position_ids, labels, seq_idx: [1, T]; cu_seq_lens_q/k: int32 [B + 1], where conversations begin and end;
    max_length_q/k: int. The boundaries are model arguments, since attention is not the only layer that mixes tokens.
    """
    examples = examples or [FILLER]
    lengths = [len(example.input_ids) for example in examples]
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.input_ids]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([[label for example in examples for label in _unfollowed(example)]]),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def pad_right(examples: Sequence[Example]) -> dict[str, Any]:
    """input_ids, labels: [B, P], padded on the right.

    No mask: a causal model never looks to the right, and padding is no target.
    """
    examples = examples or [FILLER]
    longest = max(len(example.input_ids) for example in examples)
    return {
        "input_ids": torch.tensor([_filled(example.input_ids, longest, 0) for example in examples]),
        "labels": torch.tensor([_filled(_unfollowed(example), longest, IGNORE_INDEX) for example in examples]),
    }


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask: [B, P], padded on the left, so that every prompt ends where generation begins."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(
            [[pad_token_id] * pads + list(prompt) for pads, prompt in zip(padding, prompts, strict=True)]
        ),
        "attention_mask": torch.tensor(
            [[0] * pads + [1] * len(prompt) for pads, prompt in zip(padding, prompts, strict=True)]
        ),
    }


def _unfollowed(example: Example) -> list[int]:
    """The labels, less the first token's: nothing in its own conversation predicts it."""
    return [IGNORE_INDEX, *example.labels[1:]]


def _filled(values: Sequence[int], length: int, value: int) -> list[int]:
    return [*values, *[value] * (length - len(values))]
