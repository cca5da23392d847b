"""What happens after the last step: the adapter, as others load it."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from chatlora.checkpoint_names import home_of
from chatlora.config import Config
from chatlora.disk import written_beside
from chatlora.distributed.memory import NOT_EXPORTED, out_of_memory_told
from chatlora.distributed.runtime import Runtime
from chatlora.errors import ModelError
from chatlora.model.adapter_check import why_not_served
from chatlora.model.adapter_folder import (
    save_adapter,
    save_generation_config,
    save_template_settings,
    served_class,
)
from chatlora.model.servers import not_taken_in
from chatlora.rendering.renderer import Renderer
from chatlora.run_directory import RunDirectory
from chatlora.run_log import read_log
from chatlora.training.checkpoint import read_checkpoint, why_broken
from chatlora.training.state import gather_adapter, let_go


@out_of_memory_told(NOT_EXPORTED)
def export_adapter(
    config: Config,
    runtime: Runtime,
    run: RunDirectory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
) -> None:
    """The last step's adapter, and the best one's, each with tokenizer, chat template, stop tokens and card."""
    weights = gather_adapter(runtime, model, optimizer)
    if not runtime.is_main:
        return
    let_go(config.checkpoint, run)  # a kill may have come between the last save and this

    def export(weights: dict[str, torch.Tensor], folder: Path) -> None:
        """A PEFT adapter that is whole when it appears."""
        base = adapted.get_base_model()
        with written_beside(folder) as beside:
            save_adapter(adapted, weights, beside, config.lora.expert_format)
            if config.model.chat_template is not None:
                tokenizer.chat_template = renderer.chat_template
            tokenizer.save_pretrained(beside)
            save_template_settings(beside, renderer.chat_template_kwargs, config.model.chat_template_date)
            save_generation_config(base, renderer.stop_ids, beside)
            card = model_card(config, run.path, served_class(base).__name__, base.name_or_path)
            (beside / "README.md").write_text(card, encoding="utf-8")
        fault = why_not_served(adapted, weights, folder, runtime.autocast_dtype)
        if fault:
            raise ModelError(
                f"the adapter in {folder} is not what was trained: {fault}; what is in {run.checkpoints} is"
            )

    export(weights, run.adapter)
    run.say(f"the adapter is in {run.adapter}")
    for server, what in not_taken_in(adapted.get_base_model(), run.adapter).items():
        run.say(f"warning: {server} {what}")
    best = run.best_step()
    if best is not None and config.checkpoint.keep_best:
        home = home_of(run.checkpoints, best)
        fault = why_broken(home)
        if fault:
            run.say(f"there is no adapter-best: {home} is broken: {fault}")
            return
        export(read_checkpoint(home).adapter, run.path / "adapter-best")
        run.say(f"the adapter with the best validation loss, of step {best}, is in {run.path / 'adapter-best'}")


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
