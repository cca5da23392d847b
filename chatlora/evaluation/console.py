"""What a person sees of an evaluation: how far it is, the scores side by side, a few samples."""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from chatlora.evaluation.metrics import Scores
from chatlora.evaluation.predictions import Prediction
from chatlora.progress import clock

SECONDS_BETWEEN_LINES = 10.0
SAMPLES_SHOWN = 4
LONGEST_TEXT = 400  # characters of one cell


class GenerationProgress:
    """A bar in a terminal, a line now and then in a log file. Time left goes by tokens, not by samples."""

    def __init__(self, title: str, num_samples: int, total_cost: int) -> None:
        self.num_samples = num_samples
        self.total_cost = total_cost
        self.samples = self.cost = self.tokens = 0
        self.began = self.last_line = time.monotonic()
        self.title = title
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=num_samples)
        self.bar.start()

    def advance(self, samples: int, cost: int, tokens: int) -> None:
        """cost: of these samples, in the unit of `total_cost`; tokens: generated for them."""
        self.samples += samples
        self.cost += cost
        self.tokens += tokens
        spent = time.monotonic() - self.began
        left = spent * (self.total_cost - self.cost) / self.cost
        numbers = f"{self.tokens / max(spent, 1e-9):,.0f} tokens/s  {clock(left)} left"
        self.bar.update(self.task, completed=self.samples, description=numbers)
        is_due = time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES or self.samples == self.num_samples
        if self.bar.disable and is_due:
            self.last_line = time.monotonic()
            print(f"{self.title} {self.samples}/{self.num_samples}  {numbers}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.stop()


def show_scores(console: Console, scores: Mapping[str, Scores]) -> None:
    """One column a model, one row a measure, and what the last model gained over the first."""
    names = list(scores)
    table = Table(title=f"scores over {len(scores[names[0]].per_sample):,} samples", title_justify="left")
    table.add_column("measure")
    for name in names:
        table.add_column(name, justify="right")
    if len(names) > 1:
        table.add_column("gain", justify="right")
    for measure in scores[names[0]].values:
        numbers = [scores[name].values[measure] for name in names]
        places = 4 if "|scale:0-1|" in scores[names[0]].signatures[measure] else 2
        gain = [f"{numbers[-1] - numbers[0]:+.{places}f}"] if len(names) > 1 else []
        table.add_row(measure, *(f"{number:.{places}f}" for number in numbers), *gain)
    console.print(table)


def show_samples(console: Console, predictions: Mapping[str, Sequence[Prediction]]) -> None:
    """A few samples, spread over all of them: the end of the prompt, the reference, each model's prediction."""
    names = list(predictions)
    count = len(predictions[names[0]])
    for index in sorted({count * place // SAMPLES_SHOWN for place in range(SAMPLES_SHOWN)}):
        sample = predictions[names[0]][index]
        place = f"sample {sample.id}" + ("" if sample.turn is None else f", turn {sample.turn}")
        table = Table(title=place, title_justify="left", show_header=False, show_lines=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        references = [sample.reference] if isinstance(sample.reference, str) else sample.reference
        others = f" (and {len(references) - 1} more)" if len(references) > 1 else ""
        rows = {"prompt": _end(sample.prompt), "reference": references[0] + others}
        rows |= {name: predictions[name][index].prediction for name in names}
        for label, text in rows.items():
            if text is not None:
                table.add_row(_plain(label), _plain(text))
        console.print(table)


def _end(prompt: str | None) -> str | None:
    return prompt if prompt is None or len(prompt) <= LONGEST_TEXT else "..." + prompt[-LONGEST_TEXT:]


def _plain(text: str) -> Text:
    # A Text, since rich would read [bold] in a model's answer as markup; and no terminal can show a lone surrogate.
    shown = text if len(text) <= LONGEST_TEXT + 3 else text[:LONGEST_TEXT] + "..."
    return Text(shown.encode("utf-8", "replace").decode("utf-8"))
