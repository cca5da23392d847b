"""Predictions -> predictions.jsonl with each sample's scores, scores.json, status.json; and scores of an earlier time.

No torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from chatlora.config import Style
from chatlora.disk import sha256_of, write_json
from chatlora.errors import ChatLoraError, ConfigError, Stopped
from chatlora.evaluation.command_line import Request
from chatlora.evaluation.console import show_scores
from chatlora.evaluation.metrics import Scores, score
from chatlora.evaluation.predictions import Prediction, write_predictions
from chatlora.reading.scan import inputs_of
from chatlora.run_directory import read_status


def score_into(
    folder: Path, predictions: Sequence[Prediction], style: Style, metadata: Mapping[str, Any]
) -> tuple[list[Prediction], Scores]:
    """Score, and write `folder`/predictions.jsonl and scores.json. metadata: what else scores.json should say."""
    scores = score_predictions(predictions, style)
    scored = [
        replace(prediction, scores=sample) for prediction, sample in zip(predictions, scores.per_sample, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", scored)
    write_json(folder / "scores.json", summary(scored, scores, style, metadata))
    return scored, scores


def score_predictions(predictions: Sequence[Prediction], style: Style) -> Scores:
    """Style `chatglm3` scores what its demo saw: the answer with the control tokens that decoding left in it."""
    texts = [
        prediction.prediction_raw
        if style == "chatglm3" and prediction.prediction_raw is not None
        else prediction.prediction
        for prediction in predictions
    ]
    return score(texts, [prediction.reference for prediction in predictions], style=style)


def summary(
    predictions: Sequence[Prediction], scores: Scores, style: Style, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of scores.json."""
    references = [prediction.reference for prediction in predictions]
    return {
        "scores": {
            name: {"value": value, "interval": None, "signature": scores.signatures[name]}
            for name, value in scores.values.items()
        },
        "samples": len(predictions),
        "references": sum(1 if isinstance(reference, str) else len(reference) for reference in references),
        "style": style,
        "empty_predictions": sum(not prediction.prediction.strip() for prediction in predictions),
        "cut_off": sum(prediction.stop_reason == "length" for prediction in predictions),
        **metadata,
    }


def inputs_of_request(request: Request) -> dict[str, Any]:
    """All that scores of a run depend on, files by the sha256 of what stands in them. For scores.json."""
    data, evaluation = request.config.data, request.config.evaluation
    return {
        "adapter_sha256": None if request.adapter is None else sha256_of(request.adapter / "adapter_model.safetensors"),
        "data_sha256": [each.sha256 for each in inputs_of(request.sources, request.split)],
        "max_new_tokens": evaluation.max_new_tokens,
        "max_prompt_length": evaluation.max_prompt_length or data.max_length,
        "style": evaluation.style,
        "on_bad_row": data.on_bad_row,
    }


def show_earlier_scores(request: Request) -> bool:
    """Show the scores that stand in the folders of this request: none is made twice of the same adapter and rows.

    False where one of the folders holds none, or those of something else.
    """
    wanted = inputs_of_request(request)
    found = {name: _scores_in(folder, wanted) for name, folder in request.folders.items()}
    scores = {name: each for name, each in found.items() if each is not None}
    if len(scores) < len(found):
        return False
    console = Console()
    show_scores(console, scores)
    for name, folder in request.folders.items():
        console.print(f"{name}: was written to {folder}", highlight=False, markup=False)
    return True


def _scores_in(folder: Path, wanted: Mapping[str, Any]) -> Scores | None:
    if read_status(folder).get("state") != "done":
        return None
    try:
        told = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        if told["inputs"] != wanted:
            return None
        values = {name: score["value"] for name, score in told["scores"].items()}
        signatures = {name: score["signature"] for name, score in told["scores"].items()}
        return Scores(values, signatures, per_sample=[{}] * told["samples"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, broken, or of an older version
        return None


@contextmanager
def told_in(folder: Path) -> Iterator[None]:
    """status.json says how it stands: `running` within, then `done`, `failed` or, after a signal, `stopped`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output_dir: no results can be written to {folder} ({error.strerror}): give another folder"
        ) from None

    def tell(state: str, message: str = "") -> None:
        write_json(folder / "status.json", {"state": state, "message": message})

    tell("running")
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        tell("stopped", str(stop) or "interrupted")
        raise
    except BaseException as error:
        first = error.problems[0] if isinstance(error, ChatLoraError) else f"{type(error).__name__}: {error}"
        tell("failed", first)
        raise
    tell("done")
