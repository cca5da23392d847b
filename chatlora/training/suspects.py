"""`RUN/suspects.jsonl`: a finished run's training rows, the most suspicious ones first, each with its worst tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from chatlora.config import Config
from chatlora.config_files import config_from_file
from chatlora.data.dataset import Say
from chatlora.disk import write_text
from chatlora.distributed.memory import not_loaded, out_of_memory_told
from chatlora.distributed.runtime import Runtime
from chatlora.errors import ConfigError, LaunchError
from chatlora.inspection.prepare import Inspected, inspected
from chatlora.inspection.suspects import most_suspicious, suspicion
from chatlora.inspection.tokens import token_texts
from chatlora.model.folder import find_adapter
from chatlora.model.loading import load_adapter, load_base_model
from chatlora.rendering.examples import IGNORE_INDEX
from chatlora.run_lock import INPUTS
from chatlora.training.row_losses import Measure, row_losses, rows_trained_on
from chatlora.training.setup import does_not_fit, is_padded

SUSPECTS = "suspects.jsonl"
WORST_TOKENS = 5


def config_of_run(run: Path) -> Config:
    """Raises ConfigError where there is no run, ModelError where it has no adapter yet."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run directory: there is no config.yaml in it")
    find_adapter(run)
    return config_from_file(run / "config.yaml")


def find_suspects(run: Path, config: Config, runtime: Runtime, top: int, say: Say) -> list[dict[str, Any]]:
    """The `top` rows, written to the run's directory too. Raises ConfigError where its rows are not what they were."""
    if runtime.num_processes > 1:
        raise LaunchError(f"suspects are found in one process, but there are {runtime.num_processes}")
    found = inspected(config, say)
    refuse_other_rows(run, found)
    examples, row_of = rows_trained_on(found)
    numbers, rows = np.unique(row_of, return_inverse=True)
    source = found.data.train.store.sources[found.rows.first[numbers]]
    with out_of_memory_told(not_loaded(config.model.name_or_path, runtime)):
        base = runtime.move_to_device(load_base_model(config.model, dtype=runtime.dtype))
        padded = is_padded(base, runtime, say)
        measure = Measure(load_adapter(base, find_adapter(run)), config, runtime, examples, padded)
    with out_of_memory_told(does_not_fit(config, measure.loader)):
        losses = row_losses(measure, rows, source)
        ranked = suspicion(losses)
        records = [
            {
                "place": found.rows.place(numbers[row]),
                "suspicion": round(float(ranked.score[row]), 3),
                "loss": round(float(losses.loss[row]), 4),
                "usual_loss": round(float(ranked.usual[row]), 4),
                "loss_behind_other_prompts": round(float(losses.swapped[row] / losses.count[row]), 4),
                **under_base_and_worst(measure, np.flatnonzero(rows == row), found.tokenizer),
            }
            for row in most_suspicious(ranked, top)
        ]
    write_text(run / SUSPECTS, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return records


def refuse_other_rows(run: Path, found: Inspected) -> None:
    """The adapter knows the rows that it was trained on: others would all look suspicious."""
    before = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    now = {"data": found.data.fingerprint, "rendering": found.renderer.fingerprint}
    changed = [INPUTS[name] for name, value in now.items() if before.get(name) != value]
    if changed:
        raise ConfigError(
            *(f"{what} changed since {run} was trained" for what in changed), "put back what it was trained on"
        )


def under_base_and_worst(measure: Measure, positions: np.ndarray, tokenizer: Any) -> dict[str, Any]:
    """Of a row's examples: the base's loss, the number of targets, and those that the adapter expects least."""
    tokens: list[tuple[float, float, str]] = []
    for example in measure.loader.examples.fetch(positions):
        (adapter,), (base,) = measure.of([example]), measure.under_base([example])
        texts = token_texts(tokenizer, example.input_ids)
        targets = [index for index, label in enumerate(example.labels) if index and label != IGNORE_INDEX]
        tokens += zip(adapter, base, [texts[index] for index in targets], strict=True)
    worst = sorted(tokens, reverse=True)[:WORST_TOKENS]
    return {
        "base_loss": round(sum(base for _, base, _ in tokens) / len(tokens), 4),
        "targets": len(tokens),
        "worst_tokens": [
            {"token": text, "loss": round(loss, 2), "base_loss": round(base, 2)} for loss, base, text in worst
        ],
    }
