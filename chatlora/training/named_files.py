"""The files that a config names, looked at before anything heavy is imported and before there is a run directory."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from chatlora.config import Config, with_absolute_paths
from chatlora.errors import ChatLoraError, ConfigError, similar_beside
from chatlora.model.folder import find_adapter, refuse_no_model
from chatlora.reading.sources import files_of


def refuse_missing_files(config: Config) -> None:
    """Raise ConfigError with every file and folder that is named and is not there. The hub is not asked."""
    config = with_absolute_paths(config)
    problems = [f"{setting}: {problem}" for setting, problem in _missing(config)]
    if problems:
        raise ConfigError(*problems)


def _missing(config: Config) -> Iterator[tuple[str, str]]:
    data, template, adapter = config.data, config.model.chat_template, config.lora.init_from
    test = () if isinstance(data.test, float) else data.test
    validation = [source for sources in data.validation_sets.values() for source in sources]
    for setting, sources in (("train", data.train), ("validation", validation), ("test", test)):
        for source in sources:
            yield from _told(f"data.{setting}", partial(files_of, source))
    yield from _told("model.name_or_path", partial(refuse_no_model, config.model))
    if template is not None:
        yield from _told("model.chat_template", partial(_refuse_no_file, template))
    if adapter is not None:
        yield from _told("lora.init_from", partial(find_adapter, adapter))


def _refuse_no_file(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file in it")
    if not path.exists():
        raise ConfigError(f"{path}: no such file{similar_beside(path)}")


def _told(setting: str, look: Callable[[], object]) -> Iterator[tuple[str, str]]:
    try:
        look()
    except ChatLoraError as error:
        for problem in error.problems:
            yield setting, problem.removeprefix(f"{setting}: ")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        yield setting, f"{error.filename}: {error.strerror}"
