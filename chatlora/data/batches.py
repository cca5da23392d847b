"""Which examples make up step s, and who computes them.

A batch is a pure function of (lengths, target counts, settings, step): nothing is stored and nothing is asked of other
ranks. Which examples form a step does not depend on the number of processes.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Indices = np.ndarray  # int64 [n]: positions in the example set


@dataclass(frozen=True)
class Batch:
    """One optimizer step. `micro_batches[rank][i]` are the examples of that rank's i-th forward pass, maybe none.

    Every rank has the same number of micro-batches, so that every rank enters the same collectives.
    """

    epoch: float  # passes over the data when this step is done
    micro_batches: tuple[tuple[Indices, ...], ...]
    num_targets: int  # over all ranks: the one divisor of this step's summed loss
    num_tokens: int  # over all ranks, without padding

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])

    @property
    def indices(self) -> Indices:
        return np.concatenate([micro_batch for rank in self.micro_batches for micro_batch in rank])


@dataclass(frozen=True)
class GlobalBatches:
    """`GlobalBatches(...)[step]` is that step's Batch, found without walking there.

    lengths, num_targets: int [N], tokens and targets of each example. token_budget: tokens of one micro-batch on one
    process, counted as the model computes them: without padding if packed, as a rectangle if padded.
    """

    lengths: np.ndarray
    num_targets: np.ndarray
    global_batch_size: int
    token_budget: int
    seed: int
    num_processes: int
    padded: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left, with its own divisor."""
        return math.ceil(len(self.lengths) / self.global_batch_size)

    def examples_before(self, step: int) -> int:
        """How many examples the steps before `step` took, over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * len(self.lengths) + step_in_epoch * self.global_batch_size

    def epochs_before(self, step: int) -> float:
        return self.examples_before(step) / len(self.lengths)

    def __getitem__(self, step: int) -> Batch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_size
        chosen = self._order(epoch)[start : start + self.global_batch_size]
        return Batch(
            epoch=epoch + min(start + self.global_batch_size, len(self.lengths)) / len(self.lengths),
            micro_batches=deal(chosen, self.lengths[chosen], self.token_budget, self.num_processes, self.padded),
            num_targets=int(self.num_targets[chosen].sum()),
            num_tokens=int(self.lengths[chosen].sum()),
        )

    def _order(self, epoch: int) -> Indices:
        """The permutation of an epoch; the last one is kept, since steps mostly follow one another."""
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, Indices]:
        return {}


def in_order(
    lengths: np.ndarray, token_budget: int, num_processes: int, padded: bool
) -> Iterator[tuple[tuple[Indices, ...], ...]]:
    """All examples once, 1,024 at a time, each lot dealt to ranks and micro-batches: a validation pass."""
    for start in range(0, len(lengths), 1024):
        chosen = np.arange(start, min(start + 1024, len(lengths)))
        yield deal(chosen, lengths[chosen], token_budget, num_processes, padded)


def deal(
    indices: Indices, lengths: np.ndarray, token_budget: int, num_processes: int, padded: bool
) -> tuple[tuple[Indices, ...], ...]:
    """Deal examples into [rank][micro-batch] bins that fit the budget and cost about the same. Bins may be empty."""
    assert int(lengths.max()) <= token_budget, "the budget holds the longest example: config.py sees to that"
    longest_first = np.argsort(-lengths, kind="stable")
    split = _rectangles if padded else _even_bins
    bins = split(longest_first, lengths, token_budget, num_processes)
    per_rank = len(bins) // num_processes
    # Costly bins first, back and forth over the ranks, so that the ranks' sums come out even.
    costs = [_cost(lengths[members], padded) for members in bins]
    ranks: list[list[Indices]] = [[] for _ in range(num_processes)]
    for position, bin_index in enumerate(sorted(range(len(bins)), key=lambda i: (-costs[i], i))):
        turn, place = divmod(position, num_processes)
        ranks[place if turn % 2 == 0 else num_processes - 1 - place].append(indices[bins[bin_index]])
    assert all(len(rank) == per_rank for rank in ranks)
    return tuple(tuple(rank) for rank in ranks)


def _cost(lengths: np.ndarray, padded: bool) -> int:
    """Tokens that the model computes."""
    if not len(lengths):
        return 0
    return int(lengths.max()) * len(lengths) if padded else int(lengths.sum())


def _even_bins(longest_first: Indices, lengths: np.ndarray, budget: int, num_processes: int) -> list[Indices]:
    """The fewest equally many bins a rank into which the longest-first greedy rule fits everything.

    Graham, "Bounds on multiprocessing timing anomalies", 1969: each example goes to the bin with the least in it.
    """
    per_rank = max(1, math.ceil(int(lengths.sum()) / (budget * num_processes)))
    while True:
        bins = _greedy(longest_first, lengths, per_rank * num_processes)
        if max(int(lengths[members].sum()) for members in bins) <= budget:
            return bins
        per_rank += 1


def _greedy(longest_first: Indices, lengths: np.ndarray, num_bins: int) -> list[Indices]:
    members: list[list[int]] = [[] for _ in range(num_bins)]
    takers = least_loaded(lengths[longest_first].tolist(), num_bins)
    for example, taker in zip(longest_first.tolist(), takers, strict=True):
        members[taker].append(example)
    return [np.array(sorted(each), dtype=np.int64) for each in members]


def least_loaded(costs: Iterable[int], num_takers: int) -> list[int]:
    """Who takes each: whoever has the least so far, the first of equals."""
    loads = [(0, taker) for taker in range(num_takers)]
    takers = []
    for cost in costs:
        load, taker = loads[0]
        takers.append(taker)
        heapq.heapreplace(loads, (load + cost, taker))
    return takers


def _rectangles(longest_first: Indices, lengths: np.ndarray, budget: int, num_processes: int) -> list[Indices]:
    """Runs of similar lengths whose padded rectangle fits the budget, equally many a rank.

    The budget is lowered as far as it takes no more runs: they come out alike, and few stay empty.
    """
    in_order = lengths[longest_first].tolist()
    wanted = -(-len(_runs(in_order, budget)) // num_processes) * num_processes
    low, high = in_order[0], budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(in_order, middle)) <= wanted else (middle + 1, high)
    bins = [longest_first[start:stop] for start, stop in _runs(in_order, high)]
    return bins + [np.empty(0, dtype=np.int64)] * (wanted - len(bins))


def _runs(longest_first: list[int], budget: int) -> list[tuple[int, int]]:
    """Where runs of lengths begin and end, each as long as the budget allows."""
    runs = []
    start = 0
    while start < len(longest_first):
        stop = start + budget // longest_first[start]
        runs.append((start, stop))
        start = stop
    return runs
