"""Files, folders, globs, the package's own data and hub data sets -> rows and conversations, each with its place.

Rows are read one at a time, whatever the size of a source. A path that exists, or looks like a file, never touches
the network.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlora.config import Source
from chatlora.disk import sha256_of
from chatlora.embedded_model import EMBEDDED
from chatlora.errors import DataError, did_you_mean, similar_beside
from chatlora.hub import why_unreachable
from chatlora.reading.arrow import cleaner_of
from chatlora.reading.conversation import Conversation, Message
from chatlora.reading.files import ENDINGS, READERS, cleaned_row, reader_of
from chatlora.reading.formats import read_row
from chatlora.reading.noted import Noted, Unread, reason_of
from chatlora.reading.own_reader import LEFT_OUT, OwnReader, own_reader, sha256_of_reader
from chatlora.reading.parts import Chosen, choose, files_in, part_of
from chatlora.reading.streams import NOT_READ, PACKED, BadRow, Rows, unreadable

if TYPE_CHECKING:
    from datasets import Dataset

LEAVE_OUT = "To train without such rows: --data.on_bad_row set_aside, which names each of them in the ledger."
MOST_PROBLEMS = 10_000  # reading stops after so many mistakes
OTHER_ENDINGS = (".txt", ".zip", ".tar", ".xlsx", ".yaml", ".yml", ".md", ".py")
WILDCARDS = "*?["
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(:[\w.-]+)?")


def read_rows(source: Source, *, split: str = "train") -> Iterator[tuple[Mapping[str, Any], str]]:
    """`(row, place)` of every row, in order. `split` is that of a hub data set whose source names none.

    After the first row that cannot be read it yields nothing more, looks for further ones, and raises DataError.
    """
    problems: list[str] = []
    for row, place in _rows(source, split):
        if isinstance(row, BadRow):
            problems.append(f"{place}: {row.problem}")
            _stop_at_too_many(problems)
        elif not problems:
            yield row, place
    if problems:
        raise DataError(*problems)


def read_conversations(
    source: Source,
    *,
    system: str | None = None,
    split: str = "train",
    set_aside: list[Unread] | None = None,
    noted: Noted | None = None,
) -> Iterator[Conversation]:
    """The conversations of a source, in order; `system` is put before those that have no system message.

    `set_aside` takes the rows that cannot be read. Where there is none, or where nothing behind such a row can be read
    either, it is a mistake: after the first one nothing more is yielded, further ones are looked for, and one DataError
    is raised with all. `noted` takes what else there is to tell of the rows.
    """
    reader, noted = own_reader(source.reader), noted or Noted()
    problems: list[str] = []
    any_good = any_to_leave_out = False
    for row, place in _rows(source, split):
        conversation, found, ends = None, [], False
        if isinstance(row, BadRow):
            found, ends = [f"{place}: {row.problem}"], row.ends
        else:
            try:
                conversation = _read(row, place, source, reader, noted)
            except DataError as error:
                found = list(error.problems)
        if found and set_aside is not None and not ends:
            problem = "; ".join(each.removeprefix(f"{place}: ") for each in found)
            set_aside.append(Unread(place, problem, reason_of(problem)))
        else:
            problems += found
            any_to_leave_out |= bool(found) and not ends
        any_good |= conversation is not None
        if problems:
            _stop_at_too_many(problems)
        elif conversation is not None:
            yield _with_system(conversation, system)
    if problems:
        raise DataError(*problems, way_on=LEAVE_OUT if any_good and any_to_leave_out else "")


def _read(
    row: Mapping[str, Any], place: str, source: Source, reader: OwnReader | None, noted: Noted
) -> Conversation | None:
    """None where the source's own reader leaves the row out. Raises DataError with all that is wrong with it."""
    ours = row if reader is None else reader.read(row, place)
    if ours is None:
        noted.left_out.append(Unread(place, "", LEFT_OUT))
        return None
    read = read_row(ours, format=source.format, columns=source.columns, ignore=source.ignore, place=place)
    noted.note_not_used(read.not_used - {source.group_by})
    return _grouped(read.conversation, row, source.group_by)


def look_at(source: Source, *, split: str = "train") -> tuple[str, Chosen]:
    """sha256 over the contents of a source's files (of a hub data set: of those in the local cache), and which."""
    digest = hashlib.sha256()
    chosen = files_of(source, split)
    if chosen is None:
        chosen = _hub_chosen(source, split)
        digest.update((source.split or split).encode())
    for path, _ in chosen.files:
        digest.update(bytes.fromhex(sha256_of(path)))
    if source.reader is not None:
        digest.update(bytes.fromhex(sha256_of_reader(source.reader)))
    return digest.hexdigest(), chosen


def fingerprint(source: Source, *, split: str = "train") -> str:
    return look_at(source, split=split)[0]


def with_split(source: Source, split: str) -> Source:
    """The source as it is read for this use, whatever it is used for: its part named, where it has several."""
    chosen = files_of(source, split)
    part = source.split or split if chosen is None else chosen.part
    return source.model_copy(update={"split": part})


def _stop_at_too_many(problems: list[str]) -> None:
    if len(problems) >= MOST_PROBLEMS:
        raise DataError(*problems, "reading stopped here: too many mistakes")


def _grouped(conversation: Conversation, row: Mapping[str, Any], column: str | None) -> Conversation:
    if column is None:
        return conversation
    if row.get(column) is None:
        hint = did_you_mean(column, row.keys() - {column}) or f"; the row has {', '.join(row)}"
        raise DataError(f"{conversation.place}: {column}, which group_by names, is missing or null{hint}")
    return replace(conversation, group=json.dumps(row[column], sort_keys=True))


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    if system is None or any(message.role == "system" for message in conversation.messages):
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def _rows(source: Source, split: str) -> Rows:
    empty = True
    chosen = files_of(source, split)
    for row, place in _hub_rows(source, split) if chosen is None else _file_rows(chosen.files):
        empty = False
        yield row, place
    if empty:
        yield BadRow("holds no rows; was it written to the end, and is it the right file?", ends=True), source.path


def _file_rows(files: list[tuple[Path, str]]) -> Rows:
    for path, name in files:
        reader = reader_of(path)
        assert reader is not None  # files_of gives out no others
        try:
            yield from reader(path, name)
        except NOT_READ as error:
            yield unreadable(path, error), name


def files_of(source: Source, use: str = "train") -> Chosen | None:
    """The files of a source, sorted: of several parts the one that its `split` or else its use names.

    None for a data set of the hub.
    """
    named = source.path
    if named.startswith(EMBEDDED):
        return Chosen([(_embedded_file(named), named)])
    path = Path(named).expanduser()
    if path.is_dir():
        found = files_in(path)
    elif path.exists():
        found = [(path, None)]
    elif any(mark in named for mark in WILDCARDS):
        fixed = _fixed_part(path)
        found = [(file, part_of(file.relative_to(fixed))) for file in sorted(_matching(path)) if file.is_file()]
    elif _looks_like_file(named, path):
        hint = similar_beside(path) if path.parent.is_dir() else "; that folder does not exist either"
        raise DataError(f"{named}: no such file or folder under {path.absolute().parent}{hint}")
    else:
        return None
    if not found:
        raise DataError(f"{named}: no data file is there; files are known by their endings: {ENDINGS}")
    nameless = [str(file) for file, _ in found if str(file).encode(errors="replace") != os.fsencode(file)]
    if nameless:
        raise DataError(
            *(f"{name!r}: a name that is not UTF-8, and rows are told by it; rename it" for name in nameless)
        )
    unknown = [file for file, _ in found if reader_of(file) is None]
    if unknown:
        raise DataError(
            *(f"{file}: not a data file that chatlora reads; the endings are {ENDINGS}" for file in unknown)
        )
    return choose(named, found, source.split, use)


def _embedded_file(named: str) -> Path:
    presets = Path(__file__).parents[1] / "presets"
    path = presets / named.removeprefix(EMBEDDED)
    if not path.is_file() or not path.resolve().is_relative_to(presets.resolve()):
        known = sorted(f"{EMBEDDED}{file.relative_to(presets).as_posix()}" for file in presets.rglob("*.jsonl"))
        raise DataError(f"{named}: not in the package{did_you_mean(named, known) or ';'} it holds {', '.join(known)}")
    return path


def _matching(pattern: Path) -> Iterator[Path]:
    return Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))


def _fixed_part(pattern: Path) -> Path:
    """The folder in front of the first wildcard: what is named behind it, the pattern leaves open."""
    return next(folder for folder in pattern.parents if not any(mark in str(folder) for mark in WILDCARDS))


def _looks_like_file(named: str, path: Path) -> bool:
    """Whether a path that does not exist was meant as one. A hub name is NAME, OWNER/NAME or OWNER/NAME:CONFIG."""
    if path.suffix.lower() in (*READERS, *PACKED, *OTHER_ENDINGS) or not _HUB_NAME.fullmatch(named):
        return True
    return "/" in named and path.parent.is_dir()


def _hub_rows(source: Source, split: str) -> Rows:
    name = f"{source.path}[{source.split or split}]"
    dataset = _hub_dataset(source, split)
    clean = cleaner_of(dataset.features.arrow_schema)
    for number, row in enumerate(dataset, start=1):
        yield cleaned_row(clean, row), f"{name}: row {number}"


def _hub_dataset(source: Source, split: str) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, subset = source.path.partition(":")
    unreachable = None if _is_cached(name) else why_unreachable()
    if unreachable:
        raise _not_given(source, f"no copy in the cache of data sets, and {unreachable}")
    try:
        return load_dataset(name, subset or None, split=source.split or split)
    except (OSError, ValueError, DatasetsError) as error:
        raise _not_given(source, f"the hub did not give such a data set ({_one_line(error)})") from error


def _not_given(source: Source, reason: str) -> DataError:
    return DataError(
        f"{source.path}: no such file here, and {reason}; where the hub cannot be reached, set HF_ENDPOINT to a "
        "mirror, give the path of a local file, or try the built-in demo: train.py without arguments"
    )


def _is_cached(name: str) -> bool:
    """Whether datasets has prepared this data set before: without the hub it then takes that."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    kept = {each.name.replace("_", "").lower() for each in folder.iterdir()} if folder.is_dir() else set()
    return name.replace("/", "").replace("_", "").lower() in kept


def _hub_chosen(source: Source, split: str) -> Chosen:
    """The files of a hub data set in the local cache, and the splits that are not read."""
    dataset, part = _hub_dataset(source, split), source.split or split
    others = sorted((name, 0) for name in dataset.info.splits or () if name != part.split("[")[0])
    return Chosen(
        [(Path(file["filename"]), "") for file in dataset.cache_files], part if others else None, tuple(others)
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
