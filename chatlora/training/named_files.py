"""The files that a config names, looked at before anything heavy is imported and before there is a run directory."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from chatlora.config import Config, ModelConfig, Source, with_absolute_paths
from chatlora.errors import ChatLoraError, ConfigError, similar_beside
from chatlora.model.folder import find_adapter, refuse_no_model
from chatlora.reading.own_reader import own_reader
from chatlora.reading.sources import files_of
from chatlora.rendering.embedded import embedded_name

Named = tuple[str, Callable[[], object]]  # a setting, and what raises where that which it names is not there


def refuse_missing_files(config: Config) -> None:
    """Raise ConfigError with every file and folder that a training names and is not there. The hub is not asked."""
    config = with_absolute_paths(config)
    data = config.data
    test = () if isinstance(data.test, float) else data.test
    validation = [source for sources in data.validation_sets.values() for source in sources]
    refuse_missing(
        *named_rows("data.train", data.train, "train"),
        *named_rows("data.validation", validation, "validation"),
        *named_rows("data.test", test, "test"),
        *named_by_model(config.model),
        *named_adapter("lora.init_from", config.lora.init_from),
    )


def refuse_missing(*named: Named) -> None:
    """Raise ConfigError with all that is not there."""
    problems = [f"{setting}: {problem}" for setting, look in named for problem in _told(setting, look)]
    if problems:
        raise ConfigError(*problems)


def named_rows(setting: str, sources: Sequence[Source], split: str) -> list[Named]:
    readers: list[Named] = [(setting, partial(own_reader, source.reader)) for source in sources]
    return [*((setting, partial(files_of, source, split)) for source in sources), *readers]


def named_by_model(model: ModelConfig) -> list[Named]:
    template: list[Named] = []
    if model.chat_template is not None:
        template = [("model.chat_template", partial(_refuse_no_template, model.chat_template))]
    return [("model.name_or_path", partial(refuse_no_model, model)), *template]


def named_adapter(setting: str, adapter: Path | None) -> list[Named]:
    return [] if adapter is None else [(setting, partial(find_adapter, adapter))]


def _refuse_no_template(path: Path) -> None:
    if embedded_name(path) is not None:
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file in it")
    if not path.exists():
        raise ConfigError(f"{path}: no such file{similar_beside(path)}")


def _told(setting: str, look: Callable[[], object]) -> Iterator[str]:
    try:
        look()
    except ChatLoraError as error:
        for problem in error.problems:
            yield problem.removeprefix(f"{setting}: ")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        yield f"{error.filename}: {error.strerror}"
