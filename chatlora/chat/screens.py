"""How answers are shown: as they come on a terminal, whole in a pipe, as JSON for a program."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chatlora.chat.answers import Answer
from chatlora.progress import print_line
from chatlora.reading.conversation import split_reasoning
from chatlora.rendering.thoughts import CLOSE, OPEN
from chatlora.terminal import harmless, printable

ROOM_FOR_TWO = 80  # columns of a terminal that two answers stand in side by side
Parts = tuple[str, str]  # a thought, and the answer behind it


class Screen(Protocol):
    @property
    def streams(self) -> bool:
        """Whether `show` shows anything."""

    @contextmanager
    def asking(self, names: Sequence[str]) -> Iterator[None]:
        """Within, these answer one message, one after the other."""
        yield

    def show(self, by: str, text: str) -> None:
        """All that one of them has said so far."""

    def end(self, answer: Answer) -> None:
        """It is at its end."""

    def say(self, line: str) -> None:
        """What is no answer."""


class Piped:
    """Answers on standard output, nothing else."""

    streams = False

    @contextmanager
    def asking(self, names: Sequence[str]) -> Iterator[None]:
        del names
        yield

    def show(self, by: str, text: str) -> None:
        del by, text

    def end(self, answer: Answer) -> None:
        message = answer.message
        if message.reasoning is not None:
            self.say(f"{answer.by} thought: {message.reasoning}")
        self.write(message.content)

    def say(self, line: str) -> None:
        print_line(harmless(line))

    def write(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class PipedJson(Piped):
    """An object a line for each answer, under the names of predictions.jsonl."""

    def end(self, answer: Answer) -> None:
        message = answer.message
        told = {
            "by": answer.by,
            "prediction": answer.text,
            "reasoning_content": message.reasoning,
            "content": message.content,
            "stop_reason": answer.stop_reason,
        }
        self.write(json.dumps(told, ensure_ascii=False))


class Terminal:
    """Text as it comes, thoughts dim, answers plain; two answers side by side where there is room for that."""

    streams = True

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.names: Sequence[str] = ()
        self.parts: dict[str, Parts] = {}
        self.live: Live | None = None

    @contextmanager
    def asking(self, names: Sequence[str]) -> Iterator[None]:
        self.names, self.parts = names, {}
        if len(names) == 1 or self.console.width < ROOM_FOR_TWO:
            yield
            return
        with Live(console=self.console, get_renderable=self._table, refresh_per_second=10) as self.live:
            yield
        self.live = None

    def show(self, by: str, text: str) -> None:
        self._grow(by, thought_and_answer(text))

    def end(self, answer: Answer) -> None:
        text = answer.opening + answer.text
        said = split_reasoning(text)
        whole = (said.reasoning or "", said.content)
        if said.thought_text is None and thought_and_answer(text)[0]:  # one that did not come to its end
            whole = (text.lstrip().removeprefix(OPEN).lstrip("\n"), "")
        self._grow(answer.by, whole)
        if self.live is None:
            self.console.print()

    def say(self, line: str) -> None:
        self.console.print(printable(line), style="cyan", soft_wrap=True)

    def _grow(self, by: str, parts: Parts) -> None:
        before = self.parts.get(by, ("", ""))
        self.parts[by] = parts
        if self.live is not None:
            return
        if len(self.names) > 1 and not any(before) and any(parts):
            self.console.print(f"{by}: ", style="bold", end="")
        thought, said = (part[len(shown) :] for part, shown in zip(parts, before, strict=True))
        gap = "\n\n" * bool(parts[0] and said and not before[1])
        self.console.print(dimmed(thought, gap, said), end="", soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for _ in self.names:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(name, style="bold") for name in self.names))
        texts = [self.parts.get(name, ("", "")) for name in self.names]
        table.add_row(*(dimmed(thought, "\n\n" * bool(thought and said), said) for thought, said in texts))
        return table


def dimmed(thought: str, gap: str, said: str) -> Text:
    return Text.assemble((harmless(thought), "dim"), gap, harmless(said))


def thought_and_answer(text: str) -> Parts:
    """What can be shown of a reply that is still growing; each part only grows. What may become a tag is held back."""
    said = split_reasoning(text)
    if said.thought_text is not None:
        return said.reasoning or "", said.content
    begun = text.lstrip()
    if begun.startswith(OPEN):
        thought = begun.removeprefix(OPEN)
        held = next((size for size in range(len(CLOSE), 0, -1) if thought.endswith(CLOSE[:size])), 0)
        return thought[: len(thought) - held].strip("\n"), ""
    return ("", "") if OPEN.startswith(begun) else ("", text)
