"""The command line of evaluate.py -> a Request, or every mistake in it at once. No torch."""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from chatlora.config import Config, Precision, Source, Sources, Style
from chatlora.config_files import config_from_file
from chatlora.errors import ChatLoraError, ConfigError

USAGE = """
  accelerate launch evaluate.py RUN_DIR [--split test] [--compare base]
  accelerate launch evaluate.py --model M [--adapter A] --data F [--compare base] [--output_dir D]
  python evaluate.py --predictions FILE.jsonl          (needs no model)"""
SPLITS = ("test", "validation")
MODEL, ADAPTER, BASE = "model", "adapter", "base"  # a model without an adapter; with it; the same with it switched off

# Where an option stands in a run's settings.
PLACES = {
    "model": "model.name_or_path",
    "chat_template": "model.chat_template",
    "system": "data.system",
    "data": "data.test",
    "style": "evaluation.style",
    "max_new_tokens": "evaluation.max_new_tokens",
    "max_prompt_length": "evaluation.max_prompt_length",
    "precision": "run.precision",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What to evaluate, and where the results go. Either `predictions` is set, or the rest says how to make them."""

    config: Config
    output_dir: Path
    predictions: Path | None = None
    adapter: Path | None = None
    split: str = "test"
    of_run: bool = False
    sources: tuple[Source, ...] = ()  # the rows to evaluate on
    compare_base: bool = False
    max_tokens_per_batch: int | None = None

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
    """Raises ConfigError; `--help` and words that are no option leave through argparse, with exit status 0 and 2."""
    given = parser().parse_args(list(argv))
    problems = list(_conflicts(given))
    if problems:
        raise ConfigError(*problems)
    split = given.split or "test"
    if given.predictions is not None:
        config = _with_overrides(Config(), given)
        folder = given.output_dir or Path("eval") / given.predictions.stem
        return _refuse_other_results(Request(config, folder, given.predictions))
    if given.run_dir is not None:
        config, home = _config_of_run(given.run_dir), given.run_dir / "eval"
        adapter = given.adapter or given.run_dir / "adapter"
    else:
        config, home, adapter = Config(), Path("eval"), given.adapter
    config = _with_overrides(config, given)
    sources = _sources(config, given, split)
    request = Request(
        config,
        given.output_dir or home / (_stem(sources[0].path) if given.data else split),
        adapter=adapter,
        split=split,
        of_run=given.run_dir is not None,
        sources=sources,
        compare_base=given.compare is not None,
        max_tokens_per_batch=given.max_tokens_per_batch,
    )
    return _refuse_other_results(request)


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


def _stem(data: str) -> str:
    """A folder's name from a file, a glob, a hub data set: `d/test*.jsonl` -> `test`."""
    return re.sub(r"[^\w.-]+", "-", Path(data).stem).strip("-.") or "data"


@contextmanager
def told_as_options(request: Request) -> Iterator[None]:
    """Within, an error names the options of evaluate.py and not a run's settings, which its reader did not write."""
    options = {place: f"--{option}" for option, place in PLACES.items() if not (request.of_run and option == "model")}
    # Whole names only: rows may lie in a file data.test.jsonl.
    names = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, options))})(?![\w/-]|\.\w)")
    try:
        yield
    except ChatLoraError as error:
        error.problems = tuple(names.sub(lambda found: options[found[0]], problem) for problem in error.problems)
        raise


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser("evaluate.py", usage=USAGE, allow_abbrev=False, add_help=True)
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
    settings = words.add_argument_group("settings, in place of the run's own")
    settings.add_argument("--style", choices=get_args(Style), help="how ROUGE and BLEU are computed [chatlora]")
    settings.add_argument("--max_new_tokens", type=_positive, metavar="N", help="longest answer, in tokens [512]")
    settings.add_argument("--max_prompt_length", type=_positive, metavar="N", help="longest prompt [data.max_length]")
    settings.add_argument("--system", metavar="TEXT", help="system prompt of conversations that have none")
    settings.add_argument("--chat_template", type=Path, metavar="FILE", help="a Jinja file, for a model without one")
    settings.add_argument("--precision", choices=get_args(Precision), help="of the base model [auto]")
    settings.add_argument(
        "--max_tokens_per_batch",
        type=_positive,
        metavar="N",
        help="prompts and answers of one batch, padding included [what half of the free memory takes, 2 GiB on CPU]",
    )
    return words


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _conflicts(given: argparse.Namespace) -> list[str]:
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
    if given.predictions is not None:
        unused = ["adapter", "data", "split", "compare", "max_new_tokens", "max_prompt_length", "system"]
        unused += ["chat_template", "precision", "max_tokens_per_batch"]
        useless = [name for name in unused if getattr(given, name) is not None]
        problems += [f"--{name} has no use with --predictions: leave it out" for name in useless]
    return problems


def _config_of_run(run_dir: Path) -> Config:
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder: give a run directory, or a model with --model M --data F")
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{run_dir} is no run directory (it holds no config.yaml); for a model use --model M --data F"
        )
    return config_from_file(run_dir / "config.yaml")


def _with_overrides(config: Config, given: argparse.Namespace) -> Config:
    """Checked anew by pydantic: `model_copy` alone would take anything."""
    values: dict[str, dict[str, Any]] = config.as_dict()
    for option, place in PLACES.items():
        value, (section, field) = getattr(given, option), place.split(".")
        if value is not None:
            values[section][field] = str(value) if isinstance(value, Path) else value
    if given.data is not None:
        values["data"]["test"] = _rows_named(given.data)
    return Config.model_validate(values)


def _rows_named(data: str) -> tuple[Source, ...]:
    """`F`, `{path: F, columns: {...}}` or a list of these, as train.py's --data.test takes them."""
    try:
        value = yaml.safe_load(data) if data[:1] in ("[", "{") else data
        return TypeAdapter(Sources).validate_python(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--data is {data!r}, which is not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = [f"--data: {'.'.join(map(str, each['loc'])) or data}: {each['msg']}" for each in error.errors()]
        raise ConfigError(*problems) from None
