"""The loss of each target by itself: what a look at single tokens takes, where training takes the sum."""

import torch
from peft import PeftModel
from torch.nn import functional

from chatlora.data.loader import MicroBatch
from chatlora.model.loss import CHUNK, head_is_plain
from chatlora.rendering.examples import IGNORE_INDEX


class TargetLosses:
    """Of a model that no engine has wrapped. Called without gradients, in evaluation mode.

    Logits exist for `CHUNK` targets at a time, where the model's head is plain.
    """

    def __init__(self, model: PeftModel, autocast_dtype: torch.dtype | None) -> None:
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.fused = head_is_plain(model.get_base_model())

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> list[float]:
        """In nats, of a micro-batch's targets in order."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels: torch.Tensor = batch["labels"]
        predicts = labels[:, 1:] != IGNORE_INDEX  # position i predicts token i + 1
        targets = labels[:, 1:][predicts]
        keep = functional.pad(predicts, (0, 1))
        causal = self.model.get_base_model()
        with torch.autocast(labels.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if not self.fused:
                logits = causal(**inputs, use_cache=False, logits_to_keep=keep).logits
                return _losses(logits, targets)
            hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state[keep]
        weight = causal.get_output_embeddings().weight
        chunks = [slice(start, start + CHUNK) for start in range(0, len(targets), CHUNK)]
        return [
            loss
            for rows in chunks
            for loss in _losses(functional.linear(hidden[rows].to(weight.dtype), weight), targets[rows])
        ]


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    losses: list[float] = functional.cross_entropy(
        logits.float().view(len(targets), -1), targets, reduction="none"
    ).tolist()
    return losses
