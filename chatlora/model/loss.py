"""The training loss: summed cross-entropy over the targets of a micro-batch, computed inside one module's forward.

T: tokens of a micro-batch; N: targets among them; E: hidden size; V: vocabulary.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from chatlora.model.attention import PACKED
from chatlora.model.lean_lora import make_lean
from chatlora.rendering.examples import IGNORE_INDEX

CHUNK = 256  # target rows whose logits exist at a time


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
        with torch.autocast(hidden.device.type, enabled=False):
            summed: torch.Tensor = SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden.to(self.weight.dtype), self.weight, targets
            )
        return summed


class SummedCrossEntropy(torch.autograd.Function):
    """sum of -log softmax(hidden @ weight.T)[target], with the gradient made in the forward pass, a chunk at a time.

    Two matrix products a chunk and no more, since the head is frozen. torch's own F.linear_cross_entropy is the same
    idea; here the sum stays in fp32 (there it has the input's dtype, up to 0.5 % off for a chunk in bf16), and bf16
    products stay bf16 on a CPU (there the whole weight is copied to fp32 for every chunk: 2.6 times slower).
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [N, E], weight [V, E], targets [N] -> scalar in nats, fp32."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Two buffers for all chunks: fresh ones, tens of MB each, cost a CPU more in page faults than the sums in them.
        products = hidden.new_empty(min(CHUNK, len(targets)), len(weight))
        exact = products if products.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            wanted = targets[rows, None]
            logits = products[: len(wanted)]
            softmax = logits if exact is products else exact[: len(wanted)]  # copying a tensor onto itself is free
            torch.mm(hidden[rows], weight.T, out=logits)
            softmax.copy_(logits)
            of_targets, largest = softmax.gather(1, wanted), softmax.amax(1, keepdim=True)
            summed = softmax.sub_(largest).exp_().sum(1, keepdim=True)
            total += (summed.log() + largest - of_targets).sum()
            if gradient is not None:
                softmax.div_(summed).scatter_add_(1, wanted, torch.full_like(summed, -1.0))
                torch.mm(logits.copy_(softmax), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # One over the targets is not a number of bf16: rounded first, it would make the norm depend on the batch.
        return (gradient.float() * scale).to(gradient.dtype), None, None


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
        make_lean(model)
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
    plain = head(hidden.to(head.weight.dtype))  # Mamba's residuals are fp32, whatever the head is
    same = torch.equal(plain, causal(input_ids=probe, use_cache=False).logits.to(plain.dtype))
    causal.train(was_training)
    return same
