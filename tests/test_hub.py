"""Where the hub does not answer, that is told at once, and what is in its local cache is taken without asking."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHY = "from chatlora.hub import why_unreachable; print(why_unreachable())"
MODEL = """
from chatlora.config import ModelConfig
from chatlora.model.loading import generation_stop_ids, load_base_model, load_tokenizer
import torch
model = ModelConfig(name_or_path="owner/model")
print(len(load_tokenizer(model)), load_base_model(model, dtype=torch.float32).config.model_type)
generation_stop_ids(model)
"""
ROWS = """
from chatlora.config import Source
from chatlora.reading.sources import read_conversations
list(read_conversations(Source(path="owner/name")))
"""


@pytest.fixture
def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def somebody() -> Iterator[str]:
    """A server that knows no page: a mirror that wants a token, or a proxy."""

    class NoPage(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(401)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), NoPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def python(code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    unset = {name: "" for name in os.environ if name.lower().endswith("_proxy") or name == "HF_HUB_OFFLINE"}
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | unset | own, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("code", [MODEL, ROWS], ids=["model", "rows"])
def test_a_hub_that_does_not_answer_is_told_by_its_address_without_retries(
    code: str, nobody: str, tmp_path: Path
) -> None:
    done = python(code, tmp_path, HF_ENDPOINT=nobody)
    assert f"{nobody} cannot be reached" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert "Retrying" not in done.stderr


def test_a_cached_model_is_loaded_without_the_hub(world: Path, nobody: str, tmp_path: Path) -> None:
    kept = tmp_path / "hf" / "hub" / "models--owner--model"
    shutil.copytree(world / "model", kept / "snapshots" / COMMIT)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    done = python(MODEL, tmp_path, HF_ENDPOINT=nobody)
    assert done.stdout.split()[-1] == "llama", done.stderr
    assert "thrown while requesting" not in done.stderr


def test_whatever_answers_is_a_hub_a_mirror_or_a_proxy(somebody: str, nobody: str, tmp_path: Path) -> None:
    assert python(WHY, tmp_path, HF_ENDPOINT=somebody).stdout == "None\n"
    hidden = {"HF_ENDPOINT": "http://hub.invalid"}
    assert python(WHY, tmp_path, **hidden, HTTP_PROXY=somebody).stdout == "None\n"
    assert "http://hub.invalid cannot be reached" in python(WHY, tmp_path, **hidden, HTTP_PROXY=nobody).stdout
    assert python(WHY, tmp_path, **hidden, HF_HUB_OFFLINE="1").stdout == "HF_HUB_OFFLINE is set\n"
