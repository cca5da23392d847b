"""One value of a row: text, JSON, a list; and how a sentence speaks of it.

Every reader takes the value as it stood in the file, its path inside the row (`messages[2].content`) and the list in
which problems are gathered. What cannot be read adds a sentence there and gives None (or nothing), so that one look
at a row finds everything that is wrong with it.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from chatlora.errors import did_you_mean

MOST_LEVELS = 64  # of lists and objects inside each other; templates, and Python, walk them by recursion
_OF_JSON = (str, bool, int, float, type(None), Mapping, list, tuple)
_WRITE_JSON = "write it with a JSON library"
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}  # type of a part -> where its text stands


def says_nothing(value: Any) -> bool:
    """What need not be told where nothing reads it: null, an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, Mapping)) and not value)


def read_text(value: Any, path: str, problems: list[str], instead: str = "") -> str | None:
    """A string byte for byte; a list of `{type: text}` parts is joined. Numbers are not turned into text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        parts = [read_part(part, f"{path}[{index}]", problems) for index, part in enumerate(value)]
        return None if None in parts else "".join(part for part in parts if part is not None)
    if value is None:
        problems.append(f'{path} is missing or null{instead}; an empty text is written as ""')
    elif not isinstance(value, str):
        is_one = isinstance(value, (bool, int, float))
        remedy = "put it in quotes if it is meant as text" if is_one else "make one text of it, e.g. with a reader"
        problems.append(f"{path} is {described(value)}, not text; {remedy}")
    elif is_text(value, path, problems):
        return value
    return None


def read_optional_text(fields: Mapping[str, Any], key: str, path: str, problems: list[str]) -> str | None:
    return None if fields.get(key) is None else read_text(fields[key], f"{path}.{key}", problems)


def read_list(value: Any, path: str, problems: list[str]) -> list[Any]:
    """A list, or the text of one in JSON or as Python writes it, as CSV and some Parquet files hold it."""
    if isinstance(value, str):
        value = _python_list(value) if value.lstrip().startswith("[{'") else parse_json(value, path, problems)
        if value is None:
            return []
    if not isinstance(value, (list, tuple)):  # a reader may give a tuple
        problems.append(f"{path} is {described(value)}, not a list")
        return []
    return list(value)


def _python_list(text: str) -> Any:
    """What pandas writes to CSV for a list of objects; the text itself where it is not that."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def parse_json(text: str, path: str, problems: list[str]) -> Any:
    """The value of JSON text that stands inside a string. None, and a problem, where it is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=object_of_pairs)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path} should be JSON, and is not ({error}): {_shortened(text)!r}; {_WRITE_JSON}")
        return None


def object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For a JSON decoder. Raises ValueError where a key stands twice: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object; keep one of them")
    return found


def described(value: Any) -> str:
    """What stands there, for a sentence: `the number 5`, `null`, `a list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {_shortened(value)!r}"
    return {"Mapping": "an object", "dict": "an object", "list": "a list", "tuple": "a list"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def instead_of(key: str, fields: Mapping[str, Any]) -> str:
    """`"; did you mean 'contnet'?"` about a field that is there, where the one that is wanted is not."""
    if key in fields:
        return ""
    known = {"role", "content", "from", "value", "name", "tool_calls", "loss", "arguments", "type", "function"}
    return did_you_mean(key, (name for name in map(str, fields) if name not in known))


def listed(names: Iterable[Any]) -> str:
    shown = list(map(str, names))
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


def is_text(value: str, path: str, problems: list[str]) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        problems.append(f"{path} holds half a character ({half} at character {error.start}); write the whole character")
        return False
    return True


def is_json(value: Any, path: str, problems: list[str]) -> bool:
    """Whether a JSON value can be written out, and rendered: not too deep, and text throughout, keys too."""
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        odd = next(
            (key for each in level if isinstance(each, Mapping) for key in each if not isinstance(key, str)), None
        )
        if odd is not None:
            problems.append(
                f"{path} has the key {odd!r}, which is no text; JSON has text alone there: put it in quotes"
            )
            return False
        level = [item for each in level for item in _inside(each)]
        if not level:
            return is_text(json.dumps(value, ensure_ascii=False, default=str), path, problems)
    problems.append(f"{path} has lists and objects in more than {MOST_LEVELS} levels; write it flatter")
    return False


def is_finite(value: Any, path: str, problems: list[str]) -> bool:
    """Whether there is no NaN, no infinity, no date and no bytes in a JSON value: JSON has none, and no tool could be
    called so."""
    level: list[Any] = [value]
    while level:
        other = next((each for each in level if not isinstance(each, _OF_JSON)), None)
        if other is not None:
            problems.append(f"{path} holds {described(other)}, which is no JSON; write it as text or a number")
            return False
        if any(isinstance(each, float) and not isfinite(each) for each in level):
            problems.append(f"{path} holds NaN or infinity, which is no JSON; write null, text or a number")
            return False
        level = [item for each in level for item in _inside(each)]
    return True


def is_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(p, Mapping) and "type" in p for p in value)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()


def read_part(part: Mapping[str, Any], path: str, problems: list[str]) -> str | None:
    kind = part.get("type")
    if kind is None and set(part) == {"text"}:  # Gemini
        kind = "text"
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        problems.append(
            f"{path}.type is {kind!r}; only parts of type 'text' can be trained on; leave such rows out with "
            "on_bad_row: set_aside"
        )
        return None
    key = TEXT_PARTS[kind]
    for other in sorted(map(str, part.keys() - {"index"})):
        if isinstance(part[other], (bool, int, float)):
            problems.append(
                f"{path}.{other} is {described(part[other])}: if it says what is learned, nothing is learned in part; "
                "make it two messages, or take it away, with reader: my_rows.py:read"
            )
    return read_text(part.get(key), f"{path}.{key}", problems, instead_of(key, part))


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
