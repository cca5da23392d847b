"""`chatlora chat` at a terminal: text as it comes, Ctrl-C, several lines in one message."""

import os
import pty
import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chats import make_chat_world
from tests.fork_server import At, ForkServer

GREETING = "/help lists the commands"
CTRL_C, CTRL_D = b"\x03", b"\x04"
SHOW = "chatlora.chat.screens:Terminal.show"


class Typist:
    """A chat on a terminal of its own."""

    def __init__(self, server: ForkServer, folder: Path, *words: str, at: At | None = None) -> None:
        self.server, self.seen = server, ""
        self.terminal, slave = pty.openpty()
        streams = [Path(os.ttyname(slave))] * 3
        (self.pid,) = server.start(
            [str(folder / "model"), "--run.precision", "fp32", "--max_new_tokens", "20", *words],
            folder,
            script="chatlora.commands.chat:run",
            streams=streams,
            at=at,
            environment={"TERM": "xterm", "COLUMNS": "100"},
        )
        self.until(GREETING)
        os.close(slave)

    def type(self, raw: bytes) -> None:
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_world(tmp_path_factory.mktemp("world"))


def test_several_lines_are_one_message_and_ctrl_d_leaves(server: ForkServer, folder: Path) -> None:
    typist = Typist(server, folder)
    typist.type(b"one\\\r")
    typist.until("... ")
    typist.type(b"two\r")
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
    typist = Typist(server, folder, at=At("SIGINT", SHOW, 4))
    typist.type(b"Where is Oslo?\r")
    typist.until("stopped; what it said so far stays in the talk")
    typist.type(b"/retry\r")
    typist.until("cut off at 20 tokens")
    typist.type(CTRL_C)
    assert typist.leaves() == 0
