"""A folder to train in: a tiny model, 72 rows of conversations of one to three turns, and my.yaml."""

import json
from pathlib import Path

from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import tiny_tokenizer

CITIES = ["北京", "上海", "广州", "成都", "西安", "杭州", "London", "Paris", "Rome", "Cairo", "Lima", "Oslo"]
MY_YAML = """\
model: {{name_or_path: {folder}/model}}
lora: {{rank: 4, dropout: 0.1}}
data: {{train: {folder}/rows.jsonl, validation: 0.065, max_length: 256}}
optim: {{epochs: 2, global_batch_size: 16, max_tokens_per_micro_batch: 300, learning_rate: 5e-3}}
checkpoint: {{every_steps: 5}}
run: {{precision: fp32, cpu_threads: 1}}
"""


def make_world(folder: Path) -> Path:
    """`folder`, with everything that my.yaml names in it: 65 rows to train on and 7 held out.

    10 steps of 5 or 6 micro-batches in 2 epochs.
    """
    make_base(folder / "model")
    make_rows(folder / "rows.jsonl", 72)
    (folder / "my.yaml").write_text(MY_YAML.format(folder=folder), encoding="utf-8")
    return folder


def make_base(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)


def make_rows(path: Path, count: int) -> None:
    """Conversations of one to three turns."""
    rows = []
    for number in range(count):
        city = CITIES[number % len(CITIES)]
        turns = [("user", f"{number}. Where is {city}?"), ("assistant", f"{city} is number {number}.")]
        messages = [{"role": role, "content": content} for role, content in turns * (1 + number % 3)]
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
