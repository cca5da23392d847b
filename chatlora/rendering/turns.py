"""Which span of a rendered conversation each turn to be learned is. Text only: nothing is tokenised here.

A turn's prompt is what the template renders for the messages before it with the generation prompt; its reply is what
the template renders after that, up to the token that stops generation. Both hold masked text (control_text.py).
A tool's message is learned only where it says `loss: true`: no generation prompt leads to it, so its span begins
where its text does (or, where its role's token is what stops the turn before, right behind that token).
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation
from chatlora.rendering.context import Contexts
from chatlora.rendering.control_text import any_of
from chatlora.rendering.message_parts import DROPS, SENTINEL, Sentinels, check_prompt, end_of_parts, reply_parts
from chatlora.rendering.template import RAISES, ChatTemplate

NOT_CONTINUED = "the chat template's reply does not continue its generation prompt"
COMES_FIRST = "an assistant message that is a target comes first: no prompt leads to it"
RAISES_FIRST = f"{RAISES} where the assistant speaks first"
NO_STOP = "nothing stops a reply: the chat template renders no stop token and the tokenizer has no eos"
RUNS_ON = "nothing stops a tool's message that is to be learned before the next message begins"
SPELLS_STOP = "a reply spells a token that would stop it"
NO_TARGET = "no assistant message is a target"

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Turn:
    """The message's index, the text in front of the model, and the text that it must generate, stop token included.

    altered: how the reply differs from the message without losing any of it (template_edits.py).
    """

    index: int
    prompt: str
    reply: str
    altered: tuple[str, ...] = ()


class StopTokens:
    """The tokens that end a reply: the tokenizer's eos, the model's, and what the template shows after an answer."""

    def __init__(self, template: ChatTemplate, spellings: dict[int, str], eos_id: int | None, more: Sequence[int]):
        self.eos = spellings.get(eos_id) if eos_id is not None else None
        given = [*([] if eos_id is None else [eos_id]), *more]
        shown = _Probe(template, spellings, {spellings[id] for id in given if id in spellings}).stops()
        numbers = {spelling: id for id, spelling in spellings.items()}
        self.ids = tuple(dict.fromkeys([*given, *(numbers[spelling] for spelling in shown)]))
        self._any = any_of([spellings[id] for id in self.ids if id in spellings])
        self._control = any_of(spellings.values())

    def end_after(self, text: str, start: int) -> int | None:
        """Where the first stop token at or after `start` ends."""
        found = self._any.search(text, start)
        return found.end() if found else None

    def end_of_opening(self, text: str, start: int) -> int | None:
        """Where the control token ends that, but for whitespace, stands at `start`: in the GLM family, the next role's.

        Whichever role that is: after a reply the model must generate it, also where inference does not stop at it.
        """
        start += len(text[start:]) - len(text[start:].lstrip())
        found = self._control.match(text, start)
        return found.end() if found else None

    def end_of_role(self, text: str) -> int | None:
        """Where the last control token of `text` ends, if it is a stop token: the role's own, in the GLM family."""
        found = list(self._control.finditer(text))
        return found[-1].end() if found and self._any.fullmatch(found[-1][0]) else None


def greeting(conversation: Conversation) -> int:
    """With how many messages the assistant opens the conversation; none where nobody else says anything."""
    others = (index for index, message in enumerate(conversation.messages) if message.role != "assistant")
    return next(others, 0)


def opens(template: ChatTemplate, first: Messages, tools: Messages) -> bool:
    """Whether a prompt leads to a first message: the template opens every conversation with something of its own."""
    try:
        return template.render(first, tools, prompt=False).startswith(_prompt(template, (), tools))
    except SetAside:
        return False


def targets(conversation: Conversation, supervise: str, *, opened: bool) -> list[int]:
    """The indices of the messages to learn: the assistant's, and a tool's that says so. Raises SetAside if none.

    opened: whether a prompt leads to what the assistant says first; else that is learned only where it says so.
    """
    assistant = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    unled = set() if opened else set(range(greeting(conversation)))
    by_default = set(assistant if supervise == "all" else assistant[-1:]) - unled
    chosen = []
    for index, message in enumerate(conversation.messages):
        asked = message.loss and message.role in ("assistant", "tool")
        if asked or (message.loss is None and index in by_default):
            chosen.append(index)
    if not chosen:
        raise SetAside(NO_TARGET)
    return chosen


def read_turn(
    template: ChatTemplate, stops: StopTokens, messages: Messages, tools: Messages, index: int, full: str | None
) -> Turn:
    """The turn of `messages[index]`; `full` is the rendering of all messages, None where the turn is to be the last.

    Raises SetAside where the reply does not continue the prompt or lacks part of the message.
    """
    prompt = _prompt(template, messages[:index], tools)
    last = index + 1 == len(messages)
    rendered = full if full is not None and last else template.render(messages[: index + 1], tools, prompt=False)
    if not rendered.startswith(prompt):
        raise SetAside(NOT_CONTINUED if index else COMES_FIRST, _options_tried(template, messages, tools, index))
    region = rendered[len(prompt) :]
    message = messages[index]
    after = end_of_parts(region, reply_parts(message))
    if "tool_calls" in message or "reasoning_content" in message:
        _check_sentinels(template, messages, tools, index, prompt)

    end = stops.end_after(region, after)
    if end is not None:
        return Turn(index, prompt, region[:end])
    if full is not None and not last and full.startswith(rendered):
        end = stops.end_of_opening(full, len(rendered))
        if end is not None:
            return Turn(index, prompt, full[len(prompt) : end])
    if stops.eos is None:
        raise SetAside(NO_STOP)
    return Turn(index, prompt, region + stops.eos)


def read_tool_message(
    template: ChatTemplate, stops: StopTokens, messages: Messages, tools: Messages, index: int, full: str
) -> Turn:
    """The turn of `messages[index]`, a tool's; `full` is the rendering of all messages.

    Raises SetAside where the template does not show the message as one span of text.
    """
    stand_in = {**messages[index], "content": SENTINEL}
    shown = template.render([*messages[:index], stand_in, *messages[index + 1 :]], tools, prompt=False)
    before, found, after = shown.partition(SENTINEL)
    led = before.rstrip()  # a template may put a space before text only
    if not found or not full.startswith(led) or not full.endswith(after) or len(led) + len(after) > len(full):
        raise SetAside(f"{DROPS}a {messages[index]['role']} message")
    role_end, text_end = stops.end_of_role(before), len(full) - len(after)
    start = min(len(before), text_end) if role_end is None else role_end
    end = stops.end_after(full, text_end) if role_end is None else stops.end_of_opening(full, text_end)
    if end is None and index + 1 < len(messages):
        raise SetAside(NO_STOP)
    if end is not None and end > _beginning(template, messages, tools, index + 1):
        raise SetAside(RUNS_ON)
    if end is not None:
        return Turn(index, full[:start], full[start:end])
    if stops.eos is None:
        raise SetAside(NO_STOP)
    return Turn(index, full[:start], full[start:] + stops.eos)


def _beginning(template: ChatTemplate, messages: Messages, tools: Messages, index: int) -> float:
    """Where the text of `messages[index]` begins in the rendering of all; infinity where there is no such message."""
    if index == len(messages):
        return math.inf
    told = {key: value for key, value in messages[index].items() if key not in ("reasoning_content", "thinking")}
    shown = [*messages[:index], {**told, "content": SENTINEL}, *messages[index + 1 :]]
    before, found, _ = template.render(shown, tools, prompt=False).partition(SENTINEL)
    return len(before) if found else math.inf


@contextmanager
def greeting_named(conversation: Conversation) -> Iterator[None]:
    """Where the template raises an error, the reason says so if the assistant speaks first: not all let it."""
    try:
        yield
    except SetAside as error:
        if error.reason != RAISES or not greeting(conversation):
            raise
        raise SetAside(RAISES_FIRST, error.detail) from error


def check_context(template: ChatTemplate, contexts: Contexts, messages: Messages, tools: Messages, turn: Turn) -> None:
    """What leads to the turn stands in its prompt. Raises SetAside naming what the template dropped."""
    check_prompt(turn.prompt, messages[: turn.index], tools)
    contexts.check(template, messages[: turn.index], tools)
    if tools:
        sentinels = Sentinels()
        prompt = template.render(messages[: turn.index], sentinels.tools(tools), prompt=True)
        end_of_parts(prompt, iter(sentinels.parts))


def _prompt(template: ChatTemplate, before: Messages, tools: Messages) -> str:
    """What leads to a reply: before a first message, only what the template opens every conversation with."""
    try:
        if before or template.render(before, tools, prompt=False):
            return template.render(before, tools, prompt=True)
    except SetAside as error:
        raise error if before else SetAside(COMES_FIRST) from error
    raise SetAside(COMES_FIRST)


def _check_sentinels(template: ChatTemplate, messages: Messages, tools: Messages, index: int, prompt: str) -> None:
    sentinels = Sentinels()
    stand_in = sentinels.message(messages[index])
    rendered = template.render([*messages[:index], stand_in], tools, prompt=False)
    if not rendered.startswith(prompt):
        raise SetAside(NOT_CONTINUED)
    end_of_parts(rendered[len(prompt) :], iter(sentinels.parts))


def _options_tried(template: ChatTemplate, messages: Messages, tools: Messages, index: int) -> str:
    """Which `enable_thinking` would make the reply continue its prompt, for the person who reads why it was refused."""
    told = f"under chat_template_kwargs {dict(template.kwargs)}"
    if not template.knows("enable_thinking"):
        return told
    for value in (False, True):
        other = replace(template, kwargs={**template.kwargs, "enable_thinking": value})
        if _continues(other, messages, tools, index):
            return f"{told}; with enable_thinking: {str(value).lower()} it does"
    return f"{told}; with enable_thinking: false or true neither"


def _continues(template: ChatTemplate, messages: Messages, tools: Messages, index: int) -> bool:
    try:
        prompt = template.render(messages[:index], tools, prompt=True)
        return template.render(messages[: index + 1], tools, prompt=False).startswith(prompt)
    except SetAside:
        return False


class _Probe:
    """Renders made-up conversations to see which control token follows an answer."""

    ANSWER, CALLED = "w918273w", "w918274w"

    def __init__(self, template: ChatTemplate, spellings: dict[int, str], known: set[str]) -> None:
        self.template = template
        self.known = known
        self.run = re.compile("(?:" + any_of(spellings.values()).pattern + ")+")
        self.word = any_of(spellings.values())

    def stops(self) -> list[str]:
        question = {"role": "user", "content": "Hello"}
        answer = {"role": "assistant", "content": self.ANSWER}
        arguments: Any = {"at": self.CALLED}
        if self.template.takes_arguments_as_text():
            arguments = json.dumps(arguments)
        function = {"name": "look", "arguments": arguments}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        result = {"role": "tool", "name": "look", "content": "nothing"}

        tail = self._after(self.ANSWER, [question, answer])
        run = self.run.search(tail)
        found = []
        if run is not None:
            found.append(self._of_run(run[0]))
        else:
            found.append(self._opening(self._after(self.ANSWER, [question, answer, question])))
        tail = self._after(self.CALLED, [question, call])
        if not any(stop in tail for stop in self.known.union(filter(None, found))):
            words = list(self.word.finditer(tail.rstrip()))
            if run is not None and words and words[-1].end() == len(tail.rstrip()):
                found.append(words[-1][0])
            elif run is None:
                found.append(self._opening(self._between_messages(question, call, result)))
        return [stop for stop in found if stop]

    def _of_run(self, run: str) -> str | None:
        """Of control tokens that follow the answer without a gap, a known stop, else the last."""
        words = self.word.findall(run)
        return None if self.known.intersection(words) else words[-1]

    def _opening(self, tail: str) -> str | None:
        found = self.word.match(tail.lstrip())
        return found[0] if found else None

    def _after(self, words: str, messages: Messages) -> str:
        try:
            _, found, after = self.template.render(messages, (), prompt=False).rpartition(words)
        except SetAside:  # the template wants something else of a conversation; rows will tell
            return ""
        return after if found else ""

    def _between_messages(self, question: Any, call: Any, result: Any) -> str:
        """What follows the call when the tool's answer comes next."""
        try:
            alone = self.template.render([question, call], (), prompt=False)
            answered = self.template.render([question, call, result], (), prompt=False)
        except SetAside:
            return ""
        return answered[len(alone) :] if self.CALLED in alone and answered.startswith(alone) else ""
