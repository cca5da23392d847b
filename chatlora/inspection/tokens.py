"""Each token of a text as the part of it that the token brings."""

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One text a token; together the whole text. A character of several tokens is the last one's."""
    texts, clean, read = list[str](), 0, 0
    for end in range(1, len(ids) + 1):
        before, both = (str(tokenizer.decode(ids[clean:last])) for last in (read, end))
        if both.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(both[len(before) :])
        clean, read = read, end
    return texts
