"""The model card beside an adapter: what it is, what it was trained on and with, how to use it."""

import json
from pathlib import Path

from chatlora.config import Config
from chatlora.run_directory import read_log


def model_card(config: Config, run: Path, base_class: str, base_location: str) -> str:
    """Markdown with the hub's metadata in front. Reads the run's ledger and logs.

    base_class, base_location: the transformers class whose names of layers the adapter has, and what to load it from.
    """
    base_model = config.model.name_or_path
    ledger = json.loads((run / "ledger.json").read_text(encoding="utf-8"))
    steps = read_log(run / "log.jsonl")
    validations = read_log(run / "validation.jsonl")
    sources = "\n".join(
        f"| {source['path']} | {source['rows_used']:,} | {source['rows_held_out']:,} | {len(source['set_aside']):,} "
        f"| {source['turns']:,} | {source['targets']:,} |"
        for source in ledger["sources"]
    )
    held_out = f", validation loss {validations[-1]['loss']:.4f} nats a target" if validations else ""
    lora = config.lora
    return f"""---
base_model: {base_model}
library_name: peft
tags:
- lora
- chatlora
---

# LoRA adapter for {base_model}

Trained with chatlora on the assistant's turns of conversations: rank {lora.rank}, alpha {lora.alpha:g}, dropout
{lora.dropout:g}, on {lora.target_modules}; {len(steps):,} steps of {config.optim.global_batch_size} examples at a peak
learning rate of {config.optim.learning_rate:g} ({config.optim.schedule}).
Last training loss {steps[-1]["loss"]:.4f}{held_out}.

| data | rows used | held out | set aside | turns | targets |
|---|---|---|---|---|---|
{sources}

```python
from peft import PeftModel
from transformers import AutoTokenizer, {base_class}

base = {base_class}.from_pretrained("{base_location}")
model = PeftModel.from_pretrained(base, "this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

The tokenizer and the chat template here are those of training; `generation_config.json` names every stop token.
"""
