"""Rows of `data.train` that a run held out, kept by place in its directory and read again for their scores."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chatlora.config import Source
from chatlora.errors import ConfigError, DataError
from chatlora.reading.conversation import Conversation
from chatlora.reading.noted import Noted, Unread
from chatlora.reading.scan import Input
from chatlora.reading.sources import fingerprint, read_conversations, with_split

HELD_OUT = "held_out.json"
OTHER_ROWS = "give rows with --data FILE"


class HeldOutRows(Source):
    """Some rows of a source, by place, for as long as its contents have this sha256."""

    sha256: str
    places: tuple[str, ...]

    def among(self, conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        """The rows held out, of all those of the source. Raises DataError where some are not there."""
        wanted = set(self.places)
        for conversation in conversations:
            if conversation.place in wanted:
                wanted.discard(conversation.place)
                yield conversation
        if wanted:
            raise DataError(f"{self.path}: {len(wanted)} of the rows that were held out are not in it ({min(wanted)})")


def held_out_rows(source: Input, places: Sequence[str]) -> HeldOutRows:
    """These rows of a source, as they are kept: with the split that they were read from, where it has several."""
    values = with_split(source.source, source.split).model_dump()
    return HeldOutRows(**values, sha256=source.sha256, places=tuple(places))


def read_held_out(run: Path, split: str) -> tuple[HeldOutRows, ...]:
    """The rows that a run held out for `split`. Raises DataError, by name, where their source is not what it was."""
    told = kept_by(run, split)
    try:
        rows = None if told is None else tuple(HeldOutRows.model_validate(each) for each in told)
    except ValidationError:
        rows = None
    if rows is None:
        raise ConfigError(f"{run / HELD_OUT} does not say which rows are held out: put it back, or {OTHER_ROWS}")
    if not rows:
        raise ConfigError(f"{run}: data.{split} held out no rows, since there were too few: {OTHER_ROWS}")
    problems: list[str] = []
    for each in rows:
        try:
            if fingerprint(each) != each.sha256:
                problems.append(f"{each.path}: its contents changed since {run} held out rows of it")
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems, f"put back what the rows of data.{split} were held out of, or {OTHER_ROWS}")
    return rows


def kept_by(run: Path, split: str) -> list[Any] | None:
    """What a run keeps of the rows held out for `split`, a source each; None where it does not say."""
    try:
        kept = json.loads((run / HELD_OUT).read_text(encoding="utf-8"))[split]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if isinstance(kept, list) else None


def conversations_to_evaluate(
    source: Source, split: str, system: str | None, set_aside: list[Unread] | None, noted: Noted
) -> Iterator[Conversation]:
    """`read_conversations` of a split's rows, or of those that a run held out: one that gives none is none of these."""
    if not isinstance(source, HeldOutRows):
        return read_conversations(source, system=system, split=split, set_aside=set_aside, noted=noted)
    unread: list[Unread] | None = None if set_aside is None else []
    return source.among(read_conversations(source, system=system, set_aside=unread))
