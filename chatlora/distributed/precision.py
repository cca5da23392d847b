"""The precision of the base model, by what was asked for and what the device multiplies."""

import os

import torch

from chatlora.config import RunConfig


def resolve_precision(run: RunConfig, device: torch.device) -> torch.dtype:
    """The base model's dtype."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if run.precision == "fp32":
        return torch.float32
    if run.precision == "bf16" or launcher == "bf16" or multiplies_bf16(device):
        return torch.bfloat16
    return torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
