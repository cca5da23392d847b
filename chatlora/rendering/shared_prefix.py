"""The texts of one row encoded one after another, each with what it shares with another only once.

A row that gives an example a turn has texts of which each begins like the others. Control tokens cut a text before any
merge: the ids in front of one are the same whatever follows it. So what two texts share is encoded once, up to the last
control token in it, and the rest of the other text from there on. That holds for tokens that the tokenizer finds in the
text as it stands (not after its normalisation), wherever they stand, and that do not take the space in front of them;
and where what is shared goes on for longer than any token, so that none can begin before the cut and end behind it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from chatlora.rendering.control_text import ControlText, Encoded, is_masked


class RowEncoder:
    """Encodes as `ControlText.encode` does."""

    def __init__(self, text: ControlText) -> None:
        self._text = text
        self._known: list[tuple[str, Encoded]] = []  # the first text, which is most of the others, and the last one

    def encode(self, text: str) -> Encoded:
        """Raises SetAside where message text becomes a control token."""
        encoded = self._text.encode(text) if is_masked(text) else self._encoded(text)
        if not is_masked(text):  # which is encoded by another tokenizer, to which it matters what else is masked
            self._known = [*self._known[:1], (text, encoded)]
        return encoded

    def _encoded(self, text: str) -> Encoded:
        shared = [(shared_length(text, known), encoded) for known, encoded in self._known]
        length, encoded = max(shared, key=lambda pair: pair[0], default=(0, None))
        cut = None if encoded is None else self._cut(encoded, length)
        if encoded is None or cut is None:
            return self._text.encode(text)
        position = encoded.starts[cut]
        rest = self._text.encode(text[position:])
        return Encoded(
            encoded.ids[:cut] + rest.ids,
            encoded.starts[:cut] + [position + start for start in rest.starts],
            encoded.controls[: bisect_left(encoded.controls, cut)] + [cut + index for index in rest.controls],
        )

    def _cut(self, encoded: Encoded, length: int) -> int | None:
        """The index of the last token that cuts within the first `length` characters."""
        last = bisect_right(encoded.starts, length - self._text.longest - 1)
        cuts = self._text.cutting_ids
        return next(
            (index for index in reversed(encoded.controls) if index < last and encoded.ids[index] in cuts), None
        )


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much two texts, or two lists, have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
