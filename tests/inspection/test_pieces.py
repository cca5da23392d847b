"""A row is shown as the model sees it, and nothing that stands in a row acts on the terminal."""

import io

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatlora.inspection.pieces import Piece, decoded, marked, pieces, spans
from chatlora.reading.formats import parse_row
from chatlora.rendering.examples import IGNORE_INDEX, Example
from chatlora.rendering.single import render
from tests.tiny_tokenizers import tiny_tokenizer

TURNS = [("user", "门票多少钱？ é"), ("assistant", "  60元 [bold]x[/]"), ("user", "🙂"), ("assistant", "")]
ROW = {"messages": [{"role": role, "content": content} for role, content in TURNS]}


def metaspace() -> PreTrainedTokenizerFast:
    """Words that carry the space in front of them, which this decoder leaves out at a text's beginning."""
    words = ["▁Where", "▁is", "▁Oslo", "▁In", "▁Norway", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_pieces_are_the_whole_text_and_the_targets_are_the_replies() -> None:
    tokenizer = tiny_tokenizer()
    (example,) = render(parse_row(ROW), tokenizer, max_length=512)
    shown = pieces(tokenizer, example)
    assert "".join(piece.text for piece in shown) == tokenizer.decode(example.input_ids)
    assert [piece.text for piece in shown if piece.is_target] == ["  60元 [bold]x[/]<|im_end|>", "<|im_end|>"]


def test_a_decoder_that_trims_beginnings_loses_nothing_between_pieces() -> None:
    tokenizer = metaspace()
    example = Example([0, 1, 2, 3, 4], [IGNORE_INDEX] * 3 + [3, 4])
    assert pieces(tokenizer, example) == [Piece("Where is Oslo", False), Piece(" In Norway", True)]
    assert tokenizer.decode([3, 4]) != " In Norway"  # each piece decoded alone would show another text


def test_a_character_cut_in_two_is_shown_once() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("好")
    assert len(ids) == 3
    assert decoded(tokenizer, ids, 0, 2) + decoded(tokenizer, ids, 2, 3) in ("\ufffd好", "\ufffd\ufffd好")


def test_the_first_token_is_no_target() -> None:
    assert list(spans([5, 6, IGNORE_INDEX, 7])) == [(0, 1, False), (1, 2, True), (2, 3, False), (3, 4, True)]
    assert list(spans([])) == []


HOSTILE = "a\x1b[31m\x1b]0;title\x07\r\u202eevil\u2066\u200b\x9b2J [bold]b[/bold] \ud800 ⟦c⟧\u2028d\n\te"


@pytest.mark.parametrize("colours", [False, True])
def test_what_a_text_holds_never_acts_on_the_terminal(colours: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=colours, color_system="standard" if colours else None, width=400)
    console.print(marked([Piece("context ", False), Piece(HOSTILE, True)], colours=colours), soft_wrap=True)
    shown = stream.getvalue()
    for spelled in (r"\x1b[31m", r"\x1b]0;title\x07\r\u202eevil\u2066\u200b\x9b2J", "[bold]b[/bold]", "?", r"\u2028d"):
        assert spelled in shown
    ours = {"\x1b", "\n"} if colours else {"\n"}
    assert {character for character in shown if not character.isprintable()} <= ours | {"\t"}
    if not colours:
        assert shown.startswith(r"context ⟦a\x1b[31m")
        assert r"\u27e6c\u27e7" in shown
        assert shown.count("⟦") == 1


def test_joiners_of_emoji_stay_as_they_are() -> None:
    assert marked([Piece("👩\u200d💻", False)], colours=True).plain == "👩\u200d💻"
