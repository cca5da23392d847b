"""Say what a model answers to held-out conversations, and score it. `python evaluate.py --help` lists the ways.

`generate` is the whole generation pass; `evaluate` sets it up and shows the scores. Everything heavy is
imported where it is needed: a file of predictions is scored without torch, and importing this file does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from chatlora.config_files import HELP
from chatlora.distributed.signals import StopSignals
from chatlora.errors import run_as_script
from chatlora.evaluation.command_line import MODEL, Request, help_text, parse

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from chatlora.distributed.runtime import Runtime
    from chatlora.evaluation.generation import Model, Results


def generate(
    runtime: Runtime, model: Model, batches: Iterable[dict[str, Any]], settings: GenerationConfig, results: Results
) -> None:
    from chatlora.data.loader import to_device

    for batch in batches:
        samples, references = batch.pop("samples"), batch.pop("output_ids")  # the model never sees the references
        output = model.generate(**to_device(batch, runtime.device), generation_config=settings)
        generated = output[:, batch["input_ids"].shape[1] :]  # the prompt is trimmed
        results.append(samples, generated, references)  # on disk before the next batch


def main(argv: Sequence[str], runtime: Runtime | None = None, *, again: bool = True) -> None:
    """runtime: that of a training which goes on to this in the same processes. again: even if there are scores."""
    if set(HELP) & set(argv):
        print(help_text())
        return
    request = parse(argv)
    if request.predictions is not None:
        score_file(request)
        return

    if runtime is not None:
        evaluate(request, runtime, again)
        return
    with StopSignals() as signals:  # before the seconds that imports take
        from chatlora.evaluation.named_files import refuse_missing_files

        refuse_missing_files(request)

        from chatlora.distributed.runtime import start
        from chatlora.progress import print_line

        runtime = start(request.config, signals)
        for note in runtime.notes if runtime.is_main else ():
            print_line(note)
        evaluate(request, runtime, again)


def evaluate(request: Request, runtime: Runtime, again: bool) -> None:
    from chatlora.evaluation.scoring import show_earlier_scores
    from chatlora.evaluation.setup import open_folders, score_and_show, set_up

    if not again and runtime.broadcast_bool(runtime.is_main and show_earlier_scores(request)):
        return
    generation = set_up(request, runtime)
    with open_folders(request.folders, runtime) as parts:
        for name, part in parts.items():
            with generation.answering(name, part) as results:
                generate(runtime, generation.model, generation.batches(), generation.settings, results)
        if runtime.is_main:
            score_and_show(generation, request)


def score_file(request: Request) -> None:
    """Score predictions that were made anywhere."""
    from rich.console import Console

    from chatlora.evaluation.console import show_samples, show_scores
    from chatlora.evaluation.predictions import read_predictions
    from chatlora.evaluation.scoring import score_into, told_in

    assert request.predictions is not None
    predictions = read_predictions(request.predictions)
    with told_in(request.output_dir):
        scored, scores = score_into(
            request.output_dir, predictions, request.config.evaluation.style, request.evaluated(MODEL)
        )
    console = Console()
    show_samples(console, {"prediction": scored})
    show_scores(console, {request.predictions.stem: scores})
    console.print(f"written to {request.output_dir}", highlight=False, markup=False)


if __name__ == "__main__":
    run_as_script(main)
