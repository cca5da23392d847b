"""The command line and YAML files -> Config, or every mistake in them at once."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from chatlora.config import Config
from chatlora.config_paths import PATHS
from chatlora.errors import ConfigError, did_you_mean
from chatlora.settings import all_settings, known_settings, nearest, settings_text
from chatlora.yaml_text import parse_yaml, shortened

PRESETS = Path(__file__).parent / "presets"
HELP = ("-h", "--help")


class Loaded(NamedTuple):
    config: Config
    name: str  # the YAML's stem, the preset's name or the stem of the rows; the first half of runs/NAME-HASH
    origin: str  # what the settings are from, but for those of the command line
    given: str  # the settings of the command line, as one would type them

    def lines(self) -> list[str]:
        """What a person should see first: where the settings are from, and those that matter most."""
        optim = self.config.optim
        limit = f", max_steps {optim.max_steps:,}" if optim.max_steps else ""
        first = (
            f"{self.origin}: epochs {optim.epochs:g}{limit}, {optim.global_batch_size} examples a step, learning rate "
            f"{optim.learning_rate:g} ({optim.schedule}, {100 * optim.warmup_ratio:g}% warm-up), max_length "
            f"{self.config.data.max_length:,}"
        )
        return [first, *([f"on the command line: {self.given}"] if self.given else [])]


class Words(NamedTuple):
    """A command line: positional words, settings by `section.field`, the script's own options, and what is wrong."""

    names: list[str]
    flags: dict[str, str]
    own: dict[str, str]
    problems: list[str]


def load_config(argv: Sequence[str], *, default: str) -> Loaded:
    """`[PRESET | FILE.yaml] [--section.field VALUE ...]` -> Config; the preset `default` where `argv` is empty.

    Raises ConfigError with every problem found.
    """
    names, flags, _, problems = split_words(argv)
    if len(names) > 1:
        problems.append(f"one preset or YAML file at a time, but {len(names)} were given: {', '.join(names)}")
    try:
        path = _find(names[0] if names else default) if names or not argv else None
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    config = read_config(path, flags, problems)
    given = shlex.join(word for flag, raw in flags.items() for word in (f"--{flag}", raw))
    if path is None:
        if not config.data.train:
            raise ConfigError(
                f"--data.train is not given, so there are no rows to train on: add it, or name a preset or a YAML file "
                f"in front of the settings, as in `{default} {given}`"
            )
        return Loaded(config, stem_of(config.data.train[0].path), "defaults", given)
    refuse_paths_beside(path, config, flags)
    origin = f"preset {path.stem}" if path.parent == PRESETS else str(path)
    return Loaded(config, path.absolute().parent.name if path.name == "config.yaml" else path.stem, origin, given)


def config_from_file(
    path: Path, flags: Mapping[str, str] = MappingProxyType({}), problems: Sequence[str] = ()
) -> Config:
    """The Config in a YAML file that must not be empty, a run's config.yaml for one."""
    config = read_config(path, flags, problems)
    if not read_yaml(path):
        raise ConfigError(f"{path} is empty: put its settings back, or take another run directory")
    return config


def read_config(path: Path | None, flags: Mapping[str, str], problems: Sequence[str] = ()) -> Config:
    """The settings of a YAML file, or the defaults, with those of the command line in their place.

    Raises ConfigError with every problem, behind those that were found before.
    """
    found = list(problems)
    try:
        values = {} if path is None else read_yaml(path)
    except ConfigError as error:
        raise ConfigError(*found, *error.problems) from None
    for flag, raw in flags.items():
        section, _, field = flag.partition(".")
        fields = values.get(section)
        if not isinstance(fields, dict | NoneType):
            continue  # the file has no section there, which is told below
        try:
            values[section] = {**(fields or {}), field: _value(flag, raw)}
        except ConfigError as error:
            found += error.problems
    config, more = _validate(values, path, flags)
    if config is None or found:
        raise ConfigError(*found, *more)
    return config


def _value(flag: str, raw: str) -> Any:
    section, _, name = flag.partition(".")
    field = all_settings().get(section, {}).get(name)
    is_text = field is not None and field.annotation in (str, str | None)  # a system prompt may begin with a bracket
    in_brackets = raw[:1] == "{" or raw[:1] + raw[-1:] == "[]"  # a pattern of files may begin with [
    is_yaml = raw == "null" or (in_brackets and not is_text)
    return parse_yaml(raw, f"--{flag} {shortened(raw)}") if is_yaml else raw


def refuse_paths_beside(path: Path, config: Config, flags: Collection[str]) -> None:
    """Raise ConfigError where a file names what is not found from here, but lies beside that file."""
    problems = []
    for setting in PATHS:
        section, _, field = setting.partition(".")
        value = None if setting in flags else getattr(getattr(config, section), field)
        for name in _names_in(value):
            beside = path.parent.resolve() / name
            if _is_there(Path(name).absolute()) or not _is_there(beside):
                continue
            hub = f"; if one of the hub is meant, give it as --{setting} {name}" if beside.is_dir() else ""
            problems.append(f"{path}: {setting} is {name}, which is not under {Path.cwd()}: write {beside}{hub}")
    if problems:
        raise ConfigError(*problems)


def _names_in(value: Any) -> list[str]:
    """The paths that a setting names: itself, those of its sources, those of its sets of sources."""
    if isinstance(value, dict):
        return [name for sources in value.values() for name in _names_in(sources)]
    if isinstance(value, tuple):
        readers = [source.reader.rpartition(":")[0] for source in value if source.reader is not None]
        return [*(source.path for source in value), *readers]
    return [str(value)] if isinstance(value, str | Path) else []


def _is_there(path: Path) -> bool:
    """A file, a folder, or a pattern that finds one."""
    try:
        return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except (OSError, ValueError):  # a name too long for the disk, no pattern
        return False


def stem_of(rows: str) -> str:
    """A folder's name from a file, a glob, a hub data set: `d/test*.jsonl` -> `test`."""
    return re.sub(r"[^\w.-]+", "-", Path(rows).stem).strip("-.") or "data"


def config_text(config: Config) -> str:
    """The YAML that `config_from_file` reads back equal."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)


def help_text(usage: str) -> str:
    """Every setting with its default and meaning, as `--help` prints it."""
    presets = "presets: " + ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    return f"{usage}\n\n{presets}\n\n{settings_text(known_settings())}\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds sections."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; sections such as `model:` and `data:` are expected")
    return values


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or Path(name).exists():
        return Path(name) / "config.yaml" if Path(name).is_dir() else Path(name)
    preset = PRESETS / f"{name}.yaml"
    if not preset.is_file():
        known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
        hint = did_you_mean(name, known) or f"; presets are {', '.join(known)}"
        raise ConfigError(f"{name} is neither a YAML file nor a preset{hint}")
    return preset


def split_words(argv: Sequence[str], own: Collection[str] = ()) -> Words:
    """`own`: the options of the script beside settings, each of which takes a value."""
    words = list(argv)
    split = Words([], {}, {}, [])
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            split.names.append(word)
            continue
        if not word.startswith("--") or word == "--":
            split.problems.append(f"{word} is not a setting: they are written --section.field VALUE")
            del words[: bool(words and not words[0].startswith("-"))]  # its value, no preset
            continue
        flag, equals, value = word[2:].partition("=")
        problem = None if flag in own else _not_a_setting(flag, own)
        if not equals:
            if not words or (words[0].startswith("--") and len(words[0]) > 2):
                split.problems.append(problem or f"--{flag} needs a value")
                continue
            value = words.pop(0)
        if problem:
            split.problems.append(problem)
        else:
            (split.own if flag in own else split.flags)[flag] = value
    return split


def _not_a_setting(flag: str, own: Collection[str]) -> str | None:
    section, _, field = flag.partition(".")
    if section and field:
        return None
    if section in all_settings():
        first = next(iter(all_settings()[section]))
        return f"--{flag} is a section, not a setting: write --{section}.{first} for one of its fields"
    return f"--{flag} is not a setting{nearest([section]) or did_you_mean(section, own)}"


def _validate(values: dict[str, Any], path: Path | None, flags: Mapping[str, str]) -> tuple[Config | None, list[str]]:
    # `optim:` with nothing under it means its defaults.
    present = {section: fields for section, fields in values.items() if fields is not None}
    try:
        return Config.model_validate(present), []
    except ValidationError as error:
        # A value that fits no member of a union is reported once, by the first.
        first = {(details["loc"][:2], repr(details["input"])): details for details in reversed(error.errors())}
        return None, [_sentence(details, path, flags) for details in reversed(first.values())]


def _sentence(details: ErrorDetails, path: Path | None, flags: Mapping[str, str]) -> str:
    location = [str(part) for part in details["loc"] if not _is_union_tag(part)]
    dotted = ".".join(location)
    flag = ".".join(location[:2])
    of_flags = path is None or flag in flags or dotted in flags
    where = f"--{dotted}" if of_flags and dotted else f"{path}: {dotted}" if dotted else f"{path}"
    if details["type"] == "extra_forbidden":
        return f"{where.rstrip('.')} is not a setting{nearest(location)}"
    message = details["msg"].removeprefix("Value error, ")
    if not location:
        return message if path is None else f"{path}: {message}"
    return f"{where} is {shortened(details['input'])}: {message[:1].lower()}{message[1:]}"


def _is_union_tag(part: int | str) -> bool:
    """pydantic puts the member of a union into the location, where no user wrote it."""
    return (isinstance(part, str) and not part.replace("_", "").isalnum()) or part in ("float", "int", "str")
