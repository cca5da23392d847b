"""An example as the model sees it: its tokens as text, and which of them are targets."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from chatlora.rendering.examples import IGNORE_INDEX, Example
from chatlora.terminal import harmless

TARGET = "bold green"
CONTEXT = "dim"
OPENS, CLOSES = "⟦", "⟧"  # around targets where there are no colours
LOOK_BACK = 4  # tokens in front: some decoders write a word's first token otherwise at a text's beginning


class Piece(NamedTuple):
    text: str
    is_target: bool


def pieces(tokenizer: Any, example: Example) -> list[Piece]:
    """The text of the whole example, cut wherever targets begin or end."""
    return [
        Piece(decoded(tokenizer, example.input_ids, start, end), is_target)
        for start, end, is_target in spans(example.labels)
    ]


def spans(labels: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether these tokens are targets), in order. Nothing predicts the first token, so it is none."""
    start = 0
    wanted = [False, *(label != IGNORE_INDEX for label in labels[1:])]
    for is_target, run in groupby(wanted[: len(labels)]):
        end = start + sum(1 for _ in run)
        yield start, end, is_target
        start = end


def decoded(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text that the tokens from `start` to `end` add to those in front of them, control tokens included."""
    first = max(0, start - LOOK_BACK)
    before, both = (str(tokenizer.decode(ids[first:last], clean_up_tokenization_spaces=False)) for last in (start, end))
    # A character may have bytes on both sides.
    return both[len(before) :] if both.startswith(before) else both[len(before.rstrip("\ufffd")) :]


def has_colours(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def marked(shown: Iterable[Piece], *, colours: bool) -> Text:
    """Targets in colour, or between ⟦ and ⟧, which the text itself then spells as \\u27e6 and \\u27e7."""
    text = Text()
    for piece in shown:
        clean = harmless(piece.text)
        if colours:
            text.append(clean, style=TARGET if piece.is_target else CONTEXT)
            continue
        clean = clean.replace(OPENS, r"\u27e6").replace(CLOSES, r"\u27e7")
        text.append(f"{OPENS}{clean}{CLOSES}" if piece.is_target else clean)
    return text
