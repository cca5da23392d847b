"""Every setting by its name: what `--help` says of it, and which one was meant."""

from collections.abc import Collection, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from chatlora.config import Config, Source
from chatlora.errors import did_you_mean

OTHER_NAMES = {  # what other trainers call a setting
    "batch_size": "optim.global_batch_size",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.name_or_path",
    "num_train_epochs": "optim.epochs",
    "r": "lora.rank",
    "resume_from_checkpoint": "checkpoint.resume",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "template": "model.chat_template",
}


def settings_text(shown: Collection[str]) -> str:
    """These settings, a line each, with an empty one between sections."""
    sections = []
    for section, fields in all_settings().items():
        lines = [
            f"  {f'--{section}.{name}':<36} {field.description}{_choices(field)} [{_default(field)}]"
            for name, field in fields.items()
            if f"{section}.{name}" in shown
        ]
        sections += ["\n".join(lines)] if lines else []
    return "\n\n".join(sections)


def known_settings() -> list[str]:
    return [f"{section}.{name}" for section, fields in all_settings().items() for name in fields]


def _choices(field: Any) -> str:
    """`(a | b | null)` behind a setting that takes one of several words."""
    kinds = (field.annotation,) if get_origin(field.annotation) is Literal else get_args(field.annotation)
    if not any(get_origin(kind) is Literal for kind in kinds) or any(
        get_origin(kind) is not Literal and kind is not NoneType for kind in kinds
    ):
        return ""
    words = [word for kind in kinds for word in (("null",) if kind is NoneType else get_args(kind))]
    return f" ({' | '.join(words)})"


def _default(field: Any) -> str:
    """As YAML has it."""
    default = field.get_default()
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "[]" if default == () else str(default)


def nearest(location: Sequence[str]) -> str:
    """`"; did you mean 'optim.epochs'?"` for the parts of a name that is no setting, or the empty string."""
    settings = all_settings()
    other = OTHER_NAMES.get(location[-1].lower().replace("-", "_")) if len(location) <= 2 else None
    if other:
        return f"; did you mean '{other}'?"
    if len(location) == 1:
        owner = [section for section, fields in settings.items() if location[0] in fields]
        if owner:
            return f"; did you mean '{owner[0]}.{location[0]}'?"
        return did_you_mean(location[0], settings)
    if len(location) > 2:
        return did_you_mean(location[-1], Source.model_fields)
    section, field = location
    owner = [other for other, fields in settings.items() if field in fields]
    if owner:
        return f"; did you mean '{owner[0]}.{field}'?"
    return did_you_mean(field, settings.get(section, {}))


def all_settings() -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        sections[name] = dict(field.annotation.model_fields)
    return sections
