"""Where messages come from: a person at a terminal, or the lines of a pipe."""

import json
import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from chatlora.errors import ChatError
from chatlora.progress import print_line

PROMPT, GOES_ON = "> ", "... "
CONTINUED = "\\"


class Line(NamedTuple):
    """place: the line's number in a pipe. is_message: it is no command, whatever it begins with."""

    text: str
    place: str = ""
    is_message: bool = False


def typed() -> Iterator[Line]:
    """Until Ctrl-D, or Ctrl-C at the prompt. A line that ends with a backslash goes on in the next one."""
    try:
        import readline  # line editing and history, and a paste of several lines in one piece
    except ImportError:  # not on Windows
        pass
    else:
        readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            text = _typed_message()
        except (EOFError, KeyboardInterrupt):
            print_line("")
            return
        if text.strip():
            yield Line(text)


def _typed_message() -> str:
    lines = [_prompted(PROMPT)]
    while lines[-1].endswith(CONTINUED):
        lines[-1] = lines[-1].removesuffix(CONTINUED)
        lines.append(_prompted(GOES_ON))
    return "\n".join(lines)


def _prompted(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)  # standard output is for answers
    sys.stderr.flush()
    return input()


def piped(file: BinaryIO, *, as_json: bool) -> Iterator[Line]:
    """Lines that hold something. Raises ChatError with the line's number where one is no text, or no JSON."""
    for number, raw in enumerate(file, start=1):
        place = f"line {number}: "
        try:
            text = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ChatError(f"{place}not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
        if not text.strip():
            continue
        if not as_json or text.startswith("/"):
            yield Line(text, place)
            continue
        yield Line(_json_text(text, place), place, is_message=True)


def _json_text(text: str, place: str) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ChatError(f'{place}no JSON ({error}): with --json a message is a JSON string, as in "Hello"') from None
    if not isinstance(value, str):
        raise ChatError(f'{place}a message is a JSON string, as in "Hello"; a command begins with /')
    return value
