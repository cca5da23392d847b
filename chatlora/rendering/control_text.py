"""Text is text: what a message says is never a control token, however it is spelled.

A message may spell an added token of the tokenizer (`<|im_end|>`, `<think>`). Before a template sees it, every such
spelling is moved, character by character, to a private plane of Unicode (`mask`): same length, and no template reacts
to it. After rendering, what still spells an added token is the template's. `ControlText.encode` then respells those
with private characters that only a copy of the tokenizer knows as its added tokens, moves the messages' text back,
and encodes all of it at once with that copy, to which `<|im_end|>` is a word like any other.

Under `data.control_text: token` nothing is masked, and everything is encoded as servers do.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from chatlora.config import ControlWords
from chatlora.errors import ModelError, SetAside
from chatlora.rendering.tokenizer_copies import plain_copy, renamed

PRIVATE = "the text uses Unicode's private planes, which masking needs"
SURROGATE = "the text holds half of a surrogate pair, which no tokenizer takes"
READ_AS_CONTROL = "the tokenizer reads message text as a control token"

_MASK = 0xF0000  # plane 15 holds masked text: chr(0xF0000 + ord(character))
_CONTROL = 0x100000  # plane 16 spells control tokens to the copy: chr(0x100000 + number) times the token's length
_PRIVATE_PLANES = re.compile("[\U000f0000-\U0010ffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_MASKED = re.compile("[\U000f0000-\U000fffff]")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids, the position in the text at which each begins, and the indices of those that are control tokens."""

    ids: list[int]
    starts: list[int]
    controls: list[int]


def is_masked(text: str) -> bool:
    return not text.isascii() and _MASKED.search(text) is not None


def unmask(text: str) -> str:
    """The text as people see it."""
    if not is_masked(text):
        return text
    return _MASKED.sub(lambda found: chr(ord(found[0]) - _MASK), text)


class ControlText:
    """A tokenizer seen as text plus control tokens. Built once; picklable."""

    def __init__(self, tokenizer: Any, control_text: ControlWords = "text") -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: has no tokenizer.json; where each token stands in the "
                "text can only be told by a fast tokenizer; convert it with transformers, or use the model's fast one"
            )
        serialized = tokenizer.backend_tokenizer.to_str()
        self.digest = hashlib.sha256((control_text + serialized).encode()).hexdigest()
        self.spellings: dict[int, str] = {
            id: token.content for id, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()
        }
        self.as_served = control_text == "token"
        self.unknown_id: int | None = tokenizer.unk_token_id  # also what text becomes that no token spells
        self._serialized = serialized
        whole = {token.content for token in tokenizer.added_tokens_decoder.values() if token.single_word}
        self._words = _Words(tuple(self.spellings.values()), whole)
        state = json.loads(serialized)
        self.cutting_ids = (
            frozenset(token["id"] for token in state["added_tokens"] if _cuts(token)) & self.spellings.keys()
        )
        self.longest = max((len(token["content"]) for token in state["added_tokens"]), default=0)
        self._plain = plain_copy(state)
        self._tails: dict[str, list[int]] = {}

    def mask(self, value: Any) -> Any:
        """`value`, a string or a JSON value made of them, with all that could be read as a control token masked.

        Also the ends of a string that are part of an added token, since a template may join it to the rest. Raises
        SetAside where the text holds private characters already, or what no tokenizer takes. As served: as it is.
        """
        return _in_strings(value, _usable if self.as_served else self._words.mask)

    def control_in(self, text: str) -> str | None:
        """The first whole added token that the text, unmasked, spells."""
        return self._words.first(text)

    # ---- encoding

    def encode(self, text: str) -> Encoded:
        """Rendered text -> ids, each control token the template's. Raises SetAside where message text becomes one."""
        if not is_masked(text):
            return self._encoded(self._plain, text)
        respelled = list(text)
        encoding = self._plain.encode(text, add_special_tokens=False)
        numbers = self._numbers
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id in numbers and (spelling := self.spellings[id]) in text[start:end]:
                # The span of a token that strips its surroundings holds whitespace too.
                start = text.index(spelling, start, end)
                respelled[start : start + len(spelling)] = _respelled(numbers[id], spelling)
        return self._encoded(self._respelling, unmask("".join(respelled)), masked=text)

    def encode_after_control(self, text: str) -> list[int]:
        """The ids of a piece of text as it is encoded right after a control token, not at the start of everything."""
        if self._anchor is None:
            return self.encode(text).ids
        return self.encode(self._anchor + text).ids[1:]

    def encode_tail(self, text: str) -> list[int]:
        """The ids of a prompt's last span. Remembered: it is nearly always the same."""
        if len(text) > 200:
            return self.encode(text).ids
        if text not in self._tails:
            if len(self._tails) >= 1024:
                self._tails.clear()
            self._tails[text] = self.encode(text).ids
        return self._tails[text]

    def _encoded(self, tokenizer: Tokenizer, text: str, masked: str | None = None) -> Encoded:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if masked is not None:
            back = self._original_ids
            ids = [back.get(id, id) for id in ids]
        spellings = self.spellings
        controls = []
        for index, id in enumerate(ids):
            if id not in spellings:
                continue
            start, end = offsets[index]
            if self.as_served or (masked or text)[start:end].strip() == spellings[id].strip():
                controls.append(index)
            elif id != self.unknown_id:
                raise SetAside(READ_AS_CONTROL, f"{text[start:end]!r} as {spellings[id]!r}")
        return Encoded(ids, [start for start, _ in offsets], controls)

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        return {id: number for number, id in enumerate(self.spellings)}

    @functools.cached_property
    def _anchor(self) -> str | None:
        tokens = (token for token in json.loads(self._serialized)["added_tokens"] if token["id"] in self.spellings)
        return next((token["content"] for token in tokens if not token["rstrip"]), None)

    @functools.cached_property
    def _respelling(self) -> Tokenizer:
        """The copy that knows its added tokens by private spellings only. Built when text first needs it."""
        names = {spelling: "".join(_respelled(self._numbers[id], spelling)) for id, spelling in self.spellings.items()}
        return plain_copy(renamed(json.loads(self._serialized), names))

    @functools.cached_property
    def _original_ids(self) -> dict[int, int]:
        # Where an added token was no entry of the model's vocabulary, the copy may have numbered it anew.
        copy = self._respelling
        return {
            int(copy.token_to_id("".join(_respelled(self._numbers[id], spelling)))): id  # type: ignore[arg-type]
            for id, spelling in self.spellings.items()
        }


class _Words:
    """Finds added tokens in text, fast where there are none: tables by length, behind a search for first letters.

    `whole` are those that the tokenizer takes only where no letter, digit or underscore touches them (`single_word`).
    """

    def __init__(self, words: Sequence[str], whole: Set[str] = frozenset()) -> None:
        self.words = frozenset(words)
        self.whole = frozenset(whole)
        self.lengths = sorted({len(word) for word in words}, reverse=True)
        self.prefixes, self.whole_prefixes = (
            frozenset(word[:size] for word in some for size in range(1, len(word))) for some in self._two_kinds()
        )
        self.suffixes, self.whole_suffixes = (
            frozenset(word[-size:] for word in some for size in range(1, len(word))) for some in self._two_kinds()
        )
        self.longest = max(self.lengths, default=0)
        self.opens = any_of({word[0] for word in words})
        self.closes = any_of({word[-1] for word in words})

    def first(self, text: str) -> str | None:
        for start in (opening.start() for opening in self.opens.finditer(text)):
            for size in self.lengths:
                if self._stands(text, start, start + size):
                    return text[start : start + size]
        return None

    def _two_kinds(self) -> tuple[Set[str], Set[str]]:
        return self.words - self.whole, self.words & self.whole

    def _stands(self, text: str, start: int, end: int) -> bool:
        """Whether the tokenizer would take text[start:end] for one of its added tokens."""
        found = text[start:end]
        if found not in self.words:
            return False
        return found not in self.whole or not (
            _is_word(text[max(0, start - 1) : start]) or _is_word(text[end : end + 1])
        )

    def mask(self, text: str) -> str:
        spans = list(self._spans(_usable(text)))
        if not spans:
            return text
        characters = list(text)
        for start, end in spans:
            characters[start:end] = map(_masked, text[start:end])
        masked = "".join(characters)
        if self.first(masked) is not None:  # a token of quotes or spaces only
            raise SetAside(READ_AS_CONTROL, repr(text))
        return masked

    def _spans(self, text: str) -> Any:
        for opening in self.opens.finditer(text):
            start = opening.start()
            for size in self.lengths:
                if self._stands(text, start, start + size):
                    yield start, start + size
                    break
        reach = self.longest - 1
        if reach > 0 and self.closes.search(text, 0, reach):
            size = next((size for size in range(min(reach, len(text)), 0, -1) if self._is_end(text, size)), 0)
            if size:
                yield 0, size
        if reach > 0 and self.opens.search(text, max(0, len(text) - reach)):
            size = next((size for size in range(min(reach, len(text)), 0, -1) if self._is_beginning(text, size)), 0)
            if size:
                yield len(text) - size, len(text)

    def _is_end(self, text: str, size: int) -> bool:
        """Whether the first `size` characters could be the end of an added token that the template begins."""
        part = text[:size]
        return part in self.suffixes or (part in self.whole_suffixes and not _is_word(text[size : size + 1]))

    def _is_beginning(self, text: str, size: int) -> bool:
        part = text[-size:]
        return part in self.prefixes or (part in self.whole_prefixes and not _is_word(text[-size - 1 : -size]))


def _is_word(character: str) -> bool:
    # A little less than the tokenizer's own \w, so that in doubt text is masked.
    return character.isalpha() or character.isdecimal() or character == "_"


def _usable(text: str) -> str:
    """The text. Raises SetAside where it holds what no text may."""
    if not text.isascii():
        for unusable, reason in ((_PRIVATE_PLANES, PRIVATE), (_SURROGATES, SURROGATE)):
            if unusable.search(text):
                raise SetAside(reason)
    return text


def _in_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _in_strings(item, change) for key, item in value.items()}
    return [_in_strings(item, change) for item in value] if isinstance(value, list | tuple) else value


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the words; of none, nothing."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def _cuts(token: Mapping[str, Any]) -> bool:
    """Whether an added token is found wherever the text spells it, and begins exactly there."""
    return not (token["normalized"] or token["single_word"] or token["lstrip"] or token["content"][:1].isspace())


def _masked(character: str) -> str:
    # What JSON escapes and what templates trim stays, or they would not; beyond the first plane there is no room.
    if character in '"\\' or character < " " or character.isspace() or ord(character) > 0xFFFF:
        return character
    return chr(_MASK + ord(character))


def _respelled(number: int, spelling: str) -> list[str]:
    return [chr(_CONTROL + number)] * len(spelling)
