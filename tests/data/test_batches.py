"""Every example once an epoch, the same steps for any number of processes, even shares within the budget."""

import resource
from functools import partial

import numpy as np
import pytest

from chatlora.data.batches import GlobalBatches, in_order
from tests.costs import calls_of


def batches(
    lengths: np.ndarray, *, processes: int = 1, padded: bool = False, batch: int = 8, budget: int = 600
) -> GlobalBatches:
    targets = lengths // 2
    return GlobalBatches(lengths, targets, batch, budget, seed=3, num_processes=processes, padded=padded)


def draw(rows: int) -> np.ndarray:
    return np.clip(np.random.default_rng(rows).lognormal(4, 1, rows), 2, 500).astype(np.int32)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", range(1, 21))
def test_every_example_once_an_epoch_and_ranks_in_step(rows: int, processes: int, padded: bool) -> None:
    lengths = draw(rows)
    dealt = batches(lengths, processes=processes, padded=padded)
    for epoch in range(2):
        steps = [dealt[epoch * dealt.steps_per_epoch + step] for step in range(dealt.steps_per_epoch)]
        seen = np.concatenate([batch.indices for batch in steps])
        assert sorted(seen.tolist()) == list(range(rows))
        assert steps[-1].epoch == epoch + 1
        for batch in steps:
            assert {len(rank) for rank in batch.micro_batches} == {batch.num_micro_batches}
            assert batch.num_tokens == lengths[batch.indices].sum()
            assert batch.num_targets == (lengths[batch.indices] // 2).sum()


@pytest.mark.parametrize("padded", [False, True])
def test_steps_do_not_depend_on_the_number_of_processes_or_on_the_layout(padded: bool) -> None:
    lengths = draw(100)
    alone, many = batches(lengths), batches(lengths, processes=5, padded=padded)
    for step in (0, 7, 30):
        assert sorted(alone[step].indices.tolist()) == sorted(many[step].indices.tolist())


def test_a_step_is_found_without_walking_there() -> None:
    lengths = draw(100)
    walked = batches(lengths)
    for step in range(40):
        last = walked[step]
    assert batches(lengths)[39].indices.tolist() == last.indices.tolist()


def test_epochs_differ_in_order() -> None:
    dealt = batches(draw(64), batch=64)
    assert not np.array_equal(np.sort(dealt[0].indices[:8]), np.sort(dealt[1].indices[:8]))


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_fit_the_budget_as_the_model_computes_them(padded: bool) -> None:
    lengths = draw(300)
    for step in range(10):
        for rank in batches(lengths, processes=3, padded=padded, batch=30)[step].micro_batches:
            for members in rank:
                each = lengths[members]
                assert (each.max() * len(each) if padded and len(each) else each.sum()) <= 600


def test_the_slowest_rank_is_within_three_percent_of_the_mean() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000), 8, 8192).astype(np.int32)
    dealt = batches(lengths, processes=8, batch=8 * 65_536 // int(lengths.mean()), budget=16_384)
    for step in range(3):
        loads = [sum(int(lengths[members].sum()) for members in rank) for rank in dealt[step].micro_batches]
        assert max(loads) <= 1.03 * np.mean(loads)


@pytest.mark.parametrize("rows", [1, 2, 1500])
def test_validation_takes_every_example_once(rows: int) -> None:
    lengths = draw(rows)
    seen = [
        index
        for lot in in_order(lengths, 600, 2, False)
        for rank in lot
        for members in rank
        for index in members.tolist()
    ]
    assert sorted(seen) == list(range(rows))


# ---- at scale, simulated

RANKS, TOKENS = 1024, 65_536  # tokens of a rank and step


@pytest.fixture(scope="module")
def ten_million() -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(6, 1, 10_000_000), 8, 8192).astype(np.int32)


def cost(lengths: np.ndarray, members: np.ndarray, padded: bool) -> int:
    return int(lengths[members].max(initial=0) * len(members) if padded else lengths[members].sum())


@pytest.mark.parametrize(
    ("padded", "budget"), [(False, 65_536), (False, 16_384), (False, 8_192), (True, 16_384), (True, 8_192)]
)
def test_ten_million_rows_on_a_thousand_ranks(ten_million: np.ndarray, padded: bool, budget: int) -> None:
    """Any step in 2 GB, without walking there; the slowest rank near the mean. How long: benchmarks/scale.py."""
    batch = RANKS * TOKENS // int(ten_million.mean())
    before, calls = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for step in (0, 5_000):
        dealt = batches(ten_million, processes=RANKS, padded=padded, batch=batch, budget=budget)
        calls.append(calls_of(partial(dealt.__getitem__, step)))
        found = dealt[step]
        loads = [sum(cost(ten_million, members, padded) for members in rank) for rank in found.micro_batches]
        assert max(loads) / np.mean(loads) < 1.03
        assert len(np.unique(found.indices)) == len(found.indices) == batch
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown + 3 * ten_million.nbytes < 2e9  # lengths, targets and what their making took
    assert calls[1] < 10 * calls[0]


def test_every_row_once_an_epoch_on_a_thousand_ranks() -> None:
    for rows in (1, 20, 3_000):
        lengths = draw(rows)
        dealt = batches(lengths, processes=RANKS, batch=2_000)
        seen = np.concatenate([dealt[step].indices for step in range(dealt.steps_per_epoch)])
        assert sorted(seen.tolist()) == list(range(rows))
