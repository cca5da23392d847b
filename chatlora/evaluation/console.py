"""What a person sees of an evaluation: the scores side by side, a few samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.containers import Lines
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from chatlora.evaluation.metrics import Scores
from chatlora.evaluation.predictions import Prediction
from chatlora.terminal import printable

SAMPLES_SHOWN = 4
MOST_LINES = 6  # of one cell
LONGEST_TEXT = 2_000  # characters of one cell that are looked at


def show_scores(console: Console, scores: Mapping[str, Scores]) -> None:
    """One column a model, one row a measure, and what the last model gained over the first."""
    names = list(scores)
    table = Table(title=f"scores over {len(scores[names[0]].per_sample):,} samples", title_justify="left")
    table.add_column("measure")
    for name in names:
        table.add_column(printable(name), justify="right")
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
        table = Table(title=printable(place), title_justify="left", show_header=False, show_lines=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        references = [sample.reference] if isinstance(sample.reference, str) else sample.reference
        others = f" (and {len(references) - 1} more)" if len(references) > 1 else ""
        rows = {"prompt": sample.prompt, "reference": references[0] + others}
        rows |= {name: predictions[name][index].prediction for name in names}
        for label, text in rows.items():
            if text is not None:
                table.add_row(printable(label), Excerpt(text, from_end=label == "prompt"))
        console.print(table)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A cell of at most `MOST_LINES` lines, however wide the column comes out: the beginning of a text, or its end."""

    text: str
    from_end: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self._shown().wrap(console, options.max_width, overflow="fold")
        if len(lines) > MOST_LINES:
            kept = lines[1 - MOST_LINES :] if self.from_end else lines[: MOST_LINES - 1]
            lines = Lines([Text("..."), *kept] if self.from_end else [*kept, Text("...")])
        yield lines

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._shown())

    def _shown(self) -> Text:
        text = self.text.strip()
        cut = text[-LONGEST_TEXT:] if self.from_end else text[:LONGEST_TEXT]
        if len(cut) < len(text):
            cut = "..." + cut if self.from_end else cut + "..."
        return printable(cut) if text else Text("(empty)", style="dim")
