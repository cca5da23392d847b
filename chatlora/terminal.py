"""Text of others on a person's terminal: shown whole, and never obeyed."""

import re

from rich.text import Text

# What moves a cursor, colours, hides, turns the direction of writing or takes no room. Line breaks, tabs and the
# joiners of emoji and of Persian stay as they are.
ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def harmless(text: str) -> str:
    """What a terminal would obey is spelled as Python does, `\\x1b` or `\\u202e`; a lone surrogate is `?`."""
    return ACTS.sub(_spelled, text.encode("utf-8", "replace").decode("utf-8"))


def printable(text: str) -> Text:
    """For rich, which would read `[bold]` in a plain string as markup."""
    return Text(harmless(text))


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
