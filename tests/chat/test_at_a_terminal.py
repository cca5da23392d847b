"""`chatlora chat` at a terminal: text as it comes, Ctrl-C, several lines in one message."""

import os
import pty
import re
import select
from pathlib import Path
from typing import Any

import pytest

from tests.chats import QUESTIONS, make_chat_world, predictions
from tests.fork_server import At, ForkServer

GREETING = "/help lists the commands"
IS_READ = "\x1b[?2004h"  # readline: from here on a paste is one piece
CTRL_C, CTRL_D = b"\x03", b"\x04"
BROKEN_OFF = """
from chatlora.chat.screens import Terminal
def show(screen, by, text):
    raise KeyboardInterrupt
Terminal.show = show
"""
SHOW = "chatlora.chat.screens:Terminal.show"


class Typist:
    """A chat on a terminal of its own."""

    def __init__(self, server: ForkServer, talked_to: Path, *words: str, **options: Any) -> None:
        self.server, self.seen = server, ""
        self.terminal, slave = pty.openpty()
        streams = [Path(os.ttyname(slave))] * 3
        (self.pid,) = server.start(
            [str(talked_to), "--run.precision", "fp32", "--max_new_tokens", "20", *words],
            talked_to.parent,
            script="chatlora.commands.chat:run",
            streams=streams,
            **options,
            environment={"TERM": "xterm", "COLUMNS": "100"},
        )
        self.until(GREETING)
        os.close(slave)

    def type(self, raw: bytes, prompt: str = "> ") -> None:
        """Once it is asked for: Ctrl-D before that is lost, as the terminal itself would still read it."""
        self.until(f"{IS_READ}{prompt}")
        os.write(self.terminal, raw)

    def until(self, text: str) -> str:
        """What was seen from the last time on, up to this."""
        while text not in self.seen:
            assert select.select([self.terminal], [], [], 60)[0], self.seen
            self.seen += os.read(self.terminal, 65536).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def leaves(self) -> int:
        (status,) = self.server.wait([self.pid])
        return status

    def leaves_on_ctrl_c(self) -> int:
        """Pressed until something is written: Python looks for signals just before readline waits for a key, and one
        that comes between is seen with the next."""
        self.type(CTRL_C)
        while not select.select([self.terminal], [], [], 1)[0]:
            os.write(self.terminal, CTRL_C)
        return self.leaves()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_world(tmp_path_factory.mktemp("world"))


def test_several_lines_are_one_message_and_ctrl_d_leaves(server: ForkServer, folder: Path) -> None:
    typist = Typist(server, folder / "model")
    typist.type(b"one\\\r")
    typist.type(b"two\r", prompt="... ")
    typist.until("cut off at 20 tokens")
    typist.type(b"\x1b[200~three\nfour\x1b[201~\r")  # pasted
    typist.until("cut off at 20 tokens")
    typist.type(b"/sve\r")
    typist.until("did you mean '/save'?")  # and it goes on
    typist.type(f"/save {folder}/typed.jsonl\r".encode())
    typist.until("are a row of")
    typist.type(CTRL_D)
    assert typist.leaves() == 0
    row = (folder / "typed.jsonl").read_text()
    assert re.findall(r'"user", "content": "(.*?)"', row) == [r"one\ntwo", r"three\nfour"]


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(server: ForkServer, folder: Path) -> None:
    typist = Typist(server, folder / "model", at=At("SIGINT", SHOW, 4))
    typist.type(b"Where is Oslo?\r")
    typist.until("stopped; what it said so far stays in the talk")
    typist.type(b"/retry\r")
    typist.until("cut off at 20 tokens")
    assert typist.leaves_on_ctrl_c() == 0


def test_an_answer_that_is_broken_off_leaves_the_talk_as_it_was(server: ForkServer, folder: Path) -> None:
    typist = Typist(server, folder / "model", broken=BROKEN_OFF)
    typist.type(b"Where is Oslo?\r")
    typist.until("the message is taken back")
    typist.type(b"/undo\r")
    typist.until("nothing has been said yet")
    typist.type(CTRL_D)
    assert typist.leaves() == 0


def test_base_and_adapter_stand_side_by_side(server: ForkServer, made: Path) -> None:
    typist = Typist(server, made / "run", "--max_new_tokens", "3")
    typist.type(b"/both\r")
    typist.until("answer from now on")
    typist.type(f"{QUESTIONS[3]}\r".encode())
    seen = typist.until("adapter: cut off at 3 tokens")
    base, adapter = (predictions(made / "run/eval" / name)[3]["prediction"][:5] for name in ("test-base", "test"))
    assert re.search(rf"\n{re.escape(base)}.* {re.escape(adapter)}", seen)
    assert typist.leaves_on_ctrl_c() == 0
