"""Predictions -> predictions.jsonl with each sample's scores, scores.json, status.json. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatlora.config import Style
from chatlora.disk import write_json
from chatlora.errors import ChatLoraError, Stopped
from chatlora.evaluation.metrics import Scores, score
from chatlora.evaluation.predictions import Prediction, write_predictions


def score_into(
    folder: Path, predictions: Sequence[Prediction], style: Style, facts: Mapping[str, Any]
) -> tuple[list[Prediction], Scores]:
    """Score, and write `folder`/predictions.jsonl and scores.json. facts: what else scores.json should say."""
    scores = score_predictions(predictions, style)
    scored = [
        replace(prediction, scores=sample) for prediction, sample in zip(predictions, scores.per_sample, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", scored)
    write_json(folder / "scores.json", summary(scored, scores, style, facts))
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
    predictions: Sequence[Prediction], scores: Scores, style: Style, facts: Mapping[str, Any]
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
        **facts,
    }


@contextmanager
def told_in(folder: Path) -> Iterator[None]:
    """status.json says how it stands: `running` within, then `done`, `failed` or, after a signal, `stopped`."""
    folder.mkdir(parents=True, exist_ok=True)

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
