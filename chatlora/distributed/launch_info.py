"""What there is to know of a launch, read off the machine: for launch_checks.py to judge."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from chatlora.config import Config
from chatlora.distributed.deepspeed import settings_of_launcher
from chatlora.distributed.launch_checks import LaunchInfo
from chatlora.errors import LaunchError
from chatlora.scripts import HOME

NO_FILE = "none"


def launch_info_of(config: Config) -> LaunchInfo:
    """The info before the processes have found each other. Raises LaunchError where DeepSpeed's JSON is unreadable."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return LaunchInfo(
        config=config,
        environment=dict(os.environ),
        device="cpu" if accelerator is None else accelerator.type,
        num_devices=0 if accelerator is None else torch.accelerator.device_count(),
        num_cards=_num_cards(Path("/")),
        num_cores=num_cores(),
        torch_build=torch.version.cuda or torch.version.hip or "cpu",
        deepspeed=_deepspeed_settings() if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None,
    )


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_cards(root: Path) -> int:
    """NVIDIA's cards in this machine, whether or not there is a driver for them or torch can use them. Linux alone."""
    on_bus = [
        device
        for device in root.glob("sys/bus/pci/devices/*")
        if _text(device / "vendor") == "0x10de" and _text(device / "class").startswith("0x03")  # a display controller
    ]
    return max(len(on_bus), len(list(root.glob("dev/nvidia[0-9]*"))))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _deepspeed_settings() -> dict[str, Any]:
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", NO_FILE)
    if named == NO_FILE:
        return settings_of_launcher(os.environ)
    # A path in a launcher's file is meant from the repository's root, wherever the command is given.
    found = [folder / named for folder in (Path.cwd(), HOME) if (folder / named).is_file()]
    if not found:
        raise LaunchError(
            f"deepspeed_config_file: {named} is neither in {Path.cwd()} nor in {HOME}: give its whole path"
        )
    try:
        settings = json.loads(found[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise LaunchError(f"deepspeed_config_file: {found[0]} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise LaunchError(f"deepspeed_config_file: {found[0]} holds no object of settings")
    return settings


def is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return package in sys.modules or find_spec(package) is not None
