"""What an adapter does to the weights of its base, one parameter at a time, in fp32.

The scale of every module is PEFT's own: the adapter's settings are met on a model without memory, and PEFT says what
it would multiply by. r: rank, E: experts of a stacked tensor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from chatlora.errors import ModelError
from chatlora.model.adapter_folder import read_adapter
from chatlora.model.folder import CHANGE_THE_BASE
from chatlora.model.loading import refuse_other_model
from chatlora.model.lora import without_false_alarms
from chatlora.model.scales import one_by_one
from chatlora.model.targets import WRAPPED

ADAPTER = "default"
PREFIX = "base_model.model."

# Settings of PEFT under which an adapter does more than to add B·A to a weight, each with what it does.
MORE_THAN_A_PRODUCT = {
    "modules_to_save": "it holds whole modules of its own",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "it holds biases of its own",
    "trainable_token_indices": "it holds embeddings of its own",
    "alora_invocation_tokens": "it works from a token on, not everywhere",
    "use_qalora": "it works on inputs in groups",
    "use_bdlora": "its factors are blocks",
    "arrow_config": "it chooses among adapters",
    "monteclora_config": "it draws its factors",
    "kasa_config": "it has a third factor",
    "velora_config": "it compresses its inputs",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A parameter's change: `scale` times B·A, and for DoRA the length of every row made `magnitude` [out].

    a: [r, in], b: [out, r]; of a stacked tensor [E, r, in] and [E, out, r]. is_input_first: the weight is [in, out].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    is_input_first: bool
    magnitude: torch.Tensor | None = None

    def delta(self) -> torch.Tensor:
        """In the parameter's shape."""
        product: torch.Tensor = (self.b @ self.a) * self.scale
        return product.mT if self.is_input_first else product

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: in fp32."""
        changed = weight + self.delta()
        if self.magnitude is None:
            return changed
        length = torch.linalg.norm(changed, dim=0 if self.is_input_first else 1)
        factor: torch.Tensor = self.magnitude / length
        return changed * (factor if self.is_input_first else factor[:, None])


def changes_of(adapter: Path, skeleton: PreTrainedModel) -> dict[str, Change]:
    """The changes by the name of the parameter in `skeleton`, a model of the served class on the meta device.

    PEFT's layers are put into `skeleton`. Raises ModelError where the adapter is more than products, or another
    model's.
    """
    refuse_more_than_products(adapter)
    refuse_other_model(skeleton, adapter)
    settings, tensors = read_adapter(skeleton, adapter)
    # The norms that DoRA begins with need weights, and here are none: only its names and scales are asked for.
    has_magnitudes, settings.use_dora = bool(settings.use_dora), False
    with torch.device("meta"), without_false_alarms():
        opened = get_peft_model(skeleton, settings, low_cpu_mem_usage=True)
    layers = {name: module for name, module in opened.named_modules() if isinstance(module, LoraLayer)}
    return dict(_change(name, module, tensors, has_magnitudes) for name, module in layers.items())


def refuse_more_than_products(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    faults = [f"{name}: {what}" for name, what in MORE_THAN_A_PRODUCT.items() if settings.get(name)]
    if settings.get("peft_type") != "LORA":
        faults.append(f"peft_type: it is {settings.get('peft_type')}, not LORA")
    if settings.get("bias", "none") != "none":
        faults.append(f"bias: it trains the base's biases ({settings['bias']})")
    beginning = str(settings.get("init_lora_weights")).lower()
    if beginning.startswith(CHANGE_THE_BASE):
        faults.append(f"init_lora_weights: {beginning} belongs to a base that it changed itself")
    if faults:
        raise ModelError(*(f"{path}: cannot be merged: {fault}" for fault in faults))


def _change(
    name: str, module: LoraLayer, tensors: Mapping[str, torch.Tensor], has_magnitudes: bool
) -> tuple[str, Change]:
    """The parameter's name, and its change."""
    is_embedding = bool(module.lora_embedding_A)
    ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    a, b = (tensors[f"{name}.{end}"].float() for end in ends)
    magnitude = tensors[f"{name}.lora_magnitude_vector"].float() if has_magnitudes else None
    parameter = name.removeprefix(PREFIX).replace(WRAPPED, "")
    is_input_first = is_embedding or bool(getattr(module, "fan_in_fan_out", False))
    if isinstance(module, ParamWrapper):
        parameter = f"{parameter}.{module.parameter_name}"
        experts = module.num_experts
        if experts > 1:
            a, b = one_by_one(a, experts, of_a=True), one_by_one(b, experts, of_a=False)
            is_input_first = not module._did_swap_in_out_features
    else:
        parameter = f"{parameter}.weight"
    return parameter, Change(a, b, float(module.scaling[ADAPTER]), is_input_first, magnitude)


def skeleton_of(served: type[PreTrainedModel], config: object) -> PreTrainedModel:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = served(config)
    return model


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
