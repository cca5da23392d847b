"""What a run ran on and with, for its environment.json."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import chatlora
from chatlora.data.dataset import PreparedData
from chatlora.distributed.runtime import Runtime
from chatlora.rendering.renderer import Renderer

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")


def environment_of(runtime: Runtime, renderer: Renderer, data: PreparedData, padded: bool) -> dict[str, Any]:
    """What this run ran on and with: enough to tell two runs apart."""
    return {
        "versions": {
            "chatlora": chatlora.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "commit": _commit(),
        "hardware": runtime.hardware(),
        "engine": runtime.engine,
        "num_processes": runtime.num_processes,
        "precision": runtime.precision,
        "padded": padded,
        "threads": torch.get_num_threads(),
        "rendering": renderer.fingerprint,
        "data": data.fingerprint,
    }


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, if it is one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None
