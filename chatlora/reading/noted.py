"""What came of reading a source, beside its conversations: for the ledger."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

UNREAD = "the row cannot be read"
MOST_NAMES = 1_000  # that are counted of a source: keys of objects may be data


class Unread(NamedTuple):
    """A row that gives no conversation, and why; reason is the same words for all of its kind."""

    place: str
    problem: str
    reason: str = UNREAD


@dataclass(slots=True)
class Noted:
    """left_out: the rows that the source's own reader left out. not_used: column or key of a message -> in how many
    rows it holds something that nothing read."""

    left_out: list[Unread] = field(default_factory=list)
    not_used: dict[str, int] = field(default_factory=dict)

    def note_not_used(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.not_used or len(self.not_used) < MOST_NAMES:
                self.not_used[name] = self.not_used.get(name, 0) + 1
