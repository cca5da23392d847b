"""The training loss: summed cross-entropy over the targets of a micro-batch, computed inside one module's forward.

T: tokens of a micro-batch; N: targets among them; E: hidden size; V: vocabulary.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from torch.nn.modules import LinearCrossEntropyOptions
from transformers import PreTrainedModel

from chatlora.data.examples import IGNORE_INDEX
from chatlora.model.attention import PACKED

CHUNK = 128  # target rows whose logits exist at a time


class LossHead(nn.Module):
    """Takes the place of a model's vocabulary projection, around the same weight, and also computes the loss from it.

    A module whose own forward returns the loss is the one shape that works sharded and tied under every engine.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        assert head.bias is None
        self.weight: nn.Parameter = head.weight  # the same Parameter: ties and names stay

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [..., E] -> logits [..., V]; with targets [N] and hidden [N, E] -> summed loss in nats, fp32."""
        if targets is None:
            return functional.linear(hidden, self.weight)
        # F.linear_cross_entropy ignores autocast and refuses mixed dtypes. Called a chunk at a time, since its own
        # chunking adds up in its input's dtype: 2 % off over 8,192 targets in bf16.
        hidden = hidden.to(self.weight.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, row_targets in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
                options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
                total = total + functional.linear_cross_entropy(
                    rows, self.weight, row_targets, reduction="sum", options=options
                )
        return total


class TargetLoss(nn.Module):
    """`forward(**micro_batch) -> summed loss in nats`: the one module that is prepared for an engine.

    Hidden states, the choice of target positions, autocast, the head and the loss live in here: outside the prepared
    module's forward DDP's ranks drift apart silently. No targets gives 0 and zero gradients.
    """

    def __init__(self, model: PeftModel, *, packed: bool, autocast_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype
        causal = model.get_base_model()
        causal.config.use_cache = False  # with a cache, packed conversations silently see each other
        self._no_split_modules = causal._no_split_modules  # FSDP2's wrap policy reads it here
        self.fused = head_is_plain(causal)
        if autocast_dtype is not None:
            # Autocast casts inputs itself: the same bits, and two copies less a linear layer than PEFT's own casts.
            # For good and not only within `forward`: gradient checkpointing runs layers again in the backward pass.
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.cast_input_dtype_enabled = False
        if self.fused:
            causal.set_output_embeddings(LossHead(causal.get_output_embeddings()))
        if packed:
            causal.set_attn_implementation(PACKED)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """input_ids, labels: [B, T] (B = 1 if packed), `arguments` as collate.py makes them -> scalar, fp32."""
        predicts = labels[:, 1:] != IGNORE_INDEX  # position i predicts token i + 1
        targets = labels[:, 1:][predicts]
        keep = functional.pad(predicts, (0, 1))
        with torch.autocast(labels.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self._loss(input_ids, keep, targets, arguments)

    def _loss(
        self, input_ids: torch.Tensor, keep: torch.Tensor, targets: torch.Tensor, arguments: dict[str, Any]
    ) -> torch.Tensor:
        causal = self.model.get_base_model()
        if self.fused:
            hidden = causal.base_model(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state
            loss: torch.Tensor = causal.get_output_embeddings()(hidden[keep], targets)
            return loss
        logits = causal(input_ids=input_ids, use_cache=False, logits_to_keep=keep, **arguments).logits
        return functional.cross_entropy(logits.float(), targets, reduction="sum")


@torch.no_grad()
def head_is_plain(causal: PreTrainedModel) -> bool:
    """Whether the model's logits are exactly `hidden @ weight.T` of a frozen head, asked of the model itself.

    Soft-capping, logit scales, biases, trained or adapted heads all say no: they go through the model's own head.
    """
    head = causal.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False
    probe = torch.arange(8, device=head.weight.device)[None]
    was_training = causal.training
    causal.eval()
    hidden = causal.base_model(input_ids=probe, use_cache=False).last_hidden_state
    plain = functional.linear(hidden, head.weight)
    same = torch.equal(plain, causal(input_ids=probe, use_cache=False).logits.to(plain.dtype))
    causal.train(was_training)
    return same
