"""The loss of every training row under a run's adapter, behind its own prompt and behind those of other rows."""

from collections.abc import Sequence

import numpy as np
from peft import PeftModel

from chatlora.config import Config
from chatlora.data.batches import in_order
from chatlora.data.dataset import ExampleSet
from chatlora.data.loader import Loader
from chatlora.data.store import count_targets
from chatlora.distributed.runtime import Runtime
from chatlora.inspection.prepare import Inspected
from chatlora.inspection.suspects import RowLosses
from chatlora.model.loss import TargetLoss
from chatlora.model.target_losses import target_losses
from chatlora.progress import Progress
from chatlora.rendering.examples import IGNORE_INDEX, Example
from chatlora.training.setup import token_budget

OTHERS = 2  # other rows whose prompts are tried: one alone may happen to ask for nearly the same


class Measure:
    """A model with a run's adapter, and how rows are handed to it: as many tokens at a time as a validation does."""

    def __init__(self, model: PeftModel, config: Config, runtime: Runtime, examples: ExampleSet, padded: bool) -> None:
        self.model = model.eval()
        self.loss = TargetLoss(model, packed=not padded, autocast_dtype=runtime.autocast_dtype)
        self.loader = Loader(examples, 0, 1, token_budget(config, runtime.device), padded, runtime.device)

    def of(self, examples: Sequence[Example]) -> list[list[float]]:
        """The losses of each one's targets, in order; all of them in one micro-batch."""
        losses = iter(target_losses(self.loss, self.loader.collated(examples)))
        return [[next(losses) for _ in range(count_targets(example.labels))] for example in examples]

    def under_base(self, examples: Sequence[Example]) -> list[list[float]]:
        with self.model.disable_adapter():
            return self.of(examples)


def row_losses(measure: Measure, rows: np.ndarray, source: np.ndarray) -> RowLosses:
    """rows: of each example which row it belongs to, from 0; source: of each row."""
    examples, budget = measure.loader.examples, measure.loader.token_budget
    count, adapter, squares, swapped = np.zeros((4, len(source)))
    others = others_of(source[rows])
    progress = Progress("losses", len(examples), unit="tokens", transient=True)
    try:
        for positions in _micro_batches(measure):
            own = examples.fetch(positions)
            for row, losses in zip(rows[positions], map(np.asarray, measure.of(own)), strict=True):
                count[row] += len(losses)
                adapter[row] += losses.sum()
                squares[row] += (losses**2).sum()
            for other in others[:, positions]:
                pairs = zip(own, examples.fetch(other), strict=True)
                exchanged = [with_prompt_of(theirs, example, budget) for example, theirs in pairs]
                np.add.at(swapped, rows[positions], [sum(losses) / OTHERS for losses in _in_lots(measure, exchanged)])
            progress.advance(len(positions), amount=int(examples.lengths[positions].sum()))
    finally:
        progress.close()
    return RowLosses(source, count, adapter, swapped, squares)


def with_prompt_of(other: Example, example: Example, most: int) -> Example:
    """The example from its first reply on, behind the other's prompt, of which the end is kept where it is too long."""
    first, end = _first_target(example), _first_target(other)
    room = most - (len(example.input_ids) - first)
    prompt = other.input_ids[max(0, end - room) : end]
    return Example(prompt + example.input_ids[first:], [IGNORE_INDEX] * len(prompt) + example.labels[first:])


def _first_target(example: Example) -> int:
    return next(index for index, label in enumerate(example.labels) if index and label != IGNORE_INDEX)


def others_of(source: np.ndarray) -> np.ndarray:
    """source: int [N], of each example -> int [OTHERS, N], far-off examples of the same source, where it has more."""
    others = np.empty((OTHERS, len(source)), np.int64)
    for kin in (np.flatnonzero(source == number) for number in np.unique(source)):
        for number in range(OTHERS):
            others[number, kin] = np.roll(kin, -max(1, len(kin) * (number + 1) // (OTHERS + 1)))
    return others


def _micro_batches(measure: Measure) -> list[np.ndarray]:
    return [positions for lot in measure.loader.in_order() for positions in lot.indices if len(positions)]


def _in_lots(measure: Measure, examples: Sequence[Example]) -> list[list[float]]:
    """Of examples that may be longer together than one micro-batch."""
    lengths = np.asarray([len(example.input_ids) for example in examples])
    losses: list[list[float]] = [[] for _ in examples]
    lots = in_order(lengths, measure.loader.token_budget, 1, measure.loader.padded)
    for positions in (positions for lot in lots for positions in lot[0] if len(positions)):
        for position, each in zip(positions, measure.of([examples[one] for one in positions]), strict=True):
            losses[position] = each
    return losses


def rows_trained_on(found: Inspected) -> tuple[ExampleSet, np.ndarray]:
    """The examples that were trained on, each once, and of each the number of its row in `found.rows`."""
    store, indices = found.data.train.store, np.unique(found.data.train.indices)
    return ExampleSet(store, indices), np.cumsum(store.turns > 0)[indices] - 1
