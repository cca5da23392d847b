"""`chatlora chat RUN | ADAPTER | MODEL`: a conversation with a run, base and adapter side by side, or by a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatlora.chat.asked import Asked, help_text, parse, refuse_missing_files
from chatlora.config_files import HELP
from chatlora.distributed.signals import StopSignals
from chatlora.errors import ChatError, OutOfMemoryError

if TYPE_CHECKING:
    from chatlora.chat.answers import Answering
    from chatlora.chat.session import Session


def run(argv: Sequence[str]) -> None:
    if set(HELP) & set(argv):
        print(help_text())
        return
    asked = parse(argv)
    refuse_missing_files(asked)
    with StopSignals() as signals:  # before the seconds that imports take
        from chatlora.chat.answers import open_chat
        from chatlora.distributed.runtime import start
        from chatlora.progress import print_line

        runtime = start(asked.config, signals)
        for note in runtime.notes:
            print_line(note)
        answering = open_chat(asked, runtime, print_line)
        try:
            (talk if sys.stdin.isatty() else answer_lines)(asked, answering)
        except BrokenPipeError:  # who read the answers has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def talk(asked: Asked, answering: Answering) -> None:
    """With a person, who mends a mistake in the next line."""
    from chatlora.chat.lines import typed

    signal.signal(signal.SIGINT, signal.default_int_handler)
    session = opened(asked, answering, can_interrupt=True)
    session.screen.say(f"{asked.adapter or asked.config.model.name_or_path}; /help lists the commands, Ctrl-D leaves")
    for line in typed():
        try:
            if not session.take(line.text):
                return
        except (ChatError, OutOfMemoryError) as error:
            for problem in error.problems:
                session.screen.say(problem)
        except KeyboardInterrupt:  # a second one, before the answer's next token: the talk is as it was
            session.screen.say("stopped at once; the message is taken back")


def answer_lines(asked: Asked, answering: Answering) -> None:
    """With a script, which ends at the first mistake."""
    from chatlora.chat.lines import piped

    session = opened(asked, answering, can_interrupt=False)
    for line in piped(sys.stdin.buffer, as_json=asked.json):
        try:
            if not session.take(line.text, is_message=line.is_message):
                return
        except ChatError as error:
            raise ChatError(*(f"{line.place}{problem}" for problem in error.problems)) from None


def opened(asked: Asked, answering: Answering, *, can_interrupt: bool) -> Session:
    from chatlora.chat.screens import Piped, PipedJson, Screen, Terminal
    from chatlora.chat.session import Session

    screen: Screen = PipedJson() if asked.json else Terminal() if sys.stdout.isatty() else Piped()
    return Session(answering, screen, asked.config.data.system, can_interrupt=can_interrupt)
