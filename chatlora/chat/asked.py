"""The command line of `chatlora chat` -> what to load and how it answers, or every mistake in it at once. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chatlora.config import Config, with_absolute_paths
from chatlora.config_files import Words, read_config, split_words
from chatlora.errors import ConfigError
from chatlora.evaluation.command_line import config_of_run, run_of_adapter
from chatlora.model.folder import base_of
from chatlora.settings import known_settings, settings_text
from chatlora.training.named_files import named_adapter, named_by_model, refuse_missing

USAGE = """usage: chatlora chat RUN | ADAPTER | MODEL [--adapter A] [--section.field VALUE ...]

Talks to a finished run, to a PEFT adapter on its base, or to a model alone: under the template, its arguments and the
stop tokens of evaluate.py, with its greedy text (in bf16 but for rounding, since evaluate.py computes in batches).
In the conversation, /help lists what can be said to chatlora.
  --adapter A          another adapter's folder, as RUN/adapter-best [RUN/adapter]
  --max_new_tokens N   the longest answer, in tokens [evaluation.max_new_tokens]
  --temperature T      draw each token, 1 as the model says, lower ones more surely [0: the most likely token]
  --top_p P            draw among the likeliest tokens that have this probability together [1: among all]
  --seed N             makes the draws the same again [another one each time, told]
  --json               in a pipe: a JSON string a line in, a JSON object a line out

In a pipe each line is one message of one conversation, or a command such as /reset. Standard output is the answers and
nothing else, after /both the base's first; standard error is all the rest, thoughts too. An answer may have several
lines: --json keeps them apart, with prediction and stop_reason as in evaluate.py's predictions.jsonl. Exit status: 0 at
the end of the input, 2 at the first line that cannot be answered."""
OWN = ("adapter", "max_new_tokens", "temperature", "top_p", "seed")
SETTINGS = (
    "model.name_or_path",
    "model.revision",
    "model.chat_template",
    "model.chat_template_kwargs",
    "model.chat_template_date",
    "data.system",
    "data.reasoning",
    "data.control_text",
    "evaluation.max_new_tokens",
    "run.precision",
    "run.cpu_threads",
)
LONGEST = "evaluation.max_new_tokens"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: at temperature 0 the most likely one. seed: None is another one each time."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """adapter: None where a model is talked to as it is. of_run: the config is a run's, which says it all."""

    config: Config
    adapter: Path | None
    of_run: bool
    sampling: Sampling
    json: bool


def help_text() -> str:
    return f"{USAGE}\n\nsettings, in place of the run's own or the defaults:\n{settings_text(SETTINGS)}\n"


def parse(argv: Sequence[str]) -> Asked:
    """Raises ConfigError with every mistake."""
    words = split_words([word for word in argv if word != "--json"], OWN)
    problems, flags, own = words.problems, words.flags, words.own
    useless = [flag for flag in flags if flag in known_settings() and flag not in SETTINGS]
    problems += [f"--{flag} has no use with chat: leave it out" for flag in useless]
    sampling = Sampling(
        _number(own, "temperature", float, problems, lambda value: 0 <= value < float("inf"), "0 or more") or 0.0,
        _number(own, "top_p", float, problems, lambda value: 0 < value <= 1, "more than 0, 1 at most") or 1.0,
        _number(own, "seed", int, problems, lambda value: 0 <= value < 2**63, "a whole number, 0 or more"),
    )
    if not sampling.temperature:
        problems += [
            f"--{name} needs --temperature: greedy text draws nothing" for name in ("top_p", "seed") if name in own
        ]
    if "max_new_tokens" in own and LONGEST in flags:
        problems.append(f"--max_new_tokens and --{LONGEST} are one setting: leave one of them out")
    if "max_new_tokens" in own:
        flags[LONGEST] = own["max_new_tokens"]
    config, adapter, of_run = _named(words)
    return Asked(config, adapter, of_run, sampling, "--json" in argv)


def refuse_missing_files(asked: Asked) -> None:
    """Raise ConfigError with every file and folder that is named and is not there. The hub is not asked."""
    refuse_missing(
        *named_by_model(with_absolute_paths(asked.config).model),
        *named_adapter("adapter", asked.adapter),
    )


def _named(words: Words) -> tuple[Config, Path | None, bool]:
    """The settings, the adapter, and whether they are a run's."""
    names, flags, problems = words.names, words.flags, words.problems
    adapter = Path(words.own["adapter"]) if "adapter" in words.own else None
    if len(names) != 1:
        found = f"{len(names)} were given: {', '.join(names)}" if names else "nothing was named"
        problems.append(f"one run, adapter or model at a time; {found}")
        return read_config(None, flags, problems), None, False  # raises
    folder = Path(names[0])
    run_dir = run_of_adapter(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and adapter is not None:
        problems.append(f"{folder} is an adapter, and so is --adapter {adapter}: leave one of them out")
    if run_dir is not None:
        folder, adapter = run_dir, folder
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        adapter = adapter or folder / "adapter"
        return config_of_run(folder, adapter, flags, problems), adapter, True
    if is_adapter:
        if "model.name_or_path" not in flags:
            flags["model.name_or_path"] = _base_of(folder)
        return read_config(None, flags, problems), folder, False
    if "model.name_or_path" in flags:
        problems.append(f"{folder} and --model.name_or_path {flags['model.name_or_path']} are both models: name one")
    return read_config(None, flags | {"model.name_or_path": names[0]}, problems), adapter, False


def _base_of(adapter: Path) -> str:
    name = base_of(adapter)
    if name is None:
        raise ConfigError(
            f"{adapter}/adapter_config.json does not name a base model; name it with --model.name_or_path"
        )
    return name


def _number(
    own: dict[str, str],
    name: str,
    kind: Callable[[str], Number],
    problems: list[str],
    fits: Callable[[Number], bool],
    wanted: str,
) -> Number | None:
    if name not in own:
        return None
    try:
        value = kind(own[name])
    except ValueError:
        value = None
    if value is None or not fits(value):
        problems.append(f"--{name} is {own[name]!r}: {wanted} is needed")
        return None
    return value
