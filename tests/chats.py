"""Chats by a pipe, in processes of their own, with a tiny run whose template takes an argument."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.fork_server import ForkServer
from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import QWEN3, THINK_TOKENS, tiny_tokenizer
from tests.worlds import CITIES

YAML = """\
model: {{name_or_path: {folder}/model}}
lora: {{rank: 4}}
data: {{train: {folder}/rows.jsonl, validation: 0, test: {folder}/test.jsonl, max_length: 256, system: {system}}}
optim: {{max_steps: 4, global_batch_size: 8, learning_rate: 1e-2}}
evaluation: {{max_new_tokens: 16}}
run: {{precision: fp32, cpu_threads: 1, output_dir: {folder}/run}}
"""
SYSTEM = "Say where it is."
LETTER = "p"
QUESTIONS = [f"{number}. Where is {CITIES[number % len(CITIES)]}?" for number in range(20)]


class Chatted(NamedTuple):
    status: int
    out: str
    told: str

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Of --json."""
        return [json.loads(line) for line in self.out.splitlines()]


def make_chat_world(folder: Path) -> Path:
    """`folder` with a model, its rows and my.yaml; 20 test rows, each of one exchange under the run's system message.

    LETTER, which the model often says, is one more stop token, which only its generation_config names.
    """
    tokenizer = tiny_tokenizer(chat_template=QWEN3, plain_tokens=THINK_TOKENS)
    tokenizer.save_pretrained(folder / "model")
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(LETTER)]
    model.save_pretrained(folder / "model")
    for name in ("rows", "test"):
        rows = [[("user", question), ("assistant", f"In place {number}.")] for number, question in enumerate(QUESTIONS)]
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "my.yaml").write_text(YAML.format(folder=folder, system=SYSTEM), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: Sequence[Sequence[tuple[str, str]]]) -> Path:
    told = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told), encoding="utf-8")
    return path


def chat(server: ForkServer, folder: Path, words: Sequence[str], lines: Sequence[str], **options: Any) -> Chatted:
    """What comes of these lines. folder: where it runs, and where its streams are kept."""
    streams = [folder / name for name in ("in", "out", "told")]
    streams[0].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    for path in streams[1:]:
        path.write_bytes(b"")
    (status,) = server.run(words, folder, script="chatlora.commands.chat:run", streams=streams, **options)
    return Chatted(status, *(path.read_text(encoding="utf-8") for path in streams[1:]))


def predictions(folder: Path) -> list[dict[str, Any]]:
    """As evaluate.py wrote them."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
