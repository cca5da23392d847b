"""What a run should compute, in plain PyTorch: one conversation at a time, all logits, one process, no engine."""

import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from chatlora.config_files import load_config
from chatlora.data.batches import GlobalBatches
from chatlora.model.lora import add_lora, trainable
from chatlora.rendering.examples import Example
from tests.engine_runs import with_noise


def _gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def reference(folder: Path, flags: list[str], examples: list[Example], steps: int) -> list[dict[str, torch.Tensor]]:
    """[gradient of the first step, weights after `steps` steps], by parameter name.

    Which rows are in a batch is GlobalBatches' to say; the rest is written out here.
    """
    config = load_config([str(folder / "my.yaml"), *flags], default="demo").config
    model = with_noise(add_lora(AutoModelForCausalLM.from_pretrained(folder / "model"), config.lora, config.run.seed))
    adapter, optim = trainable(model), config.optim
    optimizer = torch.optim.AdamW(adapter.values(), weight_decay=optim.weight_decay)
    lengths, targets = (torch.tensor([len(e.input_ids) for e in examples]).numpy() for _ in range(2))
    batches = GlobalBatches(lengths, targets, optim.global_batch_size, 100_000, config.run.seed, num_processes=1)
    gradient: dict[str, torch.Tensor] = {}
    for step in range(steps):
        batch = [examples[index] for index in batches[step].indices]
        loss = torch.zeros((), dtype=torch.float64)
        for example in batch:
            logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]
            loss += cross_entropy(logits.double(), torch.tensor(example.labels[1:]), reduction="sum")
        loss /= sum(label != -100 for example in batch for label in example.labels[1:])
        loss.backward()
        gradient = gradient or {name: _gradient_of(parameter) for name, parameter in adapter.items()}
        torch.nn.utils.clip_grad_norm_(adapter.values(), optim.max_grad_norm)
        warmup = math.ceil(optim.warmup_ratio * steps)
        x = (step - warmup) / max(1, steps - warmup)
        rate = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * x)) / 2
        optimizer.param_groups[0]["lr"] = optim.learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
    return [gradient, {name: parameter.detach() for name, parameter in adapter.items()}]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of everything, relative to the norm of `other`."""
    assert one.keys() == other.keys()
    gaps = torch.stack([(one[name].double() - other[name].double()).norm() for name in other])
    return float(gaps.norm() / torch.stack([tensor.double().norm() for tensor in other.values()]).norm())
