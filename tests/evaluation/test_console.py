"""The tables of an evaluation stay short, whatever a model answers."""

import io
import re

import pytest
from rich.console import Console

from chatlora.evaluation.console import show_samples, show_scores
from chatlora.evaluation.metrics import score
from chatlora.evaluation.predictions import Prediction

MOST_LINES = 6


def cells(prompt: str, prediction: str, width: int) -> dict[str, list[str]]:
    """The lines of each row of the table, by its label."""
    stream = io.StringIO()
    sample = Prediction(id=1, turn=0, prompt=prompt, prediction=prediction, reference="right")
    show_samples(Console(file=stream, width=width, color_system=None), {"model": [sample]})
    found: dict[str, list[str]] = {}
    label = ""
    for line in stream.getvalue().splitlines():
        match = re.fullmatch(r"[│|] (.*?) [│|] (.*?) [│|]", line)
        if match:
            label = match[1].strip() or label
            found.setdefault(label, []).append(match[2].rstrip())
    return found


@pytest.mark.parametrize("width", [60, 200])
@pytest.mark.parametrize(
    "text", ["\n" * 39, "a\n" * 40, "a\n\n" * 20 + "z", "好" * 5_000, "word " * 1_000, "\ud83d" * 900]
)
def test_a_cell_has_few_lines(text: str, width: int) -> None:
    shown = cells(f"{text}end of the prompt", text, width)
    assert {name: len(lines) <= MOST_LINES for name, lines in shown.items()} == dict.fromkeys(shown, True)
    assert shown["prompt"][-1].endswith("end of the prompt")
    assert shown["reference"] == ["right"]


@pytest.mark.parametrize("answer", ["", "\n" * 39, " \t "])
def test_an_empty_answer_is_called_so(answer: str) -> None:
    assert cells("prompt", answer, 60)["model"] == ["(empty)"]


def test_what_is_left_out_is_marked_and_what_fits_stays_as_it_is() -> None:
    lines = [f"line {number}" for number in range(40)]
    shown = cells("\n".join(lines), "\n".join(lines), 60)
    assert shown["model"] == [*lines[:5], "..."]
    assert shown["prompt"] == ["...", *lines[-5:]]
    assert cells("p", "[bold]\n  two\n\nfour", 60)["model"] == ["[bold]", "  two", "", "four"]


@pytest.mark.parametrize("name", ["q[/z]/y.jsonl:1#0", "owner/set[train]: row 1#0", "broken \ud800"])
def test_names_are_shown_as_they_are(name: str) -> None:
    """Square brackets are no markup, and a lone surrogate is no reason to stop after everything was generated."""
    console = Console(file=io.StringIO(), width=200)
    show_samples(console, {name: [Prediction(name, "x", "x")]})
    show_scores(console, {name: score(["x"], ["x"])})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count(name.replace("\ud800", "?")) == 3
