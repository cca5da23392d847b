"""Examples -> one process's micro-batches, collated and on its device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatlora.data.batches import GlobalBatches, Indices, in_order
from chatlora.data.collate import pack, pad_right
from chatlora.data.dataset import ExampleSet
from chatlora.rendering.examples import Example

MicroBatch = Mapping[str, Any]


@dataclass(frozen=True)
class Loader:
    """How a process of several gets its part of a set of examples.

    token_budget: tokens of one micro-batch on one process. padded: conversations lie one below the other, filled up on
    the right, where the model cannot be packed.
    """

    examples: ExampleSet
    rank: int
    num_processes: int
    token_budget: int
    padded: bool
    device: torch.device

    def batches(self, global_batch_size: int, seed: int) -> GlobalBatches:
        """Who computes what in which step."""
        return GlobalBatches(
            self.examples.lengths,
            self.examples.num_targets,
            global_batch_size,
            self.token_budget,
            seed,
            self.num_processes,
            self.padded,
        )

    def fetch(self, micro_batches: Sequence[Sequence[Indices]]) -> "MicroBatches":
        """This process's micro-batches of [rank][micro-batch]."""
        return MicroBatches(self, micro_batches[self.rank])

    def in_order(self) -> "list[MicroBatches]":
        """All examples once, a lot at a time, as validation takes them: equally many lots on every process."""
        lots = in_order(self.examples.lengths, self.token_budget, self.num_processes, self.padded)
        return [self.fetch(lot) for lot in lots]

    def filler(self) -> MicroBatch:
        """A micro-batch without a target."""
        return self.collated([])

    def collated(self, examples: Sequence[Example]) -> MicroBatch:
        return to_device((pad_right if self.padded else pack)(examples), self.device)


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of one process, each made when its turn comes."""

    loader: Loader
    indices: Sequence[Indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[MicroBatch]:
        for indices in self.indices:
            yield self.loader.collated(self.loader.examples.fetch(indices))


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
