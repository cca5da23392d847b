"""What a chat template was told in training, beside the adapter: without it the same template writes other prompts."""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chatlora.config import ModelConfig
from chatlora.errors import ModelError

FILE = "chatlora.json"


def save_template_settings(folder: Path, chat_template_kwargs: Mapping[str, Any], day: date | None) -> None:
    settings = {
        "chat_template_kwargs": dict(chat_template_kwargs),
        "chat_template_date": None if day is None else day.isoformat(),
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def as_adapter_was_trained(model: ModelConfig, adapter: Path) -> ModelConfig:
    """`model` with the template's settings from beside the adapter; as it is where none were saved.

    The revision is the adapter's too where it was trained on this model and `model` names none. Raises ModelError
    where the settings cannot be read.
    """
    trained = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    values = model.model_dump()
    if model.revision is None and trained.get("base_model_name_or_path") == model.name_or_path:
        values["revision"] = trained.get("revision")
    if (adapter / FILE).is_file():
        try:
            values |= json.loads((adapter / FILE).read_text(encoding="utf-8"))
            return ModelConfig.model_validate(values)
        except (ValueError, TypeError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{adapter / FILE} cannot be used: {reason}; bring it back, or remove it") from None
    return ModelConfig.model_validate(values)
