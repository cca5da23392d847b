"""The first look: every row of every source parsed once, before anything is rendered.

It finds all mistakes of all sources, counts the rows, and sees whether any carries reasoning, which decides what the
chat template is told. What it found is kept in the cache, by the contents of the sources.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chatlora.cache import found_once
from chatlora.config import OnBadRow, Source
from chatlora.disk import sha256_of
from chatlora.errors import DataError
from chatlora.progress import track
from chatlora.reading.conversation import Conversation
from chatlora.reading.noted import Noted, Unread
from chatlora.reading.sources import look_at, read_conversations

MAKERS = ("reading", "rendering", "data")  # the folders whose code decides what an example is
SOURCES = (".py", ".jinja")


@dataclass(frozen=True, slots=True)
class Input:
    """A source with its use (its split, where it has several and names none), the sha256 of its contents, and which of
    its parts is read and which are left, with how many files each (0: of the hub)."""

    source: Source
    split: str
    sha256: str
    part: str | None = None
    left: tuple[tuple[str, int], ...] = ()

    @property
    def identity(self) -> list[Any]:
        """All that its conversations and their places depend on."""
        source = self.source
        columns = sorted(source.columns.items())
        read_as = [source.format, columns, sorted(source.ignore), source.reader]
        return [source.path, self.sha256, *read_as, source.split or self.split, source.group_by]

    def conversations(
        self, system: str | None = None, set_aside: list[Unread] | None = None, noted: Noted | None = None
    ) -> Iterator[Conversation]:
        return read_conversations(self.source, system=system, split=self.split, set_aside=set_aside, noted=noted)


@dataclass(frozen=True, slots=True)
class Scan:
    """rows: how many that can be read each input has."""

    any_reasoning: bool
    rows: list[int]


def inputs_of(sources: Sequence[Source], split: str) -> list[Input]:
    looks = [(source, *look_at(source, split=split)) for source in sources]
    return [Input(source, split, sha256, chosen.part, chosen.left) for source, sha256, chosen in looks]


def scan(inputs: Sequence[Input], cache_folder: Path, on_bad_row: OnBadRow = "error") -> Scan:
    """Parse every row, or recall what that found. Raises one DataError with all mistakes of all sources."""
    key = digest([code_digest(), on_bad_row, [each.identity for each in inputs]])
    return found_once(cache_folder / f"scan-{key}.json", Scan, lambda: _look(inputs, on_bad_row))


def _look(inputs: Sequence[Input], on_bad_row: OnBadRow) -> Scan:
    rows: list[int] = []
    problems: list[str] = []
    way_on = ""
    any_reasoning = False
    for each in inputs:
        rows.append(0)
        set_aside: list[Unread] | None = None if on_bad_row == "error" else []
        try:
            for conversation in track(each.conversations(set_aside=set_aside), f"reading {each.source.path}", None):
                rows[-1] += 1
                any_reasoning = any_reasoning or any(message.reasoning for message in conversation.messages)
        except DataError as error:
            problems += error.problems
            way_on = way_on or error.way_on
    if problems:
        raise DataError(*problems, way_on=way_on)
    return Scan(any_reasoning, rows)


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """sha256 of the code that makes examples and the versions it stands on: what other code made is not its own."""
    package = Path(__file__).parents[1]
    files = sorted(file for folder in MAKERS for file in (package / folder).rglob("*") if file.suffix in SOURCES)
    own = [[file.name, sha256_of(file)] for file in files]
    return digest([own, [[name, version(name)] for name in ("transformers", "tokenizers", "jinja2", "rensa")]])
