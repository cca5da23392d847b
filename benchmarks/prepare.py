"""What preparing rows costs, beside the tokenizer alone and beside transformers' `apply_chat_template`.

    python benchmarks/prepare.py [--data FILE ...] [--templates own|NAME ...] [--sample N] [--rows N]

NAME is one of trl's templates, e.g. qwen3, which gives an example a turn; `own` is SmolLM2's. All is measured in one
run on the same rows and the same tokenizer (SmolLM2's, with the template's control tokens): processor time of one
process, the best of some rounds that take turns, and then the whole preparation as train.py does it, with its workers,
from the file to the rows in the cache. Read the ratios. Rows that the template refuses are left out everywhere.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "embedded:smollm2-135m-instruct"
ROUNDS = 3
WHOLE = 1_000_000  # tokens: nothing is cut
CONTROL = re.compile(r"<[^<>\s{}'\"+]{2,40}>|\[/?[A-Z_]{4,}\]")


def tokenizer_with(template: str) -> Any:
    """SmolLM2's tokenizer with trl's template of this name and the control tokens that its text names; `own`: as is."""
    from chatlora.config import ModelConfig
    from chatlora.model.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name_or_path=MODEL))
    if template != "own":
        import trl
        from tokenizers import AddedToken

        path = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        found = list(dict.fromkeys(CONTROL.findall(re.sub(r"\{#.*?#\}", "", tokenizer.chat_template))))
        new = [token for token in found if token not in tokenizer.get_vocab()]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])  # as Qwen's are
    return tokenizer


def renderer_with(tokenizer: Any) -> Any:
    from chatlora.rendering.renderer import Renderer
    from chatlora.rendering.template import resolve_template_kwargs

    kwargs = resolve_template_kwargs(tokenizer.chat_template, {}, any_reasoning=False)
    return Renderer(tokenizer, chat_template_kwargs=kwargs)


def costs_of(tokenizer: Any, conversations: Sequence[Any]) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Seconds of processor time a row for each way, and what the rows are."""
    from chatlora.data.workers import Work

    renderer = renderer_with(tokenizer)
    work, kwargs = Work(renderer, WHOLE, "fit", "all"), renderer.chat_template_kwargs
    rendered = [(row, work.outcome(row).rendered) for row in conversations]
    rows = [(row, outcome.examples) for row, outcome in rendered if outcome is not None]
    asked = [(row.as_template_input(), list(row.tools) or None) for row, _ in rows]
    taught = [
        pair for (row, examples), given in zip(rows, asked, strict=True) for pair in _taught(row, examples, given)
    ]
    texts = [tokenizer.apply_chat_template(said, tools=tools, tokenize=False, **kwargs) for said, tools in asked]

    def templated(given: Sequence[Any]) -> None:
        for said, tools in given:
            tokenizer.apply_chat_template(said, tools=tools, tokenizer_kwargs={"verbose": False}, **kwargs)

    ways: dict[str, Callable[[], object]] = {
        "tokenizer": lambda: [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts],
        "template, a row": lambda: templated(asked),
        "template, an example": lambda: templated(taught),
        "preparing": lambda: [work.outcome(row) for row, _ in rows],
    }
    seconds = {name: min(column) / len(rows) for name, column in _taking_turns(ways).items()}
    examples = [example for _, each in rows for example in each]
    tokens = sum(len(example.input_ids) for example in examples)
    return seconds, {"rows": len(rows), "examples": len(examples) / len(rows), "tokens": tokens / len(rows)}


def _taught(row: Any, examples: Sequence[Any], given: tuple[list[Any], Any]) -> list[tuple[list[Any], Any]]:
    """What apply_chat_template is asked for the same examples: the conversation up to the reply that each ends with."""
    said, tools = given
    replies = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    return [(said[: index + 1], tools) for index in replies[len(replies) - len(examples) :]]


def _taking_turns(ways: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            way()
            seconds[name].append(time.process_time() - began)
    return seconds


def whole(data: str, template: str, num_rows: int) -> tuple[dict[str, float], dict[str, float]]:
    """From a file of so many rows (its own again and again, numbered) to the cache, and opened from there once more."""
    from chatlora.config import Source
    from chatlora.reading.sources import read_rows

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = cycle([row for row, _ in read_rows(Source(path=data))])
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(_numbered(row, number)) + "\n" for number, row in enumerate(islice(rows, num_rows))
            )
        return in_a_process(path, template), in_a_process(path, template)


def _numbered(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The row, unlike any other."""
    said = row.get("messages") or row.get("conversations")
    if isinstance(said, list):
        first = {key: f"{number}: {value}" if key in ("content", "value") else value for key, value in said[0].items()}
        return {**row, "messages" if "messages" in row else "conversations": [first, *said[1:]]}
    return {**row, "prompt": f"{number}: {row['prompt']}"} if "prompt" in row else dict(row)


def in_a_process(path: Path, template: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), template]
    told = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    if told.returncode:
        sys.exit(f"{template} failed:\n{told.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(told.stdout.strip().splitlines()[-1])
    return measured


def measure(path: Path, template: str) -> None:
    """Prints what the preparation of this file took: seconds, those of processors, GiB of memory and of the cache."""
    from chatlora.config import DataConfig
    from chatlora.data.dataset import prepare_training_data

    settings = DataConfig.model_validate({"train": str(path), "validation": 0, "max_length": WHOLE})
    renderer, cache = renderer_with(tokenizer_with(template)), path.parent / "cache"
    began, cpu = time.perf_counter(), _cpu_seconds()
    prepare_training_data(settings, 0, lambda _: renderer, cache=cache, say=lambda line: None, refuse_lost=False)
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    here, worker = (
        resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    stored = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 2**30
    print(json.dumps({"seconds": seconds, "cpu": cpu, "here": here, "worker": worker, "stored": stored}))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["embedded:demo/train.jsonl"], help="rows in any form")
    parser.add_argument("--templates", nargs="+", default=["own", "qwen3"], help="`own`, or names of trl's")
    parser.add_argument("--sample", type=int, default=150, help="rows of each file that one process is timed on")
    parser.add_argument("--rows", type=int, default=0, help="rows of the whole preparation; 0: it is left out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(Path(given.measure[0]), given.measure[1])
        return

    from chatlora.config import Source
    from chatlora.reading.sources import read_conversations

    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; milliseconds of processor time a row\n")
    print(
        "| data, template | examples a row | tokens a row | tokenizer | template, a row | template, an example "
        "| preparing | / tokenizer | / a row | / an example |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for data in given.data:
        rows = list(islice(read_conversations(Source(path=data)), given.sample))
        for template in given.templates:
            tokenizer = tokenizer_with(template)
            seconds, what = costs_of(tokenizer, rows)
            alone, once, each, preparing = seconds.values()
            cells = [f"{Path(data).name}, {template}", f"{what['examples']:.1f}", f"{what['tokens']:.0f}"]
            cells += [f"{1000 * value:.2f}" for value in seconds.values()]
            cells += [f"{preparing / other:.1f}" for other in (alone, once, each)]
            print(f"| {' | '.join(cells)} |", flush=True)
            if given.rows:
                made, opened = whole(data, template, given.rows)
                print(told_of(given.rows, made, opened), flush=True)


def told_of(num_rows: int, made: Mapping[str, float], opened: Mapping[str, float]) -> str:
    return (
        f"\n{num_rows:,} such rows: {num_rows / made['seconds']:,.0f} a second, {1000 * made['cpu'] / num_rows:.2f} ms "
        f"of processor time a row; at most {made['here']:.2f} GiB and {made['worker']:.2f} in each worker; "
        f"{made['stored']:.2f} GiB in the cache; opened again in {opened['seconds']:.1f} s (of processor time "
        f"{opened['cpu']:.1f} s), {opened['here']:.2f} GiB\n"
    )


if __name__ == "__main__":
    main()
