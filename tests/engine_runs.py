"""Runs under an engine: the variables that `accelerate launch` would set, and witnesses that note what really ran.

A witness is a line of Python for the fork server's `broken`: `from tests.engine_runs import note_engine; ...`.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.fork_server import At, arm, on_entry  # noqa: F401  for `import *`

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINES = {  # the configuration file -> the engine that must run
    "multi_gpu": "ddp",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero3_offload": "zero3",
    "fsdp2": "fsdp2",
}


@cache
def environment_of(config: str | None, *more: str) -> dict[str, str]:
    """What accelerate's own launcher puts into the environment for a file of accelerate_configs/; None: no launcher."""
    if config is None:
        return {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(REPOSITORY / "accelerate_configs" / f"{config}.yaml"), "--num_processes", "2"]
    arguments = launch_command_parser().parse_args([*words, "--main_process_port", "0", *more, "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    ours = {name: value for name, value in made.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return {name: value for name, value in ours.items() if os.environ.get(name) != value}


# ---- witnesses: called in the process of a run, before it starts


def note_engine(path: str) -> None:
    """At every checkpoint: what holds the parameters, and in which precision, as {fact: value} in `path`-rank.json."""
    from chatlora.training import state

    gather = state.gather

    def noting(runtime: Any, model: Any, optimizer: Any, step: int) -> Any:
        found = gather(runtime, model, optimizer, step)
        Path(f"{path}-{runtime.rank}.json").write_text(json.dumps(_facts(runtime, model, optimizer)))
        return found

    state.gather = noting


def _facts(runtime: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    from chatlora.distributed.optimizer_state import torch_optimizer

    parameters = list(model.parameters())
    base = [parameter for parameter in parameters if not parameter.requires_grad]
    adapter = [parameter for parameter in parameters if parameter.requires_grad]
    kept = [tensor for entry in torch_optimizer(optimizer).state.values() for tensor in entry.values()]
    settings = model.config if hasattr(model, "zero_optimization_stage") else {}
    offload = settings.get("zero_optimization", {}).get("offload_param", {}) if isinstance(settings, dict) else {}
    return {
        "distributed_type": runtime.accelerator.distributed_type.value,
        "wrapper": type(model).__name__,
        "stage": model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None,
        "offload": offload.get("device"),
        "dtensors": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "partitioned": sum(hasattr(p, "ds_tensor") and p.ds_tensor.numel() < p.ds_numel for p in parameters),
        "kept_whole": sum(hasattr(p, "ds_tensor") and p.ds_persist for p in parameters),
        "parameters": len(parameters),
        "base": sorted({str(p.dtype) for p in base}),
        "base_parts": sorted({str(p.ds_tensor.dtype) for p in base if hasattr(p, "ds_tensor")}),
        "adapter": sorted({str(p.dtype) for p in adapter}),
        "optimizer": sorted({str(tensor.dtype) for tensor in kept}),
    }


def assert_engine(engine: str, path: Path, *, everything_partitioned: bool = False) -> dict[str, Any]:
    """Both ranks ran what the configuration file names. Returns rank 0's info."""
    both = [json.loads(Path(f"{path}-{rank}.json").read_text()) for rank in (0, 1)]
    for info in both:
        assert info["adapter"] == info["optimizer"] == ["torch.float32"]
        if engine == "ddp":
            assert info["wrapper"] == "DistributedDataParallel"
        elif engine == "fsdp2":
            assert info["distributed_type"] == "FSDP"
            assert info["dtensors"] == info["parameters"]
        else:
            assert info["distributed_type"] == "DEEPSPEED"
            assert info["wrapper"] == "DeepSpeedEngine"
            assert f"zero{info['stage']}" == engine
            if engine == "zero3":
                assert info["partitioned"] == info["parameters"]
            if everything_partitioned:
                assert info["kept_whole"] == 0
    rank_0: dict[str, Any] = both[0]
    return rank_0


def start_from_a_worked_adapter() -> None:
    """lora_B begins as noise instead of zero, so that the first gradient reaches everything."""
    from chatlora.training import setup

    add_lora = setup.add_lora
    setup.add_lora = lambda *given: with_noise(add_lora(*given))


def with_noise(model: Any) -> Any:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def pad_instead_of_pack() -> None:
    from chatlora.training import setup

    setup.why_not_packed = lambda model, *, exact: "a test asked for it"


def mean_of_means() -> None:
    """Broken on purpose: each micro-batch's mean loss counts the same, however many targets it has."""
    from chatlora.data.loader import Loader
    from chatlora.model.loss import TargetLoss

    fetch, forward, now = Loader.fetch, TargetLoss.forward, {"scale": 1.0}

    def counting(loader: Loader, micro_batches: Any) -> Any:
        parts = [loader.examples.num_targets[members].sum() for rank in micro_batches for members in rank]
        now["scale"] = float(sum(parts)) / len(parts)
        return fetch(loader, micro_batches)

    def meaning(loss: TargetLoss, input_ids: Any, labels: Any, **arguments: Any) -> Any:
        own = (labels[:, 1:] != -100).sum().clamp(min=1)
        return forward(loss, input_ids=input_ids, labels=labels, **arguments) / own * now["scale"]

    Loader.fetch, TargetLoss.forward = counting, meaning


def poison(rank: int, call: int, how: str, path: str) -> None:
    """Rank `rank`'s backward pass number `call` gets an infinite gradient, or an infinite loss with a finite one.

    What the weights and the optimizer's state are when the run stops on it goes to `path`-rank.pt on every rank.
    """
    from chatlora.distributed.runtime import Runtime
    from chatlora.errors import NonFiniteError
    from chatlora.training import state

    backward, clip, at = Runtime.backward, Runtime.clip_gradients, NonFiniteError.at
    calls: list[None] = []
    seen: dict[str, Any] = {}

    def poisoned(runtime: Runtime, loss: torch.Tensor) -> None:
        calls.append(None)
        if runtime.rank == rank and len(calls) == call:
            loss = loss * float("inf") if how == "gradient" else loss + float("inf")
        backward(runtime, loss)

    def noting(runtime: Runtime, model: Any, norm: float) -> float:
        seen["it"] = (runtime, model)
        return clip(runtime, model, norm)

    def stopping(*given: Any) -> Any:
        runtime, model = seen["it"]
        found = state.gather(runtime, model, seen["optimizer"], 0)
        torch.save({"adapter": found.adapter, "optimizer": found.optimizer}, f"{path}-{runtime.rank}.pt")
        return at(*given)

    prepare = Runtime.prepare

    def preparing(runtime: Runtime, *given: Any) -> Any:
        model, seen["optimizer"] = prepare(runtime, *given)
        return model, seen["optimizer"]

    Runtime.backward, Runtime.clip_gradients, Runtime.prepare = poisoned, noting, preparing
    NonFiniteError.at = stopping


def fail(rank: int, place: str, call: int) -> None:
    """Rank `rank` raises on entering `place` ("module:Class.function") for the `call`-th time."""

    def raising() -> None:
        raise RuntimeError(f"planted in {place}")

    if os.environ.get("RANK") == str(rank):
        on_entry(place, call, raising)


def note_generation(path: str) -> None:
    """Before the first answer: the engine, and how many of the base's parameters it has spread."""
    import evaluate

    generate, noted = evaluate.generate, []

    def noting(runtime: Any, model: Any, *given: Any) -> None:
        from torch.distributed.tensor import DTensor

        base = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
        spread = sum(isinstance(p, DTensor) or (hasattr(p, "ds_id") and p.numel() == 0) for p in base)
        info = {"engine": runtime.engine, "base": len(base), "spread": spread}
        noted.append(info)
        Path(f"{path}-{runtime.rank}.json").write_text(json.dumps(noted[0]))
        generate(runtime, model, *given)

    evaluate.generate = noting
