"""The command line of evaluate.py -> a Request, or every mistake in it at once. No torch."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chatlora.config import Config, Source
from chatlora.config_files import config_from_file, read_config, split_words, stem_of
from chatlora.errors import ConfigError
from chatlora.settings import known_settings, settings_text

USAGE = """
  accelerate launch evaluate.py RUN_DIR [--split test] [--compare base] [--section.field VALUE ...]
  accelerate launch evaluate.py --model M [--adapter A] --data F [--compare base] [--section.field VALUE ...]
  python evaluate.py --predictions FILE.jsonl          (needs no model)"""
SPLITS = ("test", "validation")
MODEL, ADAPTER, BASE = "model", "adapter", "base"  # a model without an adapter; with it; the same with it switched off

OWN = ("model", "adapter", "data", "split", "compare", "predictions", "output_dir")
SHORT = {"model": "model.name_or_path", "data": "data.test"}  # own words that are settings
SETTINGS = (
    *SHORT.values(),
    "model.revision",
    "model.chat_template",
    "model.chat_template_kwargs",
    "model.chat_template_date",
    "data.system",
    "data.over_length",
    "data.on_bad_row",
    "data.supervise",
    "data.reasoning",
    "data.control_text",
    "evaluation.max_new_tokens",
    "evaluation.max_prompt_length",
    "evaluation.max_tokens_per_batch",
    "evaluation.style",
    "run.precision",
    "run.cpu_threads",
)
SETTINGS_OF_SCORES = ("evaluation.style",)  # all that matters where predictions are at hand


@dataclass(frozen=True, slots=True)
class Request:
    """What to evaluate, and where the results go. Either `predictions` is set, or the rest says how to make them."""

    config: Config
    output_dir: Path
    predictions: Path | None = None
    adapter: Path | None = None
    split: str = "test"
    run_dir: Path | None = None  # whose adapter it is, or whose settings
    sources: tuple[Source, ...] = ()  # the rows to evaluate on
    compare_base: bool = False

    @property
    def of_run(self) -> bool:
        return self.run_dir is not None

    @property
    def folders(self) -> dict[str, Path]:
        """What is evaluated -> where its results go: the base model's beside the adapter's, as NAME-base."""
        if self.adapter is None:
            return {MODEL: self.output_dir}
        base = {BASE: self.output_dir.with_name(self.output_dir.name + "-base")} if self.compare_base else {}
        return {**base, ADAPTER: self.output_dir}

    def evaluated(self, name: str) -> dict[str, str | None]:
        """Whose answers are in `folders[name]`, as scores.json says."""
        if self.predictions is not None:
            return {"predictions": str(self.predictions.absolute())}
        adapter = None if name != ADAPTER or self.adapter is None else str(self.adapter.absolute())
        return {"model": self.config.model.name_or_path, "adapter": adapter}


def parse(argv: Sequence[str]) -> Request:
    """Raises ConfigError with every mistake."""
    words = split_words(argv, OWN)
    try:
        given = parser().parse_args([*words.names[:1], *(f"--{word}={value}" for word, value in words.own.items())])
    except argparse.ArgumentError as error:
        raise ConfigError(*words.problems, str(error)) from None
    twice = _written_twice(given, words.flags)
    _as_words(given, words.flags)
    conflicts = [*twice, *_conflicts(given, words.names)]
    problems = [*words.problems, *conflicts, *_useless(given, words.flags)]
    shorts = {setting: getattr(given, word) for word, setting in SHORT.items()}
    flags = words.flags | {setting: value for setting, value in shorts.items() if value is not None}
    if conflicts:
        read_config(None, flags, problems)  # raises them, with what is wrong in the values
    if given.predictions is not None:
        folder = given.output_dir or Path("eval") / given.predictions.stem
        return _refuse_other_results(Request(read_config(None, flags, problems), folder, given.predictions))
    split = given.split or "test"
    if given.run_dir is not None:
        home, adapter = given.run_dir / "eval", given.adapter or given.run_dir / "adapter"
        config = config_of_run(given.run_dir, adapter, flags, problems)
    else:
        config, home, adapter = read_config(None, flags, problems), Path("eval"), given.adapter
    if given.data is not None and isinstance(config.data.test, float):
        raise ConfigError(
            f"--data is {given.data}, a share: name the rows themselves; those that a run held out are its --split test"
        )
    sources = _sources(config, given, split)
    request = Request(
        config,
        given.output_dir or home / (stem_of(sources[0].path) if given.data else split),
        adapter=adapter,
        split=split,
        run_dir=given.run_dir,
        sources=sources,
        compare_base=given.compare is not None,
    )
    return _refuse_other_results(request)


def _as_words(given: argparse.Namespace, flags: Mapping[str, str]) -> None:
    """What was said in another way: a run by the adapter in it, the model or the rows by the setting's own name."""
    if given.run_dir is not None and given.adapter is None and (run_dir := run_of_adapter(given.run_dir)) is not None:
        given.run_dir, given.adapter = run_dir, given.run_dir
    if given.predictions is None:
        given.data = given.data or flags.get("data.test")
        if given.run_dir is None:  # beside a run it says where its base model is now
            given.model = given.model or flags.get("model.name_or_path")


def _refuse_other_results(request: Request) -> Request:
    """Raise ConfigError where a folder holds the results of another model, adapter or file of predictions."""
    problems = []
    for name, folder in request.folders.items():
        try:
            told = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        mine = request.evaluated(name)
        for key in ("model", "adapter", "predictions"):
            if not _same(told.get(key), mine.get(key)):
                problems.append(
                    f"{folder} holds results of another {key}: {told.get(key)} there, {mine.get(key)} here; give "
                    "another folder with --output_dir, or remove that one"
                )
                break
    if problems:
        raise ConfigError(*problems)
    return request


def _same(there: str | None, here: str | None) -> bool:
    """A path may be written in more than one way, and a run directory may have been moved."""
    if there is None or here is None or there == here:
        return there == here
    old, new = Path(there), Path(here)
    if not old.is_absolute() and not new.is_absolute():
        return False
    return old.resolve() == new.resolve() or (not old.exists() and old.parts[-2:] == new.parts[-2:])


def _sources(config: Config, given: argparse.Namespace, split: str) -> tuple[Source, ...]:
    """The rows to evaluate on: those of the split, or those that the run held out for it."""
    if split in config.data.shares:
        from chatlora.data.held_out import read_held_out

        return read_held_out(given.run_dir, split)
    named = config.data.validation_sets if split == "validation" else {"test": config.data.test}
    sources = tuple(source for each in named.values() if isinstance(each, tuple) for source in each)
    if not sources:
        raise ConfigError(
            f"{given.run_dir}/config.yaml: data.{split} is not set, so there are no {split} rows; give them with "
            "--data FILE"
        )
    return sources


def help_text() -> str:
    """What `--help` prints."""
    settings = settings_text([setting for setting in SETTINGS if setting not in SHORT.values()])
    return f"{parser().format_help()}\nsettings, in place of the run's own or the defaults:\n{settings}\n"


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser("evaluate.py", usage=USAGE, allow_abbrev=False, add_help=False, exit_on_error=False)
    words.add_argument(
        "run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="a finished run: its adapter is evaluated"
    )
    words.add_argument("--model", metavar="M", help="a folder, a model of the hub, or embedded:smollm2-135m-instruct")
    words.add_argument("--adapter", type=Path, metavar="A", help="a PEFT adapter's folder [RUN_DIR/adapter]")
    words.add_argument("--data", metavar="F", help="the rows, as data.test takes them [data.test of the run]")
    words.add_argument("--split", choices=SPLITS, help="which rows of the run [test]")
    words.add_argument(
        "--compare", choices=["base"], help="generate with the base model too, and show both side by side"
    )
    words.add_argument(
        "--predictions", type=Path, metavar="FILE.jsonl", help="score these: prediction, reference a line"
    )
    words.add_argument("--output_dir", type=Path, metavar="D", help="[RUN_DIR/eval/SPLIT; without a run, eval/STEM]")
    return words


def _written_twice(given: argparse.Namespace, flags: Mapping[str, str]) -> list[str]:
    return [
        f"--{word} and --{setting} are one setting: leave one of them out"
        for word, setting in SHORT.items()
        if getattr(given, word) is not None and setting in flags
    ]


def _useless(given: argparse.Namespace, flags: Mapping[str, str]) -> list[str]:
    """What was given and would change nothing. What is no setting at all is told by who reads the settings."""
    useful, where = (SETTINGS, "evaluate.py") if given.predictions is None else (SETTINGS_OF_SCORES, "--predictions")
    words = [] if given.predictions is None else ["adapter", "data", "split", "compare"]
    useless = [word for word in words if getattr(given, word) is not None]
    useless += [flag for flag in flags if flag in known_settings() and flag not in useful]
    return [f"--{name} has no use with {where}: leave it out" for name in useless]


def _conflicts(given: argparse.Namespace, names: Sequence[str]) -> list[str]:
    sources = {"RUN_DIR": given.run_dir, "--model": given.model, "--predictions": given.predictions}
    named = [name for name, value in sources.items() if value is not None]
    problems = []
    if len(named) != 1:
        found = f"{' and '.join(named)} were given together" if named else "nothing was named"
        problems.append(f"one thing is evaluated at a time: RUN_DIR, --model or --predictions; {found}")
    if given.model is not None and given.data is None:
        problems.append("--model needs --data FILE: the rows to evaluate on")
    if given.model is not None and given.split not in (None, "test"):
        problems.append(f"--split {given.split} belongs to a RUN_DIR; with --model the rows are those of --data")
    if given.run_dir is not None and given.data is not None and given.split not in (None, "test"):
        problems.append(f"--split {given.split} and --data both name the rows to evaluate on: leave one of them out")
    if given.model is not None and given.adapter is None and given.compare:
        problems.append("--compare base compares an adapter with its base model: give --adapter, or leave it out")
    if len(names) > 1:
        problems.append(f"one run at a time, but {len(names)} were given: {', '.join(names)}")
    return problems


def run_of_adapter(folder: Path) -> Path | None:
    """The run directory that an adapter's folder lies in; None where it is none, or lies alone."""
    if not (folder / "adapter_config.json").is_file():
        return None
    run_dir = folder.resolve().parent if folder.name in ("", "..") else folder.parent
    return run_dir if (run_dir / "config.yaml").is_file() else None


def config_of_run(run_dir: Path, adapter: Path, flags: Mapping[str, str], problems: Sequence[str]) -> Config:
    """The run's settings under those of the command line. Raises ConfigError where it is no run directory."""
    if (run_dir / "config.yaml").is_file():
        config = config_from_file(run_dir / "config.yaml", flags, problems)
        has_own = "model.chat_template" not in flags and (adapter / "tokenizer_config.json").is_file()
        return config.with_values("model", chat_template=None) if has_own else config  # the one that trained it
    fault = "is no run directory (it holds no config.yaml)" if run_dir.is_dir() else "is not a folder"
    runs = [parent for parent in run_dir.absolute().parents if (parent / "config.yaml").is_file()]
    adapter_flag = f" --adapter {run_dir}" if (run_dir / "adapter_config.json").is_file() else ""
    hint = f"did you mean {runs[0]}?" if runs else f"give one, or a model with --model M{adapter_flag} --data F"
    raise ConfigError(*problems, f"{run_dir} {fault}; {hint}")
