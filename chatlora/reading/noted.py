"""What came of reading a source, beside its conversations: for the ledger."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from chatlora.reading.flags import CONTRADICT, IN_PART, LEARNS_REPLIES, NOTHING_READS, SENSES, TRUE_OR_FALSE
from chatlora.reading.streams import NOT_UTF8

UNREAD = "the row cannot be read"
KINDS = {  # what a problem says -> how the reason goes on, so that rows of one kind are counted together
    **dict.fromkeys(
        (TRUE_OR_FALSE, SENSES, CONTRADICT, LEARNS_REPLIES, IN_PART), ": its flags do not say what is learned"
    ),
    NOTHING_READS: ": it has a flag that nothing reads",
    NOT_UTF8: ": it is not UTF-8",
}
MOST_NAMES = 1_000  # that are counted of a source: keys of objects may be data


class Unread(NamedTuple):
    """A row that gives no conversation, and why; reason is the same words for all of its kind."""

    place: str
    problem: str
    reason: str = UNREAD


def reason_of(problem: str) -> str:
    return UNREAD + next((more for words, more in KINDS.items() if words in problem), "")


@dataclass(slots=True)
class Noted:
    """left_out: the rows that the source's own reader left out. not_used: column or key of a message -> in how many
    rows it holds something that nothing read."""

    left_out: list[Unread] = field(default_factory=list)
    not_used: dict[str, int] = field(default_factory=dict)

    def note_not_used(self, names: Iterable[str]) -> None:
        for name in (name.encode(errors="backslashreplace").decode() for name in names):  # half a character is no text
            if name in self.not_used or len(self.not_used) < MOST_NAMES:
                self.not_used[name] = self.not_used.get(name, 0) + 1
