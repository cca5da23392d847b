"""Which training rows a share holds out: decided by what a row asks, so that rows which are added move no others.

Rows with equal prompts, and those of one group (`group_by`), go the same way.
"""

from collections.abc import Callable, Mapping

import numpy as np

from chatlora.data.likenesses import Likenesses

FEW, MUCH = 10, 2  # rows, and times a share's rows: where one prompt has more, that is told
MIN_ROWS_TO_SPLIT = 50  # below, no share of the rows is held out


def drawn_rows(
    rows: Likenesses, shares: Mapping[str, float], seed: int, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Split -> bool [N]: the rows that are held out for it.

    Each prompt has a place between 0 and 1, and each split a piece as long as its share; one prompt at least is in each
    piece, and one is left to train on. The first split's rows are the same whatever the others' shares are.
    """
    prompts, which = np.unique(_hashed(_sides(rows), seed), return_inverse=True)  # in the order of their places
    sizes = np.bincount(which).tolist()
    held: dict[str, np.ndarray] = {}
    begin, share_before = 0, 0.0
    for position, (split, share) in enumerate(shares.items()):
        others = len(shares) - position
        share_before += share
        end = begin
        if len(rows) < MIN_ROWS_TO_SPLIT:
            say(f"data.{split}: no rows are held out, there are only {len(rows)} (fewer than {MIN_ROWS_TO_SPLIT})")
        elif len(prompts) <= len(shares):
            say(f"data.{split}: no rows are held out, since the {len(rows):,} rows have only {len(prompts)} prompts")
        else:
            reached = int(np.searchsorted(prompts, np.uint64(share_before * 2**64)))
            end = min(max(begin + 1, reached), len(prompts) - others)
        held[split] = (begin <= which) & (which < end)
        most = max(sizes[begin:end], default=0)
        if most > max(FEW, MUCH * share * len(rows)):
            say(
                f"WARNING: data.{split}: {held[split].sum():,} of {len(rows):,} rows are held out, since {most:,} of "
                "them have one prompt or group and go the same way; another run.seed draws others"
            )
        begin = end
    return held


def _sides(rows: Likenesses) -> np.ndarray:
    """uint64 [N], equal for rows that must go the same way: the first prompt, or what stands for all groups that equal
    prompts connect with the row's own."""
    if not rows.group.any():
        return np.asarray(rows.first_prompt)
    none = np.iinfo(np.uint64).max
    side: np.ndarray = np.where(rows.group == 0, none, rows.group)
    of_prompt = np.unique(rows.first_prompt, return_inverse=True)[1]
    of_group = np.unique(rows.group, return_inverse=True)[1]
    before = np.zeros_like(side)
    while (side != before).any():
        before = side
        side = _least(side, of_prompt)
        side = np.where(rows.group == 0, side, _least(side, of_group))
    return np.asarray(np.where(side == none, rows.first_prompt, side))


def _least(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Of each value the least of those that have the same `which`."""
    least = np.full(which.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, which, values)
    return np.asarray(least[which])


def _hashed(keys: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of the keys, after that of the seed."""
    return _mixed(keys ^ _mixed(np.array([seed], np.uint64)))


def _mixed(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
