"""Predictions on disk: a JSON line each, written as they come, read back whole or refused with the place. No torch."""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatlora.errors import PredictionsError

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
    """Replace `path` by these predictions: beside it first, then renamed, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(prediction.as_line() for prediction in predictions)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def read_written_so_far(path: Path) -> list[Prediction]:
    """The predictions of a file that a process of ours was appending to; a half-written last line is left out."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [_as_prediction(json.loads(line), place=str(path)) for line in whole.split(b"\n") if line]


def read_predictions(path: Path) -> list[Prediction]:
    """Predictions made anywhere. Raises PredictionsError with `file:line`, reason and remedy of every bad line."""
    try:
        raw_lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise PredictionsError(
            f"{path}: cannot be read ({error.strerror}); give the path of a JSON-lines file."
        ) from None
    predictions: list[Prediction] = []
    problems: list[str] = []
    for number, raw_line in enumerate(raw_lines, start=1):
        if not raw_line.strip():
            continue
        place = f"{path}:{number}"
        row, found = _parse(raw_line, place)
        problems += found
        if row is not None and not found:
            predictions.append(_as_prediction(row, place))
    if not predictions and not problems:
        problems.append(f"{path}: holds no predictions; write one JSON object with {_wanted()} on each line.")
    if problems:
        raise PredictionsError(*problems)
    return predictions


def _parse(raw_line: bytes, place: str) -> tuple[Mapping[str, Any] | None, list[str]]:
    try:
        row = json.loads(raw_line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, [f"{place}: byte {error.start + 1} is not UTF-8; save the file as UTF-8."]
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        remedy = "the line looks cut off: write it again or remove it" if cut else "write one JSON object on each line"
        return None, [f"{place}: not valid JSON at column {error.colno} ({error.msg}); {remedy}."]
    except RecursionError:
        return None, [f"{place}: nested too deeply; write one flat JSON object with {_wanted()}."]
    if not isinstance(row, dict):
        return None, [f"{place}: holds {_named(row)}, not an object; write one JSON object with {_wanted()}."]
    return row, _problems(row, place)


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
