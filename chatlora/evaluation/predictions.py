"""Predictions on disk: a JSON line each, written as they come, read back whole or refused with the place. No torch."""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatlora.disk import whole_lines, written_beside
from chatlora.errors import PredictionsError
from chatlora.reading.json_files import read_jsonl
from chatlora.reading.streams import NOT_READ, BadRow

FIELDS = ("id", "turn", "prompt", "prediction", "prediction_raw", "reference", "stop_reason", "scores")
REQUIRED = ("prediction", "reference")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model said to one prompt, beside what it should have said.

    id, turn        which sample: the row and the assistant turn in it
    prediction      the answer without control tokens; `prediction_raw` holds them too
    reference       the reference answer, or a list where one prompt has several
    stop_reason     `stop`: the model ended its turn; `length`: it was cut off at the longest answer allowed
    scores          this sample's own, once it is scored
    Only `prediction` and `reference` are needed for scoring; the rest is None in files that other programs wrote.
    """

    id: str | int
    prediction: str
    reference: str | list[str]
    turn: int | None = None
    prompt: str | None = None
    prediction_raw: str | None = None
    stop_reason: str | None = None
    scores: dict[str, float] | None = None

    def as_line(self) -> str:
        fields = asdict(self)
        given = {name: fields[name] for name in FIELDS if fields[name] is not None}
        # A lone surrogate cannot be written as UTF-8; the escaped form can, and reads back equal.
        try:
            line = json.dumps(given, ensure_ascii=False)
            line.encode("utf-8")
        except UnicodeEncodeError:
            line = json.dumps(given, ensure_ascii=True)
        return line + "\n"


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Add whole lines to the end of `path`; they have left this process when the call returns."""
    text = "".join(prediction.as_line() for prediction in predictions)
    with path.open("a", encoding="utf-8", newline="") as stream:
        stream.write(text)


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replace `path` by these predictions."""
    with written_beside(path) as beside:
        append_predictions(beside, predictions)


def read_written_so_far(path: Path) -> list[Prediction]:
    """The predictions of a file that a process of ours was appending to; a half-written last line is left out."""
    return [_as_prediction(line, place=str(path)) for line in whole_lines(path)]


def read_predictions(path: Path) -> list[Prediction]:
    """Predictions made anywhere. Raises PredictionsError with `file:line`, reason and remedy of every bad line."""
    predictions: list[Prediction] = []
    problems: list[str] = []
    try:
        for row, place in read_jsonl(path, str(path)):
            found = [f"{place}: {row.problem}."] if isinstance(row, BadRow) else _problems(row, place)
            problems += found
            if not isinstance(row, BadRow) and not found:
                predictions.append(_as_prediction(row, place))
    except NOT_READ as error:
        raise PredictionsError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); give the path of a JSON-lines file."
        ) from None
    if not predictions and not problems:
        problems.append(f"{path}: holds no predictions; write one JSON object with {_wanted()} on each line.")
    if problems:
        raise PredictionsError(*problems)
    return predictions


def _problems(row: Mapping[str, Any], place: str) -> list[str]:
    problems = []
    for name in REQUIRED:
        if name not in row:
            close = difflib.get_close_matches(name, [key for key in row if key not in FIELDS], n=1)
            fields = ", ".join(map(repr, row)) or "none"
            hint = f"rename '{close[0]}'" if close else f"add it, or rename the one that holds it (there are: {fields})"
            problems.append(f"{place}: field '{name}' is missing; {hint}.")
    for name in ("prediction", "prediction_raw"):
        if name in row and not isinstance(row[name], str) and not (name == "prediction_raw" and row[name] is None):
            problems.append(f"{place}: '{name}' is {_named(row[name])}; it must be a string (an empty one scores 0).")
    reference = row.get("reference", "")
    if isinstance(reference, list):
        if not reference or not all(isinstance(text, str) for text in reference):
            problems.append(f"{place}: 'reference' is a list; it must hold at least one string, and only strings.")
    elif not isinstance(reference, str):
        problems.append(f"{place}: 'reference' is {_named(reference)}; it must be a string or a list of strings.")
    return problems


def _as_prediction(row: Mapping[str, Any], place: str) -> Prediction:
    given = {name: row[name] for name in FIELDS if name in row and name != "scores"}
    return Prediction(**{"id": place.rpartition("/")[2], **given})


def _wanted() -> str:
    return " and ".join(f"'{name}'" for name in REQUIRED)


def _named(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
