"""What there is to know of a launch, read off the machine: for launch.py to judge."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from chatlora.config import Config
from chatlora.distributed.deepspeed import settings_of_launcher
from chatlora.distributed.launch_checks import LaunchInfo
from chatlora.errors import LaunchError
from chatlora.scripts import HOME

NO_FILE = "none"


def launch_info_of(config: Config) -> LaunchInfo:
    """The info before the processes have found each other. Raises LaunchError where DeepSpeed's JSON is unreadable."""
    arguments, config_file = _launcher()
    on_gpu = torch.cuda.is_available()
    return LaunchInfo(
        config=config,
        environment=dict(os.environ),
        device="cuda" if on_gpu else "cpu",
        num_devices=torch.cuda.device_count() if on_gpu else 0,
        arguments=arguments,
        config_file=config_file,
        deepspeed=_deepspeed_settings(config_file) if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None,
    )


def _launcher() -> tuple[dict[str, Any], dict[str, Any]]:
    """What `accelerate launch` was given: on its command line, and in its configuration file.

    On Linux alone, where the process that started this one can be asked. A single process bears no other trace of it.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}, {}
    given = _given_to_accelerate(words)
    if given is None:
        return {}, {}
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    arguments = vars(launch_command_parser().parse_known_args(given)[0])  # it has parsed the same words, and gone on
    path = Path(arguments["config_file"] or default_config_file)
    if not path.is_file() or (arguments["config_file"] is None and arguments["cpu"]):
        return arguments, {}
    return arguments, {**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}), "path": str(path)}


def _given_to_accelerate(words: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line; None where that is not what it calls."""
    for place, word in enumerate(words[:4]):
        before = Path(words[place - 1]).name if place else ""
        is_second_word = word == "launch" and before in ("accelerate", "accelerate_cli.py")
        if is_second_word or word.endswith(("accelerate-launch", "accelerate.commands.launch", "commands/launch.py")):
            return [each for each in words[place + 1 :] if each]
    return None


def _deepspeed_settings(config_file: Mapping[str, Any]) -> dict[str, Any]:
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", NO_FILE)
    if named == NO_FILE:
        return settings_of_launcher(os.environ)
    # A path in a launcher's file is meant from the repository's root, wherever the command is given.
    around = [Path.cwd(), HOME]
    around += [Path(config_file["path"]).resolve().parent] if "path" in config_file else []
    found = [folder / named for folder in around if (folder / named).is_file()]
    if not found:
        raise LaunchError(f"deepspeed_config_file: {named} is neither in {Path.cwd()} nor in {HOME}")
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
