"""ChatGLM3's tokenizer as a plain `tokenizer.json`, with a chat template that gives the original's ids.

The original encoded a message as `[role] + sp(metadata + "\\n") + sp(content)`, each part by itself, so that a space
stands before the content: `<|user|>\\n Hello`. The template writes that space. No piece of the vocabulary contains a
line break, so one encoding of the whole gives the same ids as the parts.

How the control tokens are added, and why:
- `[gMASK]`, `sop` and the roles are control tokens in text, since the template spells them. `sop` only as a word of
  its own, or every "philosophy" would hold one.
- `[MASK]`, `[sMASK]` and `eop` have their ids and names, and no text spells them: as in the original, and "people"
  stays whole.
- `</s>`, `<s>` and `<unk>` decode to nothing, as in the original, whose metrics count every word of the decoded text.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from chatlora.chatglm3.sentencepiece import BPE as BPE_MODEL
from chatlora.chatglm3.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceModel, read_sentencepiece
from chatlora.errors import ModelError

NUM_PIECES = 64_789
UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2
PAD_ID = UNKNOWN_ID
SILENT_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
CONTROL_TOKENS = {
    "[MASK]": 64_789,
    "[gMASK]": 64_790,
    "[sMASK]": 64_791,
    "sop": 64_792,
    "eop": 64_793,
    "<|system|>": 64_794,
    "<|user|>": 64_795,
    "<|assistant|>": 64_796,
    "<|observation|>": 64_797,
}
VOCABULARY = NUM_PIECES + len(CONTROL_TOKENS)
UNSPELLABLE = ("[MASK]", "[sMASK]", "eop")
STOP_IDS = (EOS_ID, CONTROL_TOKENS["<|user|>"], CONTROL_TOKENS["<|observation|>"])
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def build_tokenizer(path: Path) -> Tokenizer:
    """The fast tokenizer of a ChatGLM3 `tokenizer.model`. Raises ModelError where the file is another model's."""
    model = read_sentencepiece(path)
    problems = _unlike_chatglm3(model)
    if problems:
        raise ModelError(*(f"{path}: is not ChatGLM3's tokenizer: {problem}" for problem in problems))
    vocabulary = {piece.text: id for id, piece in enumerate(model.pieces)}
    merges = _merges(model, vocabulary)
    vocabulary.update(CONTROL_TOKENS)  # longer than one character and made by no merge: text cannot reach them
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^(<unk>|<s>|</s>)$"), ""),
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    spelled = [name for name in (*SILENT_TOKENS, *CONTROL_TOKENS) if name not in UNSPELLABLE]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, single_word=name == "sop") for name in spelled])
    tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] sop $A",
        pair="[gMASK] sop $A $B </s>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "sop", "</s>")],
    )
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def tokenizer_files(path: Path, max_length: int) -> dict[str, str]:
    """The files of a native tokenizer folder, name -> content, from a `tokenizer.model`. max_length: tokens."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": build_tokenizer(path).to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE.read_text(encoding="utf-8"),
    }


def _unlike_chatglm3(model: SentencePieceModel) -> list[str]:
    problems = []
    if len(model.pieces) != NUM_PIECES:
        problems.append(f"it has {len(model.pieces):,} pieces, not {NUM_PIECES:,}")
    if model.model_type != BPE_MODEL or not model.byte_fallback:
        problems.append("it is not a BPE model with byte fallback")
    if model.normalizer != "identity" or not model.add_dummy_prefix or not model.escape_whitespaces:
        problems.append(f"it normalizes text ({model.normalizer or 'unnamed'}) where ChatGLM3 only puts a space first")
    if model.remove_extra_whitespaces:
        problems.append("it removes spaces")
    kinds = [piece.kind for piece in model.pieces]
    if kinds[:3] != [UNKNOWN, CONTROL, CONTROL] or not set(kinds[3:]) <= {NORMAL, BYTE}:
        problems.append("its control pieces are not <unk>, <s> and </s> alone")
    scores = [piece.score for piece in model.pieces if piece.kind == NORMAL]
    if any(score <= following for score, following in itertools.pairwise(scores)):
        problems.append("its pieces do not stand in the order in which they are merged")
    return problems


def _merges(model: SentencePieceModel, vocabulary: dict[str, int]) -> Sequence[tuple[str, str]]:
    """All pairs of pieces that make a piece, first those of the piece that sentencepiece merges first."""
    mergeable = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in model.pieces
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in mergeable and piece.text[cut:] in mergeable
    ]
