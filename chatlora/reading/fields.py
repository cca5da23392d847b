"""A row under our names for its columns; whoever reads one takes it, and what nobody took is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chatlora.reading.turns import Turns, read_turns
from chatlora.reading.values import says_nothing


@dataclass(slots=True)
class Fields:
    """names: our column -> the row's, for those that are there and not null (Parquet cannot tell the two apart).

    keys: our key of a message -> the row's. ignored: columns and keys that are not looked at. turns: what the lists of
    turns said beside their messages.
    """

    row: Mapping[str, Any]
    keys: Mapping[str, str]
    ignored: frozenset[str]
    names: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    turns: Turns = field(default_factory=Turns)

    def name(self, columns: Mapping[str, str]) -> None:
        self.names |= {ours: theirs for ours, theirs in columns.items() if self.row.get(theirs) is not None}

    def peek(self, name: str) -> Any:
        return self.row[self.names[name]] if name in self.names else None

    def take(self, name: str) -> Any:
        if name in self.names:
            self.taken.add(self.names[name])
        return self.peek(name)

    def path(self, name: str) -> str:
        """What the row calls it, for sentences."""
        return self.names.get(name, name)

    def take_turns(self, name: str, problems: list[str]) -> Turns:
        path = self.path(name)
        read = read_turns(self.take(name), path, problems, keys=self.keys, ignored=self.ignored)
        self.turns.tools += read.tools
        self.turns.not_used |= read.not_used
        self.turns.learned_context += read.learned_context
        return read

    def not_used(self) -> set[str]:
        """The row's columns that hold something and that nobody took, and such keys of its turns."""
        return {str(name) for name in self.left()} | self.turns.not_used - self.ignored

    def left(self) -> dict[str, Any]:
        """The row's columns that hold something and that nobody took."""
        seen = self.taken | self.ignored
        return {name: value for name, value in self.row.items() if name not in seen and not says_nothing(value)}
