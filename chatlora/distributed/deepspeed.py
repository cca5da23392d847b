"""DeepSpeed's JSON: what of it is the user's, what is decided here, and what cannot be.

The section optim, run.precision and the loop decide about batches, accumulation, clipping, the optimizer, the schedule
and precision, under every engine alike. Where the JSON says `auto`, ours is taken; where it says something else, that
is a problem and not a silent choice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatlora.config import Config
from chatlora.errors import Problem

Values = Mapping[str, Any]
AUTO = "auto"
PLACE = "in DeepSpeed's JSON"

PRECISION = ("bf16", "fp16", "amp", "torch_autocast", "data_types", "communication_data_type")
REPLACED = (*PRECISION, "optimizer", "scheduler")  # left out of what DeepSpeed is told, and that is said
LOSSY = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
OTHER_TRAINING = (
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "progressive_layer_drop",
    "pipeline",
)


def zero_stage(settings: Values) -> Any:
    return section(settings, "zero_optimization").get("stage", 0)


def engine_settings(asked: Values, max_grad_norm: float) -> dict[str, Any]:
    """What DeepSpeed is told: the user's settings without what is decided here. `auto` is DeepSpeed's own default."""
    kept = {n: value for n, value in _without_auto(asked).items() if n not in (*REPLACED, "train_batch_size")}
    return {
        **kept,
        "train_micro_batch_size_per_gpu": 1,  # any number would do: the loop cuts and sums micro-batches itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # an adapter is small: torch's AdamW, and no compiler
    }


def settings_of_launcher(environment: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's settings as accelerate's variables tell them, where no JSON does."""

    def said(name: str, default: str) -> str:
        return environment.get(f"ACCELERATE_DEEPSPEED_{name}", default)

    stage = said("ZERO_STAGE", "2")
    zero: dict[str, Any] = {"stage": int(stage) if stage.isdigit() else stage}
    for what in ("optimizer", "param"):
        device = said(f"OFFLOAD_{what.upper()}_DEVICE", "none")
        if device != "none":
            zero[f"offload_{what}"] = {"device": device}
            path = said(f"OFFLOAD_{what.upper()}_NVME_PATH", "none")
            zero[f"offload_{what}"] |= {} if path == "none" else {"nvme_path": path}
    return {"zero_optimization": zero}


def _without_auto(settings: Values) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if value != AUTO
    }


def section(settings: Values, name: str) -> Values:
    section = settings.get(name, {})
    return section if isinstance(section, Mapping) else {}


def _is_on(section: Any) -> bool:
    return bool(section.get("enabled", True)) if isinstance(section, Mapping) else section is not None


def notes(settings: Values) -> list[str]:
    """What a user wrote and this project decides, a line each."""
    told = [name for name in REPLACED if _is_on(settings.get(name))]
    precision = ", ".join(name for name in told if name in PRECISION)
    lines = []
    if precision:
        lines.append(f"DeepSpeed's {precision} is off: run.precision says what the base is, the adapter is fp32 anyway")
    if "optimizer" in told or "scheduler" in told:
        lines.append("DeepSpeed's optimizer and scheduler are left out: the section optim says what is done")
    return lines


def problems_in(settings: Values, config: Config) -> Iterator[Problem]:
    """What contradicts this project's settings, or its promise that the engine does not show in the gradient."""
    ours = config.run.precision
    if section(settings, "fp16").get("enabled") is True or _is_on(settings.get("amp")):
        yield Problem(f"fp16.enabled {PLACE}", "fp16 does not run here: say run.precision bf16 or fp32")
    if section(settings, "bf16").get("enabled") is True and ours == "fp32":
        yield Problem(f"bf16.enabled {PLACE}", "it is true but run.precision is fp32: change one of them")
    for name in LOSSY:
        if section(settings, "zero_optimization").get(name) is True:
            yield Problem(f"{name} {PLACE}", "it rounds what crosses processes, so that their number shows: say false")
    for name in OTHER_TRAINING:
        if _is_on(settings.get(name)):
            yield Problem(f"{name} {PLACE}", "it changes what is trained on behind the loop's back: leave it out")
    yield from _optimizer(settings, config)
    yield from _batch(_without_auto(settings), config)


def _optimizer(settings: Values, config: Config) -> Iterator[Problem]:
    ours = {
        "lr": (config.optim.learning_rate, "optim.learning_rate"),
        "weight_decay": (config.optim.weight_decay, "optim.weight_decay"),
        "betas": ((0.9, 0.999), "AdamW's here"),
        "eps": (1e-8, "AdamW's here"),
    }
    optimizer = section(settings, "optimizer")
    if optimizer.get("type", "AdamW") not in ("AdamW", "Adam"):
        yield Problem(f"optimizer.type {PLACE}", f"{optimizer['type']} does not run here, AdamW does: leave it out")
    for name, value in _without_auto(section(optimizer, "params")).items():
        wanted, setting = ours.get(name, (value, ""))
        if not same(value, wanted):
            yield Problem(
                f"optimizer.params.{name} {PLACE}", f"it is {value} and {setting} is {wanted}: say auto there"
            )
    if _without_auto(section(section(settings, "scheduler"), "params")):
        yield Problem(
            f"scheduler {PLACE}",
            f"the schedule is optim.schedule ({config.optim.schedule}) with optim.warmup_ratio: leave it out",
        )


def _batch(settings: Values, config: Config) -> Iterator[Problem]:
    batch, ours = settings.get("train_batch_size"), config.optim.global_batch_size
    if batch is not None and batch != ours:
        yield Problem(
            f"train_batch_size {PLACE}", f"it is {batch} and optim.global_batch_size is {ours}: say auto there"
        )
    micro_batch = settings.get("train_micro_batch_size_per_gpu", 1)
    if micro_batch != 1:
        yield Problem(
            f"train_micro_batch_size_per_gpu {PLACE}",
            f"it is {micro_batch}, but micro-batches are cut by tokens, optim.max_tokens_per_micro_batch: say auto",
        )
    accumulation = settings.get("gradient_accumulation_steps", 1)
    if accumulation != 1:
        yield Problem(f"gradient_accumulation_steps {PLACE}", accumulation_is_ours(accumulation))
    clipping = settings.get("gradient_clipping")
    if clipping is not None and not same(clipping, config.optim.max_grad_norm):
        yield Problem(f"gradient_clipping {PLACE}", clipping_is_ours(clipping, config))


def accumulation_is_ours(found: object) -> str:
    return (
        f"it is {found}, but accumulation follows from optim.global_batch_size, optim.max_tokens_per_micro_batch and "
        "the number of processes: say auto or 1, or leave it out"
    )


def clipping_is_ours(found: object, config: Config) -> str:
    return f"it is {found} and optim.max_grad_norm is {config.optim.max_grad_norm}: say auto there, or the same"


def same(found: Any, ours: Any) -> bool:
    """Whether two numbers, or two lists of them, are equal; numbers may be spelled out."""
    if isinstance(ours, Sequence):
        return isinstance(found, list) and len(found) == len(ours) and all(map(same, found, ours))
    try:
        return math.isclose(float(found), float(ours))
    except (TypeError, ValueError):
        return bool(found == ours)
