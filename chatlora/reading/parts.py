"""A folder's data files, and the parts of a data set that their names say they are: train, validation, test.

The words are those that `datasets` goes by on the hub, so a snapshot is read as its data set is. A folder that
`save_to_disk` wrote says itself which files are its rows.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatlora.errors import DataError, did_you_mean
from chatlora.reading.files import reader_of
from chatlora.reading.streams import stem_of

PARTS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "dev", "val", "devset", "valset"),
    "test": ("test", "testing", "eval", "evaluation", "testset"),
}
NO_PART = "files that name no part"
_BY_WORD = {word: part for part, words in PARTS.items() for word in words}
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")
_SEPARATORS = re.compile(r"[-._ \d]+")
# What datasets writes beside the rows; `state.json` is one only where `dataset_info.json` stands beside it.
STATE, INFO, DICT, INFOS = "state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"

File = tuple[Path, str | None]  # with its part


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files of a source, each with the name that its places begin with. part: which of its parts they are, where it
    has several; left: the others, with how many files each has."""

    files: list[tuple[Path, str]]
    part: str | None = None
    left: tuple[tuple[str, int], ...] = ()


def files_in(folder: Path) -> list[File]:
    """The data files of a folder and of those in it, sorted; hidden ones are none. Raises DataError where one of them
    is a link to nothing."""
    inside = [path for path in sorted(_walked(folder)) if not _is_hidden(path.relative_to(folder))]
    dangling = [path for path in inside if _is_data(path) and not path.is_file()]
    if dangling:
        raise DataError(
            *(f"{path}: a link to {path.readlink()}, which is not there; copy it again" for path in dangling)
        )
    states = {path.parent: _told_by(path) for path in inside if path.name == STATE and path.with_name(INFO) in inside}
    kept = {saved: _rows_of(saved, told) for saved, told in states.items()}
    return [
        (path, part_of(path.relative_to(folder), is_saved=path.parent in kept))
        for path in inside
        if (path in kept[path.parent] if path.parent in kept else _is_data(path))
    ]


def part_of(path: Path, *, is_saved: bool = False) -> str | None:
    """The part that a file is, by a folder above it or by its own name, a word of which says so, the first or the last
    one before those between.

    A name with the number of a shard, or of a data set among several that were saved, is one of its own:
    `train_sft-00000-of-00003.parquet` is train_sft.
    """
    for number, name in enumerate(path.parts):
        is_file = number == len(path.parts) - 1
        stem = stem_of(path) if is_file else name
        plain = _SHARD.sub("", stem)
        words = [word for word in _SEPARATORS.split(plain.lower()) if word]
        found = next((_BY_WORD[word] for word in (words[:1] + words[::-1]) if word in _BY_WORD), None)
        if found is not None:
            is_own_name = plain != stem or (is_saved and not is_file)
            return plain if is_own_name and plain.lower() not in _BY_WORD else found
    return None


def choose(named: str, files: Sequence[File], split: str | None, use: str) -> Chosen:
    """The files of the part `split`, or of the one that the use names where there are several parts."""
    parts = Counter(part for _, part in files)
    told = Counter({part: number for part, number in parts.items() if part is not None})
    if split is None and len(told) < 2 and not (told and parts[None]):
        return Chosen(_as_named(files))
    wanted = use if split is None else _BY_WORD.get(split.lower(), split)
    if wanted not in told:
        raise DataError(_no_such_part(named, told, parts[None], split, wanted))
    left = {**told, **({NO_PART: parts[None]} if parts[None] else {})}
    del left[wanted]
    return Chosen(_as_named(file for file in files if file[1] == wanted), wanted, tuple(sorted(left.items())))


def _no_such_part(named: str, told: Counter[str], unnamed: int, split: str | None, wanted: str) -> str:
    if not told:
        return (
            f"{named}: `split` ({split}) is for folders and hub data sets whose files name parts; name the file itself"
        )
    parts = ", ".join(sorted(told)) + (f", and {NO_PART} ({unnamed:,})" if unnamed else "")
    hint = did_you_mean(wanted, told) if split is not None else ""
    return f"{named} has the parts {parts}, but no {wanted}{hint or ';'} say which with `split`, or name the files"


def _as_named(files: Iterable[File]) -> list[tuple[Path, str]]:
    return [(path, str(path)) for path, _ in files]


def _walked(folder: Path) -> Iterator[Path]:
    """All files, those behind links to folders too, each folder once."""
    seen: set[Path] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        seen.add(Path(here).resolve())
        folders[:] = [name for name in folders if Path(here, name).resolve() not in seen]
        yield from (Path(here, name) for name in files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_data(path: Path) -> bool:
    return reader_of(path) is not None and path.name not in (INFO, DICT, INFOS)


def _told_by(state: Path) -> dict[str, Any]:
    try:
        told = json.loads(state.read_text(encoding="utf-8"))
        return told if isinstance(told, dict) else {}
    except (OSError, ValueError):
        return {}


def _rows_of(folder: Path, state: dict[str, Any]) -> set[Path]:
    """The files of a data set that was saved, in its order; beside them stand what `map` and `filter` keep."""
    names = state.get("_data_files")
    if not isinstance(names, list) or not names or state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: {STATE} does not name the files of the rows; write the folder again with save_to_disk"
        )
    files = {folder / str(each.get("filename")) if isinstance(each, dict) else folder / "?" for each in names}
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise DataError(f"{folder}: {missing[0]} is missing, which {STATE} names; copy the folder again")
    return files
