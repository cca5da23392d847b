"""The command line and YAML files -> Config, or every mistake in them at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from chatlora.config import Config, Source
from chatlora.errors import ConfigError, did_you_mean

PRESETS = Path(__file__).parent / "presets"
HELP = ("-h", "--help")
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


class Loaded(NamedTuple):
    config: Config
    name: str  # the YAML's stem or the preset's name; the first half of runs/NAME-HASH


def load_config(argv: Sequence[str], *, default: str) -> Loaded:
    """`[PRESET | FILE.yaml] [--section.field VALUE ...]` -> Config. Raises ConfigError with every problem found."""
    names, flags, problems = _split(argv)
    if len(names) > 1:
        problems.append(f"one preset or YAML file at a time, but {len(names)} were given: {', '.join(names)}")
    try:
        path = _find(names[0] if names else default)
        values = read_yaml(path)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    for flag, raw in flags.items():
        section, _, field = flag.partition(".")
        if not isinstance(values.setdefault(section, {}), dict):
            values[section] = {}
        try:
            values[section][field] = _value(raw)
        except yaml.YAMLError as error:
            problems.append(f"--{flag} is {raw!r}, which is not valid YAML: {' '.join(str(error).split())}")
    config, more = _validate(values, path, flags)
    problems += more
    if config is None or problems:
        raise ConfigError(*problems)
    return Loaded(config, path.parent.name if path.name == "config.yaml" else path.stem)


def config_from_file(path: Path) -> Config:
    """The Config in a YAML file, a run's config.yaml for one."""
    values = read_yaml(path)
    if not values:
        raise ConfigError(f"{path} is empty: put its settings back, or take another run directory")
    config, problems = _validate(values, path, {})
    if config is None:
        raise ConfigError(*problems)
    return config


def config_text(config: Config) -> str:
    """The YAML that `config_from_file` reads back equal."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)


def help_text(usage: str) -> str:
    """Every setting with its default and meaning, as `--help` prints it."""
    lines = [usage, "", "presets: " + ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml"))), ""]
    for section, fields in _settings().items():
        for name, field in fields.items():
            lines.append(f"  {f'--{section}.{name}':<36} {field.description}{_choices(field)} [{_default(field)}]")
        lines.append("")
    return "\n".join(lines)


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


def _value(raw: str) -> Any:
    return yaml.load(raw, Loader=_UniqueKeys) if raw[:1] in ("[", "{") or raw == "null" else raw


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds sections; a key that stands twice is an error, not a silent override."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; sections such as `model:` and `data:` are expected")
    return values


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key}' stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or Path(name).exists():
        return Path(name) / "config.yaml" if Path(name).is_dir() else Path(name)
    preset = PRESETS / f"{name}.yaml"
    if not preset.is_file():
        known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
        hint = did_you_mean(name, known) or f"; presets are {', '.join(known)}"
        raise ConfigError(f"{name} is neither a YAML file nor a preset{hint}")
    return preset


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Positional words, `section.field` -> raw value, problems."""
    names: list[str] = []
    flags: dict[str, str] = {}
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            names.append(word)
            continue
        if not word.startswith("--") or word == "--":
            problems.append(f"{word} is not a setting: they are written --section.field VALUE")
            del words[: bool(words and not words[0].startswith("-"))]  # its value, no preset
            continue
        flag, equals, value = word[2:].partition("=")
        if not equals:
            if not words or (words[0].startswith("--") and len(words[0]) > 2):
                problems.append(f"--{flag} needs a value")
                continue
            value = words.pop(0)
        section, dot, field = flag.partition(".")
        if section and dot and field:
            flags[flag] = value
        elif section in _settings():
            first = next(iter(_settings()[section]))
            problems.append(f"--{flag} is a section, not a setting: write --{section}.{first} for one of its fields")
        else:
            problems.append(f"--{flag} is not a setting{_nearest([section])}")
    return names, flags, problems


def _validate(values: dict[str, Any], path: Path, flags: Mapping[str, str]) -> tuple[Config | None, list[str]]:
    # `optim:` with nothing under it means its defaults.
    present = {section: fields for section, fields in values.items() if fields is not None}
    try:
        return Config.model_validate(present), []
    except ValidationError as error:
        # A value that fits no member of a union is reported once, by the first.
        first = {(details["loc"][:2], repr(details["input"])): details for details in reversed(error.errors())}
        return None, [_sentence(details, path, flags) for details in reversed(first.values())]


def _sentence(details: ErrorDetails, path: Path, flags: Mapping[str, str]) -> str:
    location = [str(part) for part in details["loc"] if not _is_union_tag(part)]
    dotted = ".".join(location)
    flag = ".".join(location[:2])
    where = f"--{dotted}" if flag in flags or dotted in flags else f"{path}: {dotted}" if dotted else f"{path}"
    if details["type"] == "extra_forbidden":
        return f"{where.rstrip('.')} is not a setting{_nearest(location)}"
    message = details["msg"].removeprefix("Value error, ")
    if not location:
        return f"{path}: {message}"
    return f"{where} is {details['input']!r}: {message[:1].lower()}{message[1:]}"


def _is_union_tag(part: int | str) -> bool:
    """pydantic puts the member of a union into the location, where no user wrote it."""
    return (isinstance(part, str) and not part.replace("_", "").isalnum()) or part in ("float", "int", "str")


def _nearest(location: Sequence[str]) -> str:
    settings = _settings()
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


def _settings() -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        sections[name] = dict(field.annotation.model_fields)
    return sections
