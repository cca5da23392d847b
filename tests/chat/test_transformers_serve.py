"""`transformers serve`, run for real, by the lines of docs/serving.md: a client gets evaluate.py's greedy text."""

import json
import shlex
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cli.serving.model_manager import ModelManager
from transformers.utils.import_utils import is_serve_available

from chatlora.model.loading import load_adapter
from chatlora.model.servers import not_taken_in
from tests.chats import LETTER, QUESTIONS, SYSTEM, predictions
from tests.merges import loaded, write_adapter, write_base
from tests.model_families import FAMILIES
from tests.runs import wait_until

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not is_serve_available(), reason="transformers serve needs fastapi, uvicorn and openai: pip install -e '.[test]'"
)


def documented() -> list[str]:
    """The lines of docs/serving.md: what is installed, those that make the folder, and last the server's."""
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8").partition("## transformers serve")[2]
    block = text.partition("```bash\n")[2].partition("```")[0]
    return block.splitlines()


class Server:
    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://localhost:{probe.getsockname()[1]}"
        words = shlex.split(documented()[-1])
        words[words.index("8000")] = self.url.rpartition(":")[2]
        program = Path(sys.executable).with_name("transformers")
        self.log = home / "serve.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(program), *words[1:], "--device", "cpu"], cwd=home, stdout=log, stderr=log
            )

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/health") as answer:
                return bool(answer.status == 200)
        except urllib.error.URLError:
            return False

    def says(self, model: Path, question: str, **more: Any) -> str:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        asked = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": 16, **more}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def served(made: Path, merged: Path) -> Path:
    """`made` with the folder of links, and with the merged model beside it."""
    assert merged == made / "merged"
    (made / "BASE").symlink_to(made / "model")
    (made / "RUN").symlink_to(made / "run")
    subprocess.run("\n".join(documented()[1:-1]), shell=True, cwd=made, check=True)
    return made


@pytest.fixture(scope="module")
def server_at(served: Path) -> Iterator[Server]:
    server = Server(served)
    try:
        wait_until(server.is_up)
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


def wanted_of(served: Path, name: str, prompts: int = 6) -> list[str]:
    """What evaluate.py says. A stop token that is an ordinary letter stays in what the server says."""
    lines = predictions(served / "run/eval" / name)[:prompts]
    ends = [line["stop_reason"] == "stop" and line["prediction_raw"].endswith(LETTER) for line in lines]
    return [line["prediction"] + LETTER * end for line, end in zip(lines, ends, strict=True)]


@pytest.mark.parametrize("prompts", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_client_gets_the_greedy_text_of_evaluate(served: Path, server_at: Server, prompts: int) -> None:
    assert len(QUESTIONS) >= prompts
    assert wanted_of(served, "test") != wanted_of(served, "test-base")
    for folder, name in (("served", "test"), ("merged", "test"), ("model", "test-base")):
        said = [server_at.says(served / folder, question) for question in QUESTIONS[:prompts]]
        assert said == wanted_of(served, name, prompts)


def test_a_server_that_is_not_told_the_templates_arguments_says_something_else(served: Path, server_at: Server) -> None:
    told = {"chat_template_kwargs": {"enable_thinking": True}}
    said = [server_at.says(served / "served", question, **told) for question in QUESTIONS[:6]]
    assert said != wanted_of(served, "test")


def loaded_by_it(folder: Path) -> Any:
    """By the server's own loader, from links as documented to BASE and RUN in this folder."""
    subprocess.run("\n".join(documented()[1:-1]), shell=True, cwd=folder, check=True)
    return ModelManager(device="cpu", dtype="float32")._load_model(f"{folder}/served@main").eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(1, 25)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "Qwen3-MoE" else pytest.mark.slow) for family in FAMILIES]
)
def test_its_loader_makes_of_links_what_was_trained(tmp_path: Path, family: str) -> None:
    base = write_base(tmp_path / "BASE", family, torch.float32)
    adapter = write_adapter(tmp_path / "RUN/adapter", base)
    theirs, ours = loaded_by_it(tmp_path), load_adapter(loaded(base), adapter)
    assert torch.equal(logits(theirs), logits(ours))
    theirs.disable_adapters()
    assert not torch.equal(logits(theirs), logits(ours))


def test_its_loader_loses_the_magnitudes_of_dora_as_exports_say(tmp_path: Path) -> None:
    base = write_base(tmp_path / "BASE", "Llama", torch.float32)
    adapter = write_adapter(tmp_path / "RUN/adapter", base, "dora")
    ours = load_adapter(loaded(base), adapter)
    assert not torch.allclose(logits(loaded_by_it(tmp_path)), logits(ours), atol=1e-2)
    assert "transformers" in not_taken_in(ours.get_base_model(), adapter)
