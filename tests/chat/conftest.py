"""A run to talk to."""

from pathlib import Path

import pytest

from tests.chats import make_chat_world
from tests.fork_server import ForkServer


@pytest.fixture(scope="session")
def made(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, and what evaluate.py says of it and of its base in run/eval."""
    folder = make_chat_world(tmp_path_factory.mktemp("made"))
    assert server.run([str(folder / "my.yaml")], folder) == [0]
    assert server.run([str(folder / "run"), "--compare", "base"], folder, script="evaluate") == [0]
    return folder


@pytest.fixture(scope="session")
def merged(server: ForkServer, made: Path) -> Path:
    """The run of `made` as one model, merged/ beside it."""
    words = [str(made / "run"), str(made / "merged"), "--data", str(made / "test.jsonl")]
    assert server.run(words, made, script="chatlora.commands.merge:run") == [0]
    return made / "merged"
