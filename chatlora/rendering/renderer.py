"""Conversation + tokenizer -> the token ids that train or test a model, each row proved.

    text      control_text.py   text that spells a control token is masked; ids and where each begins
    taken     taken.py          what a row says, as the template takes it: thoughts (thoughts.py), arguments
    template  template.py       the chat template: messages -> text
    turns     turns.py          the span of text that each reply is
    parts     message_parts.py  is all of the message in it?
    context   context.py        is all that leads to it in its prompt?
    changes   template_edits.py what else the template made of the reply
    ids       drafts.py         one encoding, spans from offsets; what texts share once (shared_prefix.py)
    lengths   examples.py       what an example is, and what over_length leaves of it
    proof     proof.py          of every example, by other means
    rows      row_kwargs.py     what a row alone tells the template
    bounds    limits.py         on time and memory of it all

Most templates give one example a conversation. A template that renders a reply otherwise once more messages follow
(Qwen3 drops earlier thoughts), or a token that straddles the end of a prompt, gives that turn an example of its own.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from time import perf_counter
from typing import Any, Self

from chatlora.config import ControlWords, OverLength, Reasoning, Supervise
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering.context import Contexts
from chatlora.rendering.control_text import ControlText
from chatlora.rendering.drafts import draft_alone, drafts_of
from chatlora.rendering.examples import (
    IGNORE_INDEX,
    Draft,
    EvalExample,
    Example,
    Rendered,
    RenderedForEvaluation,
    fitted,
    prompts_within,
    refuse_hopeless,
)
from chatlora.rendering.limits import PROBE, bounded, bounds_for
from chatlora.rendering.proof import Proof
from chatlora.rendering.remarks import remarks_on
from chatlora.rendering.row_kwargs import RowKwargs, Under
from chatlora.rendering.shared_prefix import RowEncoder
from chatlora.rendering.taken import Taking, masked_messages
from chatlora.rendering.template import ChatTemplate, chat_template_of
from chatlora.rendering.template_edits import with_template_edits
from chatlora.rendering.turns import (
    NO_TARGET,
    SPELLS_STOP,
    StopTokens,
    Turn,
    check_context,
    greeting,
    greeting_named,
    opens,
    read_tool_message,
    read_turn,
    targets,
)

__all__ = [
    "IGNORE_INDEX",
    "EvalExample",
    "Example",
    "Rendered",
    "RenderedForEvaluation",
    "Renderer",
]


class Renderer:
    """A tokenizer and a chat template, made ready once for every conversation. Picklable.

    `chat_template` overrides the tokenizer's own; `chat_template_kwargs` are used as given (see
    `template.resolve_template_kwargs` for the default of `enable_thinking`); templates see the date
    `chat_template_date` (today unless given); `generation_stop_ids` are the eos ids of the model's generation config;
    `reasoning` and `control_text` are the settings of `data`; `text` is the tokenizer's ControlText, where there is
    one already.
    Raises ModelError where there is no template, or no fast tokenizer.
    """

    stop_ids: tuple[int, ...]
    """Every id that ends a reply: the tokenizer's eos, `generation_stop_ids`, and what the template shows."""
    taking: Taking
    """What the template takes of a conversation, and how."""
    proof_seconds: float
    """Seconds spent in proofs so far."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template_date: date | None = None,
        generation_stop_ids: Sequence[int] = (),
        reasoning: Reasoning = "auto",
        control_text: ControlWords = "text",
        text: ControlText | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template_of(tokenizer, chat_template)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._template = ChatTemplate(
            self.chat_template,
            self.chat_template_kwargs,
            chat_template_date or date.today(),
            dict(tokenizer.special_tokens_map),
        )
        self._text = text or ControlText(tokenizer, control_text)
        self._generation_stop_ids = tuple(generation_stop_ids)
        self._reasoning, self._control_text = reasoning, control_text
        with bounded(PROBE):
            self.taking = Taking(self._template, reasoning, control_text, self._text.spellings.values())
            self._stops = StopTokens(self._template, self._text.spellings, tokenizer.eos_token_id, generation_stop_ids)
        self.stop_ids = self._stops.ids
        self._proof = Proof(tokenizer, self._template, self._text, self.stop_ids)
        self._row_kwargs = RowKwargs(tokenizer, self._text, generation_stop_ids)
        self._contexts = Contexts()
        self.proof_seconds = 0.0
        described = [self._text.digest, self._template.digest(), str(self.stop_ids), self.taking.thoughts]
        self.fingerprint = hashlib.sha256("\n".join(described).encode()).hexdigest()

    def render(
        self,
        conversation: Conversation,
        *,
        max_length: int,
        over_length: OverLength = "fit",
        supervise: Supervise = "all",
    ) -> Rendered:
        """The conversation's training examples, proved, none longer than `max_length` tokens.

        `over_length`: `fit` keeps as many whole turns from the start as fit; `cut` cuts at `max_length`; `drop` sets
        the row aside; `error` raises DataError with place, length and remedy. Raises SetAside where the row cannot be
        rendered exactly or holds no target.
        """
        with bounded(bounds_for(conversation), conversation.place), greeting_named(conversation):
            taken = self.taking.taken(conversation)
            asked = self._targets(taken.conversation, supervise)
            refuse_hopeless(taken.conversation, asked, max_length, over_length)
            full, turns = self._turns(taken.conversation, asked)
            drafts = drafts_of(self._text, full, turns, len(taken.conversation.messages))
            for draft in drafts:
                self._prove(draft.example(), taken.conversation, draft.turns, in_one_call=draft is drafts[-1])
        kept, missed = fitted(drafts, max_length, over_length, conversation.place)
        learned = [turn for draft in kept for turn in draft.turns]
        num_turns = sum(len(draft.spans) for draft in kept)
        return Rendered(
            examples=tuple(draft.example() for draft in kept if draft.spans),
            turns=num_turns,
            lost_turns=len(turns) - num_turns,
            lost_targets=sum(draft.num_targets() for draft in drafts) - sum(draft.num_targets() for draft in kept),
            too_long=missed,
            altered=Counter(kind for turn in learned for kind in turn.altered) + Counter(taken.changes),
            remarks=remarks_on(taken.conversation, self._text, full, learned),
        )

    def render_for_evaluation(
        self,
        conversation: Conversation,
        *,
        max_prompt_length: int | None,
        max_new_tokens: int,
        over_length: OverLength = "fit",
        supervise: Supervise = "all",
    ) -> RenderedForEvaluation:
        """One sample for each assistant turn that is a target, rendered as the last message and proved.

        A prompt is never cut, whatever `over_length` says: half a question has no reference answer. One longer than
        `max_prompt_length` (None: no limit) is set aside by name, or raises DataError under `error`. References are
        whole, but for `cut`, which cuts them at `max_new_tokens` and counts. Raises SetAside as `render` does.
        """
        with bounded(bounds_for(conversation), conversation.place), greeting_named(conversation):
            taken = self.taking.taken(conversation)
            drafts = self._drafts_for_evaluation(taken.conversation, supervise)
        order = [index for index, message in enumerate(taken.conversation.messages) if message.role == "assistant"]
        kept, set_aside = prompts_within(drafts, order, max_prompt_length, over_length, conversation.place)
        most = max_new_tokens if over_length == "cut" else None
        answered, altered = [turn for draft in kept for turn in draft.turns], Counter(taken.changes)
        altered.update(kind for turn in answered for kind in turn.altered)
        return RenderedForEvaluation(
            examples=tuple(draft.sample(order.index(draft.turns[0].index), most) for draft in kept),
            set_aside=set_aside,
            cut_references=sum(draft.num_targets() > max_new_tokens for draft in kept) if over_length == "cut" else 0,
            altered=altered,
            remarks=remarks_on(taken.conversation, self._text, drafts[-1].turns[0].prompt, answered),
        )

    def prompt_ids(self, conversation: Conversation, *, checked: bool = False) -> list[int]:
        """The ids of the whole conversation and the generation prompt after it.

        checked: raises SetAside, as `render_for_evaluation` does, where the template drops something of it.
        """
        with bounded(bounds_for(conversation)):
            messages, tools = self._masked(self.taking.taken(conversation).conversation)
            template = self._at(conversation).template
            prompt = template.render(messages, tools, prompt=True)
            if checked:
                check_context(template, self._contexts, messages, tools, Turn(len(messages), prompt, ""))
            return self._text.encode(prompt).ids

    def turns(self, conversation: Conversation, supervise: Supervise = "all") -> list[Turn]:
        """The supervised turns as text. Raises SetAside as `render` does."""
        taken = self.taking.taken(conversation).conversation
        return self._turns(taken, self._targets(taken, supervise))[1]

    def prove(self, example: Example, conversation: Conversation, turns: Sequence[Turn]) -> None:
        """Raises SetAside unless `example` is exactly that of these turns; see `proof.Proof.prove`."""
        self._prove(example, self.taking.taken(conversation).conversation, turns)

    def under(self, template: str) -> Self:
        """A renderer of the same tokenizer, told the same, with another template."""
        return type(self)(
            self.tokenizer,
            chat_template=template,
            chat_template_kwargs=self.chat_template_kwargs,
            chat_template_date=self._template.date,
            generation_stop_ids=self._generation_stop_ids,
            reasoning=self._reasoning,
            control_text=self._control_text,
            text=self._text,
        )

    # ---- of a conversation as the template takes it

    def _prove(
        self, example: Example, conversation: Conversation, turns: Sequence[Turn], *, in_one_call: bool = True
    ) -> None:
        began, proof = perf_counter(), self._at(conversation).proof
        try:
            proof.prove(example.input_ids, example.labels, conversation, turns, in_one_call=in_one_call)
        finally:
            self.proof_seconds += perf_counter() - began

    def _at(self, conversation: Conversation) -> Under:
        """The template, as this row has it."""
        if not conversation.template_kwargs:
            return Under(self._template, self._stops, self._proof)
        return self._row_kwargs.under(self._template, conversation.template_kwargs, self.stop_ids)

    def _masked(self, conversation: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        mask = self._text.mask
        return masked_messages(conversation, mask, self._text.spellings.values()), mask(conversation.tools)

    def _turns(self, conversation: Conversation, indices: Sequence[int]) -> tuple[str, list[Turn]]:
        messages, tools = self._masked(conversation)
        (template, stops, _), spellings = self._at(conversation), self._text.spellings.values()
        full = template.render(messages, tools, prompt=False)
        turns = []
        for index in indices:
            read = read_turn if conversation.messages[index].role == "assistant" else read_tool_message
            self._refuse_stop(messages[index])
            turn = read(template, stops, messages, tools, index, full)
            turns.append(with_template_edits(turn, template, messages, tools, spellings))
        for turn in (turns[0], turns[-1]) if len(turns) > 1 else turns:
            check_context(template, self._contexts, messages, tools, turn)
        return full, turns

    def _drafts_for_evaluation(self, conversation: Conversation, supervise: Supervise) -> list[Draft]:
        """One for each assistant turn that is a target, rendered as the last message and proved."""
        messages, tools = self._masked(conversation)
        (template, stops, _), spellings = self._at(conversation), self._text.spellings.values()
        drafts, encoder, asked = [], RowEncoder(self._text), self._assistant_targets(conversation, supervise)
        for index in asked:
            self._refuse_stop(messages[index])
            turn = read_turn(template, stops, messages[: index + 1], tools, index, None)
            check_context(template, self._contexts, messages, tools, turn)
            turn = with_template_edits(turn, template, messages, tools, spellings)
            drafts.append(draft_alone(self._text, encoder, turn))
            self._prove(drafts[-1].example(), conversation, [turn], in_one_call=index == asked[-1])
        return drafts

    def _refuse_stop(self, message: Mapping[str, Any]) -> None:
        """As served, a message may spell what ends it. Masked text spells nothing."""
        if self._text.as_served and self._stops.end_after(json.dumps(message, ensure_ascii=False), 0) is not None:
            raise SetAside(SPELLS_STOP)

    def _targets(self, conversation: Conversation, supervise: Supervise) -> list[int]:
        """A template may lead to what the assistant says first, or not."""
        opened = False
        if greeting(conversation):
            first, tools = self._masked(conversation.with_messages(conversation.messages[:1]))
            opened = opens(self._at(conversation).template, first, tools)
        return targets(conversation, supervise, opened=opened)

    def _assistant_targets(self, conversation: Conversation, supervise: Supervise) -> list[int]:
        """Those that a model answers: what a tool said may be learned, but is asked of no model."""
        chosen = self._targets(conversation, supervise)
        answers = [index for index in chosen if conversation.messages[index].role == "assistant"]
        if not answers:
            raise SetAside(NO_TARGET)
        return answers
