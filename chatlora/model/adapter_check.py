"""Whether the adapter that was saved is the one that was trained, for whoever opens or serves it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch.func import functional_call
from transformers import PreTrainedModel

from chatlora.data.collate import pack
from chatlora.data.loader import to_device
from chatlora.distributed.zero3 import is_sharded
from chatlora.model.adapter_folder import Tensors, compared, read_adapter, skeleton_of
from chatlora.model.attention import PACKED
from chatlora.model.lora import without_false_alarms
from chatlora.model.scales import adapted_layers, folded, one_scale
from chatlora.model.serving_rule import served, too_far, why_base_moved
from chatlora.rendering.examples import Example

REOPENED = "reopened"
PROBE = Example(input_ids=list(range(1, 33)), labels=list(range(1, 33)))


def why_not_served(model: PeftModel, weights: Tensors, folder: Path, autocast_dtype: torch.dtype | None) -> str | None:
    """None if the adapter in `folder` is `weights` for whoever opens it, else what is wrong with it: half a sentence.

    Its names and shapes are those that PEFT gives the served class, built without memory. PEFT opens it a second time
    on the loaded base, where it must hold the same tensors at the same scale and change the logits; and the base that
    the checkpoint holds, plus B A alpha / r, must have the logits of training (`too_far`). Both need a model that is
    whole on this process, and are left out where an engine has spread it.
    """
    fault = _wrong_names(model.get_base_model(), folder) or _wrong_values(weights)
    if fault or not all(_is_whole(parameter) for parameter in model.parameters()):
        return fault
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            return _wrong_effect(model, weights, folder)
    finally:
        model.train(was_training)


def _wrong_names(base: PreTrainedModel, folder: Path) -> str | None:
    skeleton = skeleton_of(base)
    return compared(skeleton, *read_adapter(skeleton, folder))


def _wrong_values(weights: Tensors) -> str | None:
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        return f"{broken[0]} is not finite"
    return None if any(t.any() for name, t in weights.items() if "lora_B" in name) else "it is zero"


def _wrong_effect(model: PeftModel, weights: Tensors, folder: Path) -> str | None:
    with _opened_again(model, folder) as incomplete:
        if incomplete:
            return incomplete
        tensors = dict(model.named_parameters())
        for name, tensor in folded(model, weights).items():
            if not torch.equal(tensors[name.replace(".default", f".{REOPENED}")].cpu(), tensor.cpu()):
                return f"{name} is another tensor once it is opened again"
        rank, alpha = one_scale(model)
        for name, layer in adapted_layers(model).items():
            if layer.scaling[REOPENED] != alpha / rank:
                return f"{name} has another scale once it is opened again"
    trained = _logits(model, weights)
    with model.disable_adapter():
        alone = _logits(model)
    if torch.equal(trained, alone):
        return "it changes no logit"
    settings, tensors = read_adapter(model.get_base_model(), folder)
    assert isinstance(settings, LoraConfig)
    with served(model, settings, tensors):
        apart = too_far(_logits(model), trained, alone)
    if apart is not None:
        return f"a server's logits, of the base plus B A alpha / r, are {apart:.1e} from those of training"
    return why_base_moved(model.get_base_model())


@contextmanager
def _opened_again(model: PeftModel, folder: Path) -> Iterator[str | None]:
    """The saved adapter on the same base, active within, beside the trained one. Yields what it lacks."""
    settings, tensors = read_adapter(model.get_base_model(), folder)
    assert isinstance(settings, LoraConfig)
    here = model.peft_config["default"]
    assert isinstance(here, LoraConfig)
    # PEFT compares how the two adapters name their tensors, and the same ones have long and short names.
    settings.target_parameters = here.target_parameters
    with without_false_alarms():
        model.add_adapter(REOPENED, settings)
        result = set_peft_model_state_dict(model, tensors, REOPENED)
    model.set_adapter(REOPENED)
    missing = [name for name in result.missing_keys if f".{REOPENED}" in name]
    lacking = [*missing, *result.unexpected_keys]
    try:
        yield f"PEFT finds no place or no value for {lacking[0]}" if lacking else None
    finally:
        model.set_adapter("default")
        model.delete_adapter(REOPENED)


def _logits(model: PeftModel, weights: Tensors | None = None) -> torch.Tensor:
    """On the probe; with `weights` in the place of the adapter's own, by parameter name."""
    packed = model.get_base_model().config._attn_implementation == PACKED
    batch = pack([PROBE]) if packed else {"input_ids": torch.tensor([PROBE.input_ids])}
    batch.pop("labels", None)
    batch = {**to_device(batch, model.device), "use_cache": False}
    adapter = {name: tensor.to(model.device) for name, tensor in (weights or {}).items()}
    logits: torch.Tensor = functional_call(model, adapter, kwargs=batch).logits
    return logits


def _is_whole(parameter: torch.Tensor) -> bool:
    """DeepSpeed's stage 3 leaves empty tensors in the place of parameters, FSDP2 leaves each process its part."""
    return not is_sharded(parameter) and not isinstance(parameter, torch.distributed.tensor.DTensor)
