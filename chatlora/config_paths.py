"""Settings that name files: relative ones by the folder that they were given in, hub names as they are."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATHS = (
    "model.name_or_path",
    "model.chat_template",
    "lora.init_from",
    "data.train",
    "data.validation",
    "data.test",
)


def absolute(setting: str, value: Any, *, only_existing: bool = False) -> Any:
    if setting not in PATHS:
        return value
    if isinstance(value, list):
        return [_absolute_source(setting, each, only_existing) for each in value]
    if isinstance(value, dict):
        return {name: absolute(setting, each, only_existing=only_existing) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser() if value.startswith("~/") else Path(value)
    is_pattern = setting.startswith("data.") and any(character in value for character in "*?[")
    exists = os.path.isdir if setting == "model.name_or_path" else os.path.exists  # of text too long for a name too
    return value if only_existing and not is_pattern and not exists(path) else str(path.absolute())


def _absolute_source(setting: str, source: Mapping[str, Any], only_existing: bool) -> dict[str, Any]:
    named = {**source, "path": absolute(setting, source["path"], only_existing=only_existing)}
    file, colon, function = (source.get("reader") or "").rpartition(":")
    if colon:
        named["reader"] = absolute(setting, file, only_existing=only_existing) + colon + function
    return named
