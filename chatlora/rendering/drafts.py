"""Turns as text -> examples as ids: one encoding, the spans of targets from its offsets."""

from bisect import bisect_left
from collections.abc import Sequence

from chatlora.rendering.control_text import ControlText, Encoded
from chatlora.rendering.examples import Draft
from chatlora.rendering.shared_prefix import RowEncoder
from chatlora.rendering.turns import Turn


def drafts_of(text: ControlText, full: str, turns: Sequence[Turn], num_messages: int) -> list[Draft]:
    """One example of all turns that the full rendering holds as they are, then one for each other turn."""
    last = turns[-1]
    if last.index + 1 == num_messages and (last.prompt + last.reply).startswith(full):
        full = last.prompt + last.reply  # a stop token was appended
    encoder = RowEncoder(text)
    encoded = encoder.encode(full)
    shared, alone = Draft(encoded.ids, [], []), []
    for turn in turns:
        inside = full.startswith(turn.prompt) and full.startswith(turn.reply, len(turn.prompt))
        span = _span(text, encoded, turn) if inside else None
        if span is None:
            alone.append(draft_alone(text, encoder, turn))
        else:
            shared.spans.append(span)
            shared.turns.append(turn)
    drafts = [shared, *alone] if shared.turns else alone
    return sorted(drafts, key=lambda draft: draft.turns[0].index)


def draft_alone(text: ControlText, encoder: RowEncoder, turn: Turn) -> Draft:
    """The example of one turn. encoder: of its row."""
    encoded = encoder.encode(turn.prompt + turn.reply)
    span = _span(text, encoded, turn)
    if span is not None:
        return Draft(encoded.ids, [span], [turn])
    # A token straddles the end of the prompt: its ids win, since they are what inference will see.
    prompt, reply = encoder.encode(turn.prompt).ids, text.encode_after_control(turn.reply)
    return Draft(prompt + reply, [(len(prompt), len(prompt) + len(reply))], [turn])


def _span(text: ControlText, encoded: Encoded, turn: Turn) -> tuple[int, int] | None:
    """Where the turn's reply stands in the ids; None where its prompt, encoded alone, ends in other ids."""
    boundary = len(turn.prompt)
    start = bisect_left(encoded.starts, boundary)
    end = bisect_left(encoded.starts, boundary + len(turn.reply))
    # Control tokens cut the text before any merge: the ids up to the last one are the same in any case.
    before = bisect_left(encoded.controls, start)
    anchor = encoded.controls[before - 1] if before else 0
    tail = text.encode_tail(turn.prompt[encoded.starts[anchor] :])
    return (start, end) if encoded.ids[anchor:start] == tail else None
