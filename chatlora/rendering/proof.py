"""The proof that an example teaches what inference will ask for: run on every row, in training too.

It works from the finished ids and labels, by other means than those that made them (decoding instead of offsets, the
untouched tokenizer, transformers' own `apply_chat_template`), so that a slip in the making is found here.
"""

import functools
from collections.abc import Sequence
from typing import Any

from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering.control_text import ControlText, is_masked, unmask
from chatlora.rendering.examples import IGNORE_INDEX
from chatlora.rendering.message_parts import end_of_parts, reply_parts
from chatlora.rendering.shared_prefix import shared_length
from chatlora.rendering.template import ChatTemplate
from chatlora.rendering.turns import Turn

FAILED = "the proof failed: "
SPANS = FAILED + "the targets are not one span a turn"
PROMPT = FAILED + "the ids before a target are not those of its prompt"
WHOLE = FAILED + "the ids are not those of the whole text"
REPLY = FAILED + "the targets do not decode to the reply"
STOP = FAILED + "the targets do not end with a stop token"
CONTROL = FAILED + "the control tokens are not the template's"
CANNOT_SPELL = "the tokenizer cannot spell the text"
BOS = FAILED + "more than one beginning-of-sequence token"

MOST_OF_STOP = 2  # ids that stop a reply and are not in its own rendering: space, and the next role's token or eos

Span = tuple[str, str, tuple[int, ...]]  # a prompt, what must be generated after it, and the messages that this is


class Proof:
    """What a proof needs of tokenizer and template; built once, used for every example."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, text: ControlText, stop_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.spellings = text.spellings
        self.stop_ids = frozenset(stop_ids)
        self.as_served = text.as_served
        self.bos_id: int | None = tokenizer.bos_token_id  # looked up once: transformers takes its time
        # transformers renders the date of today, whatever the date asked for.
        self.dated = "strftime_now" in template.text
        self._canonical_tails = functools.lru_cache(maxsize=1024)(self._canonical)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_canonical_tails"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._canonical_tails = functools.lru_cache(maxsize=1024)(self._canonical)

    def prove(
        self,
        ids: Sequence[int],
        labels: Sequence[int],
        conversation: Conversation,
        turns: Sequence[Turn],
        *,
        in_one_call: bool = True,
    ) -> None:
        """Raises SetAside where `ids` and `labels` are not the example of these turns of the conversation.

        Proved: each span of targets is one turn's; the ids in front of it are its prompt's; it decodes to what the
        template renders, ends with a stop token, and holds the message's text, reasoning and calls; control tokens
        stand where the template put them and nowhere else; there is at most one BOS. Where messages may spell control
        tokens, prompt and whole are transformers' ids: from one call of `apply_chat_template`, or of its text, in which
        the untouched tokenizer finds them (faster; one call for each row shows that this is the same).
        """
        spans = _spans(ids, labels)
        joined = _joined(turns)
        if len(spans) != len(joined):
            raise SetAside(SPANS, f"{len(spans)} for {len(joined)} of {len(turns)} turns")
        messages = conversation.as_template_input()
        masked = not self.as_served and (is_masked(turns[-1].prompt) or is_masked(turns[-1].reply))
        ask = functools.partial(self._inference_ids, messages, conversation.tools, joined[-1], in_one_call=in_one_call)
        led = masked or ask(prompt=True) == list(ids[: spans[-1][0]])
        done, seen = 0, 0
        for (start, end), (prompt, reply, indices) in zip(spans, joined, strict=True):
            if masked or not led or len(spans) > 1:
                self._prove_prompt(ids, done, start, prompt, seen)
            self._prove_reply(ids[start:end], [messages[index] for index in indices], reply)
            if ids[end - 1] not in self.stop_ids and not self._opens_next(ids[end - 1], indices[-1], messages):
                raise SetAside(STOP)
            done, seen = end, len(prompt) + len(reply)
        if self.bos_id is not None and list(ids[:2]) == [self.bos_id, self.bos_id]:
            raise SetAside(BOS)
        if not led:
            raise SetAside(PROMPT)
        start, end = spans[-1]
        if masked:
            self._prove_controls(ids[:end], turns[-1])
        elif self.as_served:
            self._prove_whole(ids[:end], start, ask(prompt=False))

    def _prove_prompt(self, ids: Sequence[int], done: int, start: int, prompt: str, seen: int) -> None:
        """ids[done:start] spell the rest of the prompt, and its last span is cut into tokens as alone."""
        if not self._same(self._spelled(ids[done:start]), unmask(prompt[seen:])):
            # Where the tokenizer loses characters (some know only most bytes), inference loses them too.
            if is_masked(prompt) or self._canonical(prompt) != tuple(ids[:start]):
                raise SetAside(PROMPT if self._can_spell(unmask(prompt)) else CANNOT_SPELL)
            return
        # Control tokens cut the text before any merge: only what follows the last one depends on where the text ends.
        last = next((index for index in range(start - 1, -1, -1) if ids[index] in self.spellings), 0)
        spelling = self.spellings.get(ids[last])
        position = 0 if spelling is None else prompt.rfind(spelling)
        tail = prompt[max(position, 0) :]
        if position < 0 or (not is_masked(tail) and self._canonical_tails(tail) != tuple(ids[last:start])):
            raise SetAside(PROMPT)

    def _prove_reply(self, targets: Sequence[int], messages: Sequence[dict[str, Any]], masked: str) -> None:
        spelled, reply = self._spelled(targets), unmask(masked)
        if not self._same(spelled, reply):
            raise SetAside(REPLY if self._can_spell(reply) else CANNOT_SPELL)
        for message in messages:
            end_of_parts(self._normalized(spelled), reply_parts(self._normalized(message)))

    def _opens_next(self, id: int, index: int, messages: Sequence[dict[str, Any]]) -> bool:
        """Whether a control token may be the role of the message after `messages[index]`: the GLM family's stop."""
        return id in self.spellings and index + 1 < len(messages)

    def _prove_controls(self, ids: Sequence[int], turn: Turn) -> None:
        """The control tokens are those that the untouched tokenizer finds where the messages' text is masked."""
        encoded = self.tokenizer.backend_tokenizer.encode(turn.prompt + turn.reply, add_special_tokens=False)
        # Text that no token spells becomes the unknown token, masked text more of it.
        controls = self.spellings.keys() - {self.tokenizer.unk_token_id}
        if [id for id in encoded.ids if id in controls] != [id for id in ids if id in controls]:
            raise SetAside(CONTROL)

    def _prove_whole(self, ids: Sequence[int], start: int, whole: Sequence[int]) -> None:
        """The ids are those of the whole text, up to what stops them, which may be none of the template's.

        But where a token straddles the end of the prompt: at inference it is the prompt's ids that count.
        """
        shared = min(len(ids), len(whole))
        if list(ids[:start]) == list(whole[:start]) and (
            list(ids[:shared]) != list(whole[:shared]) or len(ids) - shared > MOST_OF_STOP
        ):
            raise SetAside(WHOLE)

    def _inference_ids(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        span: Span,
        *,
        prompt: bool,
        in_one_call: bool,
    ) -> list[int]:
        """What transformers gives for the messages in front of the span (`prompt`), or to its end."""
        before, reply, indices = span
        # transformers takes no empty conversation, and has no generation prompt for what a tool says.
        if self.dated or indices[0] == 0 or messages[indices[0]]["role"] != "assistant":
            return list(self._canonical(before if prompt else before + reply))
        found: Any = self.tokenizer.apply_chat_template(
            messages[: indices[0] if prompt else indices[-1] + 1],
            tools=list(tools) or None,
            chat_template=self.template.text,
            add_generation_prompt=prompt,
            tokenize=in_one_call,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},  # it warns of lengths, which are ours to look at
            **self.template.kwargs,
        )
        return list(found) if in_one_call else list(self._canonical(found))

    # ---- decoding

    def _spelled(self, ids: Sequence[int]) -> str:
        """The text of the ids: control tokens by their names, what stands between them decoded."""
        decode = self.tokenizer.backend_tokenizer.decode
        pieces, begin = [], 0
        for index, id in enumerate(ids):
            if id in self.spellings:
                pieces += [decode(list(ids[begin:index]), skip_special_tokens=False), self.spellings[id]]
                begin = index + 1
        pieces.append(decode(list(ids[begin:]), skip_special_tokens=False))
        return "".join(pieces)

    def _can_spell(self, text: str) -> bool:
        return self._same(self._spelled(self._canonical(text)), text)

    def _same(self, decoded: str, text: str) -> bool:
        """Equal; or equal after the tokenizer's own normalisation and but for space beside control tokens.

        Some tokenizers put a space there and take it away, or swallow the template's. Where exactly a span begins
        is proved in ids.
        """
        return decoded == text or self._squeezed(decoded) == self._squeezed(text)

    def _squeezed(self, text: str) -> str:
        pieces, spellings = [text], sorted(set(self.spellings.values()), key=len, reverse=True)
        for spelling in spellings:
            if spelling in text:
                pieces = [part for piece in pieces for part in piece.split(spelling)]
        return "\0".join(self._normalized(piece).strip() for piece in pieces)

    def _normalized(self, value: Any) -> Any:
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is None:
            return value
        if isinstance(value, str):
            # Some put a space in front of any text; in front of a part of a text there is none.
            return normalizer.normalize_str(value).removeprefix(normalizer.normalize_str("x").removesuffix("x"))
        if isinstance(value, dict):
            return {key: self._normalized(item) for key, item in value.items()}
        return [self._normalized(item) for item in value] if isinstance(value, list) else value

    def _canonical(self, text: str) -> tuple[int, ...]:
        # Fast: without offsets.
        [encoding] = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoding.ids)


def _joined(turns: Sequence[Turn]) -> list[Span]:
    """The turns as they stand in the labels: those that follow each other without a gap are one span there."""
    joined: list[Span] = []
    for turn in turns:
        prompt, reply, indices = joined[-1] if joined else ("", "", ())
        if joined and turn.prompt == prompt + reply:
            joined[-1] = (prompt, reply + turn.reply, (*indices, turn.index))
        else:
            joined.append((turn.prompt, turn.reply, (turn.index,)))
    return joined


def _spans(ids: Sequence[int], labels: Sequence[int]) -> list[tuple[int, int]]:
    """The spans of targets, as (start, end). Raises SetAside where a label is not the id beneath it."""
    ignored, ends = [IGNORE_INDEX] * len(labels), [*labels, IGNORE_INDEX]
    spans, end = [], 0
    while (start := end + shared_length(labels[end:], ignored)) < len(labels):
        end = ends.index(IGNORE_INDEX, start)
        spans.append((start, end))
    if len(ids) != len(labels) or any(list(ids[start:end]) != ends[start:end] for start, end in spans):
        raise SetAside(SPANS, "a label is not its id")
    return spans
