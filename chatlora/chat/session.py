"""A conversation: messages and commands in, answers out."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from chatlora.chat.answers import Answer, Answering
from chatlora.chat.screens import Screen
from chatlora.chat.talk import Fitted, Talk, fitted, save
from chatlora.errors import ChatError, did_you_mean
from chatlora.evaluation.command_line import ADAPTER, BASE
from chatlora.reading.conversation import Message

BOTH = "base and adapter answer each message; the talk goes on from the adapter's answer"
ESCAPED = "//"  # how a message begins that begins with a slash


class Session:
    def __init__(self, answering: Answering, screen: Screen, system: str | None, *, can_interrupt: bool) -> None:
        """can_interrupt: Ctrl-C ends an answer, not the chat."""
        self.answering, self.screen, self.can_interrupt = answering, screen, can_interrupt
        self.talk = Talk(system)
        self.names = answering.names[-1:]  # who answers; the talk goes on from the last one's

    def take(self, text: str, *, is_message: bool = False) -> bool:
        """One message, or a command unless `is_message`. False: that was the last. Raises ChatError."""
        if not is_message and text.startswith("/") and not text.startswith(ESCAPED):
            return self._command(text)
        self._ask(text if is_message or not text.startswith(ESCAPED) else text[1:])
        return True

    def _ask(self, text: str) -> None:
        question = self.talk.with_message(Message("user", text))
        found = fitted(question, self.answering.prompt_ids, self.answering.limit, self.answering.longest)
        gone = found.talk.left - self.talk.left
        if gone:
            self.screen.say(f"{gone} oldest exchanges left the talk: the model holds {self.answering.limit:,} tokens")
        if found.room < self.answering.longest:
            self.screen.say(f"the answer can have {found.room:,} tokens: the model holds {self.answering.limit:,}")
        with self.screen.asking(self.names):
            answers = [self._answer(found, name) for name in self.names]
        for answer in answers:
            self._note_end(answer, found.room)
        self.talk = found.talk.with_message(answers[-1].message)

    def _answer(self, found: Fitted, name: str) -> Answer:
        with interruptible(self.can_interrupt) as is_enough:

            def watch(text: str) -> bool:
                self.screen.show(name, text)
                return is_enough()

            is_watched = self.screen.streams or self.can_interrupt
            answer = self.answering.answer(found.prompt, found.room, name, watch if is_watched else None)
        self.screen.end(answer)
        return answer

    def _note_end(self, answer: Answer, room: int) -> None:
        who = f"{answer.by}: " if len(self.names) > 1 else ""
        if answer.stop_reason == "length":
            self.screen.say(f"{who}cut off at {room:,} tokens (--max_new_tokens); in a saved row it is no target")
        if answer.stop_reason == "interrupted":
            self.screen.say(f"{who}stopped; what it said so far stays in the talk, /undo takes it back")

    # ---- commands

    def _command(self, line: str) -> bool:
        name, *rest = line.split(maxsplit=1)
        argument = "".join(rest).rstrip()
        command = COMMANDS.get(name)
        if command is None:
            hint = did_you_mean(name, COMMANDS) or "; /help lists them"
            raise ChatError(f"there is no command {name}{hint}. A message that begins with a slash is written //...")
        if argument and not command.argument:
            raise ChatError(f"{name} takes nothing behind it, but there is {argument!r}")
        if not argument and command.argument and not command.argument.startswith("["):
            raise ChatError(f"{name} needs {command.argument}")
        if command.do is not None:
            command.do(self, argument)
        return command.do is not None

    def choose(self, names: tuple[str, ...]) -> None:
        if not set(names) <= set(self.answering.names):
            raise ChatError("there is a model alone, without an adapter: name one with --adapter")
        self.names = names
        self.screen.say(f"{' and '.join(names)} {'answer' if len(names) > 1 else 'answers'} from now on")

    def system(self, text: str) -> None:
        self.talk = replace(self.talk, system=text or None)
        self.screen.say("that is the system message from now on" if text else "there is no system message from now on")

    def reset(self) -> None:
        self.talk = Talk(self.talk.system)
        self.screen.say("all exchanges are forgotten")

    def undo(self) -> None:
        self._refuse_empty("/undo")
        self.talk = self.talk.without_last()
        self.screen.say(f"taken back; {self.talk.num_exchanges} exchanges are left")

    def retry(self) -> None:
        self._refuse_empty("/retry")
        before = self.talk
        self.talk = before.without_last()
        try:
            self._ask(before.messages[-2].content)
        except BaseException:
            self.talk = before
            raise

    def save(self, name: str) -> None:
        self._refuse_empty("/save")
        path = Path(name).expanduser()
        save(self.talk, path)
        unlearned = sum(message.loss is False for message in self.talk.messages)
        told = f"; {unlearned} answers that did not end by themselves are no targets (loss: false)" if unlearned else ""
        gone = f"; {self.talk.left} that had left the talk are not in it" if self.talk.left else ""
        self.screen.say(f"{self.talk.num_exchanges} exchanges are a row of {path} now{told}{gone}")

    def help(self) -> None:
        for name, command in COMMANDS.items():
            self.screen.say(f"  {f'{name} {command.argument}':<16} {command.meaning}")
        self.screen.say("  a line that ends with \\ goes on in the next one; // begins a message with a slash")

    def _refuse_empty(self, command: str) -> None:
        if not self.talk.messages:
            raise ChatError(f"{command}: nothing has been said yet")


class Command(NamedTuple):
    """argument: what it takes, as /help shows it; in brackets, if it can be left out. do: None leaves the chat."""

    argument: str
    meaning: str
    do: Callable[[Session, str], None] | None


COMMANDS = {
    "/both": Command("", BOTH, lambda session, _: session.choose((BASE, ADAPTER))),
    "/base": Command("", "only the base answers", lambda session, _: session.choose((BASE,))),
    "/adapter": Command("", "only the adapter answers, as at the start", lambda session, _: session.choose((ADAPTER,))),
    "/system": Command("[TEXT]", "the system message from now on; without TEXT there is none", Session.system),
    "/reset": Command("", "forget all exchanges; the system message stays", lambda session, _: session.reset()),
    "/undo": Command("", "take back the last exchange", lambda session, _: session.undo()),
    "/retry": Command("", "answer the last message again", lambda session, _: session.retry()),
    "/save": Command("FILE", "append the talk to FILE.jsonl as a training row", Session.save),
    "/help": Command("", "this list", lambda session, _: session.help()),
    "/exit": Command("", "leave; so do Ctrl-D, and Ctrl-C at the prompt", None),
}


@contextmanager
def interruptible(is_wanted: bool) -> Iterator[Callable[[], bool]]:
    """Within, a first Ctrl-C is only noted, which the function given tells; a second one is as ever."""
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    if is_wanted:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        if is_wanted:
            signal.signal(signal.SIGINT, before)
