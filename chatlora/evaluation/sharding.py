"""Several processes, one evaluation: who generates what, and how the parts come together. No torch.

Each process appends to a file of its own, so none waits for another while it generates, however long that takes.
Process 0 writes predictions.jsonl itself; process r writes predictions-rank<r>.jsonl.partial and takes the ending
off when its share is done; then process 0 merges them. One process alone is the same without others.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from chatlora.data.batches import least_loaded
from chatlora.disk import PARTIAL
from chatlora.errors import LaunchError, PredictionsError
from chatlora.evaluation.predictions import Prediction, read_written_so_far

Batch = TypeVar("Batch")
SECONDS_BETWEEN_LOOKS = 0.2


def shard_batches(batches: Sequence[Batch], cost: Callable[[Batch], int], rank: int, num_processes: int) -> list[Batch]:
    """The batches of one process: each goes to the process with the least to do so far, alike on every process."""
    takers = least_loaded(map(cost, batches), num_processes)
    return [batch for batch, taker in zip(batches, takers, strict=True) if taker == rank]


def open_parts(
    folders: Mapping[str, Path], rank: int, num_processes: int, wait_for_everyone: Callable[[], None]
) -> dict[str, Path]:
    """The empty files that this process appends to, one a folder. Waits for all processes, once.

    Raises LaunchError where this process does not see a folder that process 0 made (machines without a shared disk).
    """
    if rank == 0:
        for folder in folders.values():
            for left_over in folder.glob("predictions-rank*.jsonl*"):
                left_over.unlink()
            _part(folder, 0).write_bytes(b"")
    wait_for_everyone()
    unseen = [folder for folder in folders.values() if not _part(folder, 0).is_file()]
    if unseen:
        raise LaunchError(
            f"process {rank} of {num_processes} does not see {unseen[0]} as process 0 made it: with --output_dir, "
            "give a folder on a disk that all machines share"
        )
    parts = {name: _part(folder, rank) for name, folder in folders.items()}
    for part in parts.values():
        part.touch()
    return parts


def mark_complete(part: Path) -> None:
    """Say that this process has generated its whole share."""
    if part.suffix == PARTIAL:
        part.rename(part.with_suffix(""))


def collect(folder: Path, num_processes: int, wanted: Sequence[tuple[str | int, int]]) -> list[Prediction]:
    """Wait for all processes' parts and merge them. For process 0: where another one dies, the launcher ends it too."""
    parts = [_part(folder, 0), *(_part(folder, rank).with_suffix("") for rank in range(1, num_processes))]
    while not all(part.is_file() for part in parts):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return merge(parts, wanted)


def remove_parts(folder: Path) -> None:
    """The parts of the other processes, once predictions.jsonl holds everything."""
    for part in folder.glob("predictions-rank*.jsonl"):
        part.unlink()


def _part(folder: Path, rank: int) -> Path:
    return folder / ("predictions.jsonl" if rank == 0 else f"predictions-rank{rank}.jsonl{PARTIAL}")


def merge(parts: Sequence[Path], wanted: Sequence[tuple[str | int, int]]) -> list[Prediction]:
    """The predictions of all processes in the order of `wanted`, the (id, turn) of every sample: each exactly once.

    Raises PredictionsError where samples are missing, foreign or twice there: a score over them would be a lie.
    """
    found: dict[tuple[str | int, int | None], Prediction] = {}
    problems = []
    for part in parts:
        for prediction in read_written_so_far(part):
            key = (prediction.id, prediction.turn)
            if key in found:
                problems.append(f"{part}: sample {key[0]}, turn {key[1]}, was predicted twice.")
            found[key] = prediction
    missing = [key for key in wanted if key not in found]
    foreign = found.keys() - set(wanted)
    if missing:
        problems.append(
            f"{len(missing)} of {len(wanted)} samples have no prediction, the first of them {missing[0]}; all "
            "processes must write to one shared folder."
        )
    if foreign:
        problems.append(
            f"{len(foreign)} predictions belong to no sample of this evaluation, one of them {min(foreign, key=str)}."
        )
    if problems:
        raise PredictionsError(*problems)
    return [found[key] for key in wanted]
