"""How answers are shown: as they come on a terminal, whole in a pipe, as JSON for a program."""

import json
import sys
from typing import Protocol

from rich.console import Console
from rich.text import Text

from chatlora.chat.answers import Answer
from chatlora.evaluation.command_line import MODEL
from chatlora.progress import print_line
from chatlora.reading.conversation import split_reasoning
from chatlora.rendering.thoughts import CLOSE, OPEN
from chatlora.terminal import harmless, printable


class Screen(Protocol):
    def begin(self, names: tuple[str, ...]) -> None:
        """These are asked one message, one after the other."""

    def show(self, by: str, text: str) -> None:
        """All that one of them has said so far."""

    def end(self, answer: Answer) -> None:
        """It is at its end."""

    def say(self, line: str) -> None:
        """What is no answer."""


class Piped:
    """Answers on standard output, nothing else."""

    def begin(self, names: tuple[str, ...]) -> None:
        del names

    def show(self, by: str, text: str) -> None:
        del by, text

    def end(self, answer: Answer) -> None:
        message = answer.message
        if message.reasoning is not None:
            print_line(f"{answer.by} thought: {message.reasoning}")
        sys.stdout.write(message.content + "\n")
        sys.stdout.flush()

    def say(self, line: str) -> None:
        print_line(harmless(line))


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
        sys.stdout.write(json.dumps(told, ensure_ascii=False) + "\n")
        sys.stdout.flush()


class Terminal:
    """Text as it comes, thoughts dim, answers plain."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.shown = ("", "")

    def begin(self, names: tuple[str, ...]) -> None:
        del names
        self.shown = ("", "")

    def show(self, by: str, text: str) -> None:
        self._grow(by, thought_and_answer(text))

    def end(self, answer: Answer) -> None:
        text = answer.opening + answer.text
        thought, said = thought_and_answer(text)
        self._grow(answer.by, (thought, said) if said or thought else ("", text))
        self.console.print()
        self.shown = ("", "")

    def say(self, line: str) -> None:
        self.console.print(printable(line), style="cyan", soft_wrap=True)

    def _grow(self, by: str, parts: tuple[str, str]) -> None:
        thought, said = (part[len(shown) :] for part, shown in zip(parts, self.shown, strict=True))
        if not any(self.shown) and (thought or said) and by != MODEL:
            self.console.print(f"{by}: ", style="bold", end="")
        if thought:
            self.console.print(Text(harmless(thought)), style="dim", end="", soft_wrap=True)
        if said and parts[0] and not self.shown[1]:
            self.console.print("\n")
        if said:
            self.console.print(printable(said), end="", soft_wrap=True)
        self.shown = parts


def thought_and_answer(text: str) -> tuple[str, str]:
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
