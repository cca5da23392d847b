"""What the texts of a row share is encoded once, and every text gets the ids that it has alone."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers

from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering.control_text import ControlText, Encoded
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.shared_prefix import RowEncoder, shared_length
from tests.tiny_tokenizers import CHATML_TOKENS, QWEN3, THINK_TOKENS, tiny_tokenizer

PIECES = [
    *CHATML_TOKENS,
    *THINK_TOKENS,
    "<|im_end|>x",
    "<|im_",
    "end|>",
    "assistant",
    "\n",
    "\n\n",
    "  ",
    " a",
    "北京",
    "é",
    "▁",
]


def added(word: str, **how: bool) -> AddedToken:
    return AddedToken(word, **{"normalized": False, "special": True, **how})


def tokenizers() -> dict[str, Any]:
    found = {
        "plain": tiny_tokenizer(plain_tokens=THINK_TOKENS),
        "one token begins another": tiny_tokenizer(plain_tokens=[*THINK_TOKENS, "<|im_end|>x", "\n\n"]),
        "space after": tiny_tokenizer(control_tokens=[added(word, rstrip=True) for word in CHATML_TOKENS]),
        "space before": tiny_tokenizer(control_tokens=[added(word, lstrip=True) for word in CHATML_TOKENS]),
        "found after normalisation": tiny_tokenizer(
            control_tokens=[added(word, normalized=True) for word in CHATML_TOKENS]
        ),
        "whole words": tiny_tokenizer(plain_tokens=[added("assistant", special=False, single_word=True)]),
        "a token across others": tiny_tokenizer(plain_tokens=[*THINK_TOKENS, "assistant<|im_end|>\n"]),
    }
    for name in ("space after", "found after normalisation"):
        found[name].backend_tokenizer.normalizer = normalizers.Prepend("▁")
    return found


TOKENIZERS = tokenizers()


def texts_of_a_row(seed: int) -> Iterator[str]:
    """Texts that begin alike and go on otherwise, cut anywhere."""
    drawn = random.Random(seed)
    whole = "".join(drawn.choices(PIECES, k=30))
    yield whole
    for _ in range(8):
        yield whole[: drawn.randrange(len(whole))] + "".join(drawn.choices(PIECES, k=drawn.randrange(5)))


def differences(text: ControlText) -> list[str]:
    """The texts that, behind others, are not encoded as alone."""
    found = []
    for seed in range(60):
        encoder = RowEncoder(text)
        found += [one for one in texts_of_a_row(seed) if encoder.encode(one) != text.encode(one)]
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_encoded_as_each_would_be_alone(name: str) -> None:
    assert not differences(ControlText(TOKENIZERS[name], "token"))


def test_not_every_token_cuts_a_text() -> None:
    text = ControlText(TOKENIZERS["found after normalisation"], "token")
    assert not text.cutting_ids
    text.cutting_ids = frozenset(text.spellings)
    assert differences(text)


def test_a_token_that_begins_before_a_cut_may_end_behind_it() -> None:
    text = ControlText(TOKENIZERS["a token across others"], "token")
    text.longest = 0
    assert differences(text)


def test_a_masked_text_is_encoded_as_alone() -> None:
    text = ControlText(TOKENIZERS["plain"])
    encoder, asked = RowEncoder(text), "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    for said in ("a<|im_end|>", "<think>", "b"):
        one = asked + text.mask(said) + "<|im_end|>"
        assert encoder.encode(one) == text.encode(one)


def test_lists_and_texts_share_their_beginning() -> None:
    for one, other, length in (("abc", "abd", 2), ("", "a", 0), ("ab", "ab", 2), ([1, 2], [1], 1), ([2], [1], 0)):
        assert shared_length(one, other) == length


def test_many_turns_cost_a_row_few_encodings_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example a turn: what is encoded grows with the row, not with the square of it."""
    renderer = Renderer(
        tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS), chat_template_kwargs={"enable_thinking": False}
    )
    encoded: list[int] = []
    encode = ControlText.encode

    def counting(self: ControlText, text: str) -> Encoded:
        encoded.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(ControlText, "encode", counting)

    def characters(turns: int) -> int:
        encoded.clear()
        said = [Message("user", f"What is {number}?") for number in range(turns)]
        answers = [Message("assistant", f"{number} is a number, and a fine one.") for number in range(turns)]
        row = Conversation(tuple(one for pair in zip(said, answers, strict=True) for one in pair))
        assert len(renderer.render(row, max_length=10**6).examples) == turns
        return sum(encoded)

    assert characters(40) < 2.5 * characters(20)
