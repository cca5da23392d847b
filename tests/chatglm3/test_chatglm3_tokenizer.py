"""ChatGLM3's tokenizer from its tokenizer.model: the recorded ids, random text, and what is refused.

Run: pytest tests/chatglm3/test_chatglm3_tokenizer.py
"""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chatlora.chatglm3.sentencepiece import read_sentencepiece
from chatlora.chatglm3.tokenizer import build_tokenizer, tokenizer_files
from chatlora.errors import ModelError

PREFIX = [64790, 64792]


@pytest.fixture(scope="module")
def recordings(shared: Path) -> Path:
    return shared / "chatglm3"


@pytest.fixture(scope="module")
def tokenizer_model(recordings: Path) -> Path:
    return recordings / "tokenizer/tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(tokenizer_model, 8192).items():
        (folder / name).write_text(content, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def original(tokenizer_model: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(tokenizer_model))


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a message's text, in which nothing is a control token."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def test_every_recorded_string_has_its_ids_and_decodes(tokenizer: PreTrainedTokenizerBase, recordings: Path) -> None:
    for recorded in load(recordings / "tokenizer_strings.json"):
        assert encode(tokenizer, recorded["text"]) == recorded["ids"], recorded["text"]
        assert tokenizer.encode(recorded["text"], split_special_tokens=True) == PREFIX + recorded["ids"]
        assert tokenizer.decode(recorded["ids"]) == recorded["hf_decode"]


def test_recorded_ids_decode_as_in_the_original(tokenizer: PreTrainedTokenizerBase, recordings: Path) -> None:
    control = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for recorded in load(recordings / "tokenizer_decode_ids.json"):
        ids = [id for id in recorded["ids"] if id >= 0]  # the original dropped -100 as it does every unknown id
        assert tokenizer.decode(ids) == recorded["hf_decode"]
        # The original never skipped the control tokens that it had added. Here they can be skipped.
        without = recorded["hf_decode_skip_special"]
        for name in control:
            without = without.replace(name, "")
        assert tokenizer.decode(ids, skip_special_tokens=True).lstrip(" ") == without.lstrip(" ")


def test_tokens_have_their_recorded_names_and_ids(tokenizer: PreTrainedTokenizerBase, recordings: Path) -> None:
    recorded = load(recordings / "special_tokens.json")
    for name, id in recorded["special_tokens"].items():
        assert (tokenizer.convert_tokens_to_ids(name), tokenizer.convert_ids_to_tokens(id)) == (id, name)
    assert len(tokenizer) == recorded["vocab_size"]
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (recorded["unk_id"], recorded["pad_id"])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (recorded["bos_id"], recorded["eos_id"])
    assert tokenizer.padding_side == "left"


def test_control_tokens_inside_words_are_text(tokenizer: PreTrainedTokenizerBase, original: Any) -> None:
    for text in ("people of philosophy", "eop", "[MASK] [sMASK]", "a_sop", "sop1", "沙sop"):
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text), text
    assert 64792 in tokenizer.encode("sop", add_special_tokens=False)  # a word of its own: the template's


# ---- against sentencepiece itself

BLOCKS = [  # where the characters of random text come from
    (0x20, 0x7F), (0x20, 0x7F), (0x00, 0x20), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x700),
    (0x900, 0x980), (0xE00, 0xE80), (0x2000, 0x2070), (0x2500, 0x2600), (0x3000, 0x3100), (0x4E00, 0xA000),
    (0x4E00, 0x5200), (0xAC00, 0xB000), (0xE000, 0xE100), (0xFE00, 0x10000), (0x1F300, 0x1F700), (0x20000, 0x20200),
    (0x10000, 0x110000),
]  # fmt: skip
WORDS = ["the", " ", "  ", "    ", "\n", "\t", "\r\n", "====", "----", "////", "000000", "def ", "return", "你好",
         "中国", "aaaa", "aaaaa", "▁", "<0x0A>", "\u200d", "sop", "<|user|>", "</s>", "1.5", "x86_64",
         "'s", "ing"]  # fmt: skip


def random_text(draw: random.Random) -> str:
    pieces = []
    for _ in range(draw.randrange(0, 24)):
        if draw.random() < 0.4:
            pieces.append(draw.choice(WORDS) * draw.choice((1, 1, 1, 2, 3, 7)))
            continue
        first, last = draw.choice(BLOCKS)
        pieces += [chr(draw.randrange(first, last)) for _ in range(draw.randrange(1, 5))]
    return "".join(pieces).encode("utf-8", "ignore").decode("utf-8")  # no halves of surrogate pairs


def test_random_unicode_is_encoded_as_by_sentencepiece(tokenizer: PreTrainedTokenizerBase, original: Any) -> None:
    draw = random.Random(7)
    texts = [random_text(draw) for _ in range(5000)]
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # as split_special_tokens sets it
    try:
        ours = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False
    theirs = original.encode(texts)
    different = [text for text, mine, other in zip(texts, ours, theirs, strict=True) if mine != other]
    assert not different, different[:3]
    decoded = [(text, tokenizer.decode(ids), original.decode(ids)) for text, ids in zip(texts, theirs, strict=True)]
    assert [text for text, mine, other in decoded if mine != other] == []


def test_the_vocabulary_is_read_as_sentencepiece_reads_it(tokenizer_model: Path, original: Any) -> None:
    model = read_sentencepiece(tokenizer_model)
    assert [piece.text for piece in model.pieces] == [original.id_to_piece(id) for id in range(len(original))]
    assert [piece.score for piece in model.pieces] == [original.get_score(id) for id in range(len(original))]


# ---- what is refused


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3]) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded, value = encoded + bytes([value & 0x7F | 0x80]), value >> 7
    return encoded + bytes([value])


def other_model(*, model_type: int = 2, normalizer: bytes = b"identity", pieces: tuple[str, ...] = ("a", "b")) -> bytes:
    content = b"".join(
        field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", -rank)) for rank, piece in enumerate(pieces)
    )
    content += field(2, field(3, model_type) + _varint(35 << 3) + b"\x01")
    return content + field(3, field(1, normalizer) + field(4, 0))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (other_model(model_type=1), "not a BPE model"),
        (other_model(), "it has 2 pieces, not 64,789"),
        (other_model(normalizer=b"nmt_nfkc"), "it normalizes text"),
        (other_model(pieces=("b", "b", "b")), "control pieces"),
        (b"", "not a sentencepiece model"),
        (b"PK\x03\x04 something else", "not a sentencepiece model"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:e7dc4c39\nsize 1018370\n",
            "not a sentencepiece model",
        ),
    ],
)
def test_another_tokenizer_model_is_refused_with_the_reason(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=problem):
        build_tokenizer(path)


def test_a_tokenizer_model_cut_short_is_refused(tokenizer_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for size in (1, 1000, 1_018_000):
        path.write_bytes(tokenizer_model.read_bytes()[:size])
        with pytest.raises(ModelError):
            build_tokenizer(path)
