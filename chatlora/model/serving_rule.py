"""What a server computes: the plain base plus B A alpha / r, from an adapter's file and without PEFT.

A server starts from the checkpoint. An initialisation that moves the base's weights, as PiSSA and OLoRA do, leaves an
adapter that is right on the moved base alone, so those are compared with the checkpoint as well.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from chatlora.model.lora import kind_of
from chatlora.model.scales import adapted_layers, is_a, is_b, module_of, one_by_one
from chatlora.model.targets import WRAPPED

Tensors = Mapping[str, torch.Tensor]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def served(model: PeftModel, settings: PeftLoraConfig, tensors: Tensors) -> Iterator[None]:
    """Within, `model` computes as a server does with this adapter, on the base that is loaded.

    settings, tensors: of one rank for all layers, by the names in `model`, experts stacked.
    """
    scale = settings.lora_alpha / settings.r
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind = "A" if is_a(name) else "B" if is_b(name) else "magnitude"
        by_layer.setdefault(module_of(name), {})[kind] = tensor.to(model.device)
    layers = adapted_layers(model)
    with model.disable_adapter(), ExitStack() as hooks:
        for name, parts in by_layer.items():
            hooks.enter_context(_served(layers[name], parts, scale))
        yield


def why_base_moved(base: PreTrainedModel) -> str | None:
    """None if the weights under an adapter are those of the checkpoint: of each kind of layer, the first and the last.

    Half a sentence where they are not. A tensor that the checkpoint has in another form, quantised for one, is passed
    over, and so is a model that is of no checkpoint.
    """
    shards = _shards(base) if base.name_or_path else {}
    parameters = dict(base.named_parameters())
    for name in _sample(base):
        here = revert_weight_conversion(base, {name.replace(WRAPPED, ""): parameters[name].detach()})
        moved = [stored for stored in here.keys() & shards.keys() if _differs(shards[stored], stored, here[stored])]
        if moved:
            return f"the base's own {min(moved)} is another one than in {base.name_or_path}, which servers load"
    return None


def too_far(served_logits: torch.Tensor, trained: torch.Tensor, alone: torch.Tensor) -> float | None:
    """How far a server's logits [1, T, V] are from training's, as a share of the base's own; None where they agree.

    Agreed is within 1e-4 at nine of ten tokens in fp32: a model's first token may carry activations of which a rounding
    comes out hundreds of times as large. In bf16, where a rounding may also send a token to another expert, it is
    within 4 of its rounding steps, 3 %, at half of the tokens.
    """
    errors = (served_logits - trained).float().norm(dim=-1) / alone.float().norm(dim=-1).mean()
    exact = trained.dtype == torch.float32
    error = float(errors.quantile(0.9 if exact else 0.5))
    return None if error <= (1e-4 if exact else 4 * torch.finfo(trained.dtype).eps) else error


@contextmanager
def _served(layer: LoraLayer, parts: Mapping[str, torch.Tensor], scale: float) -> Iterator[None]:
    base = layer.get_base_layer()
    if isinstance(base, nn.Linear) and not isinstance(layer, ParamWrapper):
        lengthened = _lengthened(base, parts, scale)
        bias = 0 if base.bias is None else base.bias

        def beside(module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            hidden = functional.linear(inputs[0].to(parts["A"].dtype), parts["A"])
            side = functional.linear(hidden, parts["B"]) * scale
            if lengthened is None:
                return out + side.to(out.dtype)
            return ((out - bias + side) * lengthened + bias).to(out.dtype)

        hooks = [base.register_forward_hook(beside)]
    else:
        name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        plain = base._parameters[name]
        assert plain is not None

        def put(*_: Any) -> None:
            changed = plain + _delta(layer, plain, parts) * scale
            if "magnitude" in parts:  # of an embedding or a Conv1D, whose weights are [in, out]
                changed = changed * (parts["magnitude"] / changed.norm(dim=0))
            base._parameters[name] = nn.Parameter(changed.to(plain.dtype), requires_grad=False)

        def back(*_: Any) -> None:
            base._parameters[name] = plain

        hooks = [base.register_forward_pre_hook(put), base.register_forward_hook(back, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _lengthened(base: nn.Linear, parts: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor | None:
    """DoRA, https://arxiv.org/abs/2402.09353 (5): what brings each row of the changed weight to its learned length.

    [out]; None where the adapter is none.
    """
    if "magnitude" not in parts:
        return None
    with torch.autocast(base.weight.device.type, enabled=False):
        changed = base.weight.float() + parts["B"].float() @ parts["A"].float() * scale
        lengths: torch.Tensor = changed.norm(dim=1)
        return parts["magnitude"] / lengths


def _delta(layer: LoraLayer, plain: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """B A of experts, an embedding or a projection, in the shape of its weight."""
    a, b = parts["A"], parts["B"]
    if plain.ndim == 2:
        product = b @ a  # [out, in]
        return product if product.shape == plain.shape else product.T
    experts = plain.shape[0]
    each = one_by_one(b, experts, of_a=False) @ one_by_one(a, experts, of_a=True)
    return each if getattr(layer, "_did_swap_in_out_features", True) else each.transpose(1, 2)


def _sample(base: PreTrainedModel) -> list[str]:
    """Weights under an adapter: of each kind of layer, the first and the last."""
    adapted = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    kinds: dict[str, list[str]] = {}
    for name, _ in base.named_parameters():
        if name.split(WRAPPED)[0] in adapted and ".lora_" not in name and not name.endswith(".bias"):
            kinds.setdefault(kind_of(name), []).append(name)
    return list(dict.fromkeys(name for names in kinds.values() for name in (names[0], names[-1])))


def _shards(base: PreTrainedModel) -> dict[str, Path]:
    """Name -> file of the tensors in the checkpoint that `base` was loaded from."""
    revision = vars(base.config).get("_commit_hash")

    def found(name: str) -> Path | None:
        path = cached_file(
            base.name_or_path,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path)

    index, whole = found(INDEX), found(WHOLE)
    if index is not None:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / file for name, file in names.items() if (index.parent / file).is_file()}
    if whole is None:
        return {}
    with safe_open(whole, framework="pt") as file:
        return dict.fromkeys(file.keys(), whole)


def _differs(shard: Path, name: str, tensor: torch.Tensor) -> bool:
    with safe_open(shard, framework="pt") as file:
        stored = file.get_tensor(name)
    is_weight = stored.is_floating_point() and stored.itemsize > 1  # numbers of 8 bits have a scale in another tensor
    if stored.shape != tensor.shape or not is_weight:
        return False
    return not torch.equal(stored.to(tensor.dtype), tensor.cpu())
