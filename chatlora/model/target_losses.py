"""The loss of each target by itself: what a look at single tokens takes, where training takes the sum."""

import torch
from torch.nn import functional

from chatlora.data.loader import MicroBatch
from chatlora.model.loss import CHUNK, TargetLoss
from chatlora.rendering.examples import IGNORE_INDEX


@torch.no_grad()
def target_losses(loss: TargetLoss, batch: MicroBatch) -> list[float]:
    """In nats, of a micro-batch's targets in order; `loss`, which no engine has wrapped, gives their sum.

    Logits exist for `CHUNK` targets at a time, where the model's head is plain.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels: torch.Tensor = batch["labels"]
    predicts = labels[:, 1:] != IGNORE_INDEX  # position i predicts token i + 1
    targets = labels[:, 1:][predicts]
    keep = functional.pad(predicts, (0, 1))
    causal, dtype = loss.model.get_base_model(), loss.autocast_dtype
    with torch.autocast(labels.device.type, dtype, enabled=dtype is not None):
        if not loss.fused:
            return _losses(causal(**inputs, use_cache=False, logits_to_keep=keep).logits, targets)
        hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state[keep]
    head = causal.get_output_embeddings()
    chunks = [slice(start, start + CHUNK) for start in range(0, len(targets), CHUNK)]
    losses = (_losses(head(hidden[rows].to(head.weight.dtype)), targets[rows]) for rows in chunks)
    return [each for of_chunk in losses for each in of_chunk]


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    flat = logits.float().view(len(targets), -1)
    losses: list[float] = functional.cross_entropy(flat, targets, reduction="none").tolist()
    return losses
