"""Scores that an earlier evaluation of the same adapter on the same rows has left, so that none is made twice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from chatlora.disk import sha256_of
from chatlora.evaluation.command_line import Request
from chatlora.evaluation.console import show_scores
from chatlora.evaluation.metrics import Scores
from chatlora.reading.scan import inputs_of
from chatlora.run_directory import read_status


def inputs_of_request(request: Request) -> dict[str, Any]:
    """All that scores of a run depend on, files by the sha256 of what stands in them. For scores.json."""
    data, evaluation = request.config.data, request.config.evaluation
    return {
        "adapter_sha256": None if request.adapter is None else sha256_of(request.adapter / "adapter_model.safetensors"),
        "data_sha256": [each.sha256 for each in inputs_of(request.sources, "test")],
        "max_new_tokens": evaluation.max_new_tokens,
        "max_prompt_length": evaluation.max_prompt_length or data.max_length,
        "style": evaluation.style,
        "on_bad_row": data.on_bad_row,
    }


def show_earlier_scores(request: Request) -> bool:
    """Show what stands in the folders of this request; False where one of them holds nothing, or something else."""
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
