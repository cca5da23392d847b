"""Signs that a text was once read in another encoding than it was written in. Few, so that good text shows none.

Text is looked at, never changed. What shows no sign may be wrong all the same: a character or two of it.
"""

import codecs
import re
from collections.abc import Iterator

# What bytes 0x80 to 0xbf, of which UTF-8 makes the rest of a character, are in Latin-1 and in Windows-1252.
_REST = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_BEHIND_WORDS = "\xa0»’”…–—"  # of these, what may follow a capital letter in good text: AMANHÃ…
_SIGNS = re.compile(
    "\ufffd|锟斤拷"  # a character that was lost
    "|[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]"  # control characters; but for escape, which stands in logs of terminals
    f"|[ÂÃ](?![{_BEHIND_WORDS}])[{_REST}]|(?<![A-ZÀ-Þ])[ÂÃ][{_BEHIND_WORDS}]"  # é as Ã©
    "|[âã]€|ï¼[\x80-\xbfˆ‰Œ›Ÿš]|ï»¿|ðŸ"  # a quotation mark, 。, ，, a byte-order mark, emoji
    f"|(?:[\xc2-\xdf][{_REST}]){{3}}|(?:[\xe3-\xef][{_REST}]{{2}}){{2}}"  # Cyrillic, Greek; Chinese
    "|[\xb0-\xf7][\xa1-\xfe](?:£¬|¡£)"  # Chinese in GB18030, up to its comma or full stop
)
_MAY_BE = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\xff\ufffd锟]")  # quick: most texts hold none
_RUN = re.compile("[^\x00-\x7f]{7,}")  # with fewer characters it may be an accident
_OTHERS = ("gb18030", "cp932", "cp1251")  # in which UTF-8 looks like letters: 浣犲ソ, 縺薙ｓ, РїСЂРё
_SHOWN = 8  # characters to each side of a sign


def wrong_encoding(text: str) -> str | None:
    """The text about the first sign of a wrong encoding; None where there is none."""
    return next((_around(text, *span) for span in _signs(text)), None)


def _signs(text: str) -> Iterator[tuple[int, int]]:
    if _MAY_BE.search(text):
        yield from (found.span() for found in _SIGNS.finditer(text))
    if not text.isascii():
        yield from (found.span() for found in _RUN.finditer(text) if _was_utf8(found[0]))


def _was_utf8(run: str) -> bool:
    """Whether these characters are UTF-8 in another encoding: by accident only few are."""
    return any(_decodes(run, encoding) for encoding in _OTHERS)


def _decodes(run: str, encoding: str) -> bool:
    try:
        return bool(codecs.getincrementaldecoder("utf-8")().decode(run.encode(encoding)))
    except UnicodeError:
        return False


def _around(text: str, start: int, end: int) -> str:
    return text[max(0, start - _SHOWN) : end + _SHOWN]
