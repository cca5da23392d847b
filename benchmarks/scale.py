"""What large runs cost beside the training itself, on one core of this machine.

    python benchmarks/scale.py [--rows N] [--ranks N]

The batch of any step (first and late ones cost the same), the slowest rank beside the mean, and a log that is cut back
when a run goes on. The tests count calls, bytes and tokens instead, and hold whatever else the machine does.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chatlora.data.batches import GlobalBatches
from chatlora.run_log import cut_back

TOKENS = 65_536  # of a rank and step


def seconds_of(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def batches(rows: int, ranks: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, rows), 8, 8192).astype(np.int32)
    batch = ranks * TOKENS // int(lengths.mean())
    print(f"{rows:,} rows, {ranks:,} ranks, {batch:,} examples a step")
    for padded, budget in ((False, 65_536), (False, 16_384), (False, 8_192), (True, 16_384), (True, 8_192)):
        for step in (0, rows // batch // 2):
            dealt = GlobalBatches(lengths, lengths // 2, batch, budget, 3, ranks, padded)
            seconds = seconds_of(lambda dealt=dealt, step=step: dealt[step])  # type: ignore[misc]
            loads = [sum(_cost(lengths[each], padded) for each in rank) for rank in dealt[step].micro_batches]
            slowest = max(loads) / np.mean(loads) - 1
            layout = "padded" if padded else "packed"
            print(f"  {layout}, budget {budget:>6,}, step {step:>4}: {seconds:.2f} s, slowest rank +{slowest:.2%}")


def _cost(lengths: np.ndarray, padded: bool) -> int:
    return int(lengths.max(initial=0) * len(lengths) if padded else lengths.sum())


def logs() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for steps in (1_000, 100_000, 1_000_000):
            path = Path(folder) / f"{steps}.jsonl"
            path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, steps + 1)))
            seconds = seconds_of(lambda path=path, steps=steps: cut_back(path, steps - 50))  # type: ignore[misc]
            print(f"  50 of {steps:,} lines cut from a log: {1000 * seconds:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=1024)
    given = parser.parse_args()
    batches(given.rows, given.ranks)
    logs()


if __name__ == "__main__":
    main()
