"""The loss of every training row under a run's adapter and under its base model: batched as a validation is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from peft import PeftModel

from chatlora.config import Config
from chatlora.data.dataset import ExampleSet
from chatlora.data.loader import Loader
from chatlora.distributed.runtime import Runtime
from chatlora.inspection.prepare import Inspected
from chatlora.inspection.suspects import RowLosses
from chatlora.model.loss import TargetLoss
from chatlora.model.target_losses import target_losses
from chatlora.progress import Progress
from chatlora.training.setup import token_budget


@dataclass(frozen=True)
class TokenLosses:
    """Of one row's targets, in order."""

    adapter: list[float]
    base: list[float]


class Measure:
    """A model with a run's adapter, and how rows are handed to it."""

    def __init__(self, model: PeftModel, config: Config, runtime: Runtime, examples: ExampleSet, padded: bool) -> None:
        self.model = model.eval()
        self.loss = TargetLoss(model, packed=not padded, autocast_dtype=runtime.autocast_dtype)
        self.loader = Loader(examples, 0, 1, token_budget(config, runtime.device), padded, runtime.device)

    def of(self, positions: Sequence[int] | np.ndarray) -> list[TokenLosses]:
        """Of the examples there, together in one micro-batch."""
        batch = self.loader.collated(self.loader.examples.fetch(positions))
        adapter = target_losses(self.loss, batch)
        with self.model.disable_adapter():
            base = target_losses(self.loss, batch)
        ends = np.cumsum(self.loader.examples.num_targets[list(positions)])
        starts = [0, *ends[:-1]]
        return [TokenLosses(adapter[a:b], base[a:b]) for a, b in zip(starts, ends, strict=True)]


def row_losses(measure: Measure, rows: np.ndarray, source: np.ndarray) -> RowLosses:
    """rows: of each example which row it belongs to, from 0; source: of each row."""
    sums = np.zeros((4, len(source)))
    examples = measure.loader.examples
    progress = Progress("losses", len(examples), unit="tokens", transient=True)
    try:
        for positions in [positions for lot in measure.loader.in_order() for positions in lot.indices]:
            for position, losses in zip(positions, measure.of(positions), strict=True):
                adapter = np.asarray(losses.adapter)
                sums[:, rows[position]] += len(adapter), adapter.sum(), sum(losses.base), (adapter**2).sum()
            progress.advance(len(positions), amount=int(examples.lengths[positions].sum()))
    finally:
        progress.close()
    return RowLosses(source, *sums)


def rows_trained_on(found: Inspected) -> tuple[ExampleSet, np.ndarray]:
    """The examples that were trained on, each once, and of each the number of its row in `found.rows`."""
    store, indices = found.data.train.store, np.unique(found.data.train.indices)
    return ExampleSet(store, indices), np.cumsum(store.turns > 0)[indices] - 1
