"""Was this launched as it was meant? LaunchInfo of a launch -> problems, each with the setting and the remedy.

Flags are not believed: accelerate starts one process for `--cpu --num_processes 2`, and plain DDP where
ACCELERATE_USE_CPU meets DeepSpeed. What runs is compared with what was asked for, by the launcher's variables, its
command line and its configuration file, and DeepSpeed's JSON with this project's settings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from chatlora.config import Config
from chatlora.distributed.deepspeed import AUTO, accumulation_is_ours, clipping_is_ours, same, zero_stage
from chatlora.distributed.deepspeed import problems_in as problems_in_deepspeed
from chatlora.errors import Problem

Values = Mapping[str, Any]
CONFIGS = "accelerate_configs"


@dataclass(frozen=True)
class LaunchInfo:
    """What is known of a launch. `engine` and `num_processes` are None until the processes have found each other.

    environment: this process's variables. arguments: what the launcher was given on its command line, config_file:
    its configuration file, both empty where nothing is known of it. deepspeed: DeepSpeed's JSON as the user wrote it.
    device: cpu or cuda. num_devices: GPUs that this process sees.
    """

    config: Config
    environment: Mapping[str, str]
    device: str = "cpu"
    num_devices: int = 0
    arguments: Values = field(default_factory=dict)
    config_file: Values = field(default_factory=dict)
    deepspeed: Values | None = None
    engine: str | None = None
    num_processes: int | None = None

    def says(self, variable: str) -> str:
        return self.environment.get(variable, "")

    @property
    def world_size(self) -> int:
        return int(self.says("WORLD_SIZE") or 1)

    @property
    def launched(self) -> bool:
        """By torchrun or `accelerate launch` for several processes, even if there is one."""
        return "LOCAL_RANK" in self.environment

    @property
    def asked_engine(self) -> str:
        if self.says("ACCELERATE_USE_DEEPSPEED") == "true":
            return f"zero{zero_stage(self.deepspeed or {})}"
        if self.says("ACCELERATE_USE_FSDP") == "true":
            return "fsdp2"
        return "ddp" if self.world_size > 1 else "single"


def check_launch(info: LaunchInfo) -> list[Problem]:
    """Everything that is wrong with a launch, in the order in which it would matter."""
    checks = (_processes, _engine, _features, _precision, _launcher_settings, _fsdp, _deepspeed)
    return [problem for check in checks for problem in check(info)]


# ---- the checks


def _processes(info: LaunchInfo) -> Iterator[Problem]:
    running, here = info.num_processes, int(info.says("LOCAL_WORLD_SIZE") or info.world_size)
    if running is not None and running != info.world_size:
        yield Problem(
            "WORLD_SIZE",
            f"{info.world_size} processes were launched, but {running} found each other. Without a GPU, "
            f"`accelerate launch --config_file {CONFIGS}/multi_gpu.yaml` connects them over gloo",
        )
    asked = info.arguments.get("num_processes") or info.config_file.get("num_processes")
    where = "--num_processes" if info.arguments.get("num_processes") else "num_processes in the launcher's file"
    if running is not None and asked and int(asked) not in (running, -1):
        cpu = info.arguments.get("cpu") or info.config_file.get("use_cpu")
        why = "accelerate starts a single one for the CPU" if cpu else "the launcher started another number"
        yield Problem(
            where,
            f"{asked} processes were asked for and {running} runs: {why}. For several use "
            f"--config_file {CONFIGS}/multi_gpu.yaml, which also runs without a GPU",
        )
    if info.device == "cuda" and here > info.num_devices:
        yield Problem(
            "num_processes",
            f"{here} processes on this machine, but it shows {info.num_devices} GPU(s): start one a GPU "
            "(see CUDA_VISIBLE_DEVICES)",
        )


def _engine(info: LaunchInfo) -> Iterator[Problem]:
    if info.says("ACCELERATE_USE_DEEPSPEED") == "true" and info.says("ACCELERATE_USE_FSDP") == "true":
        yield Problem("distributed_type", "DeepSpeed and FSDP were both asked for: keep one of them")
        return
    asked = info.asked_engine
    fsdp_version = info.says("FSDP_VERSION") or "1"
    if asked.startswith("zero") and asked not in ("zero1", "zero2", "zero3"):
        yield Problem(
            "zero_optimization.stage",
            f"{asked[4:]} is none of 1, 2, 3 (0 is plain data parallelism: use {CONFIGS}/multi_gpu.yaml)",
        )
    if asked == "fsdp2" and fsdp_version != "2":
        yield Problem(
            "fsdp_version", f"it is {fsdp_version}; only 2 runs here: say `fsdp_version: 2`, as in {CONFIGS}/fsdp2.yaml"
        )
    if asked[:4] in ("zero", "fsdp") and info.says("ACCELERATE_USE_CPU").lower() in ("true", "1", "yes"):
        yield Problem(
            "ACCELERATE_USE_CPU",
            f"it turns {asked} into plain DDP without a word: unset it (and `use_cpu` in the launcher's file); "
            "without a GPU the CPU is used anyway",
        )
    elif asked[:4] in ("zero", "fsdp") and not info.launched:
        yield Problem(
            "RANK", f"{asked} was asked for, but no launcher gave this process a rank: use `accelerate launch`"
        )
    elif info.num_processes == info.world_size and info.engine != asked:
        yield Problem("distributed_type", f"{asked} was asked for and {info.engine} runs: see {CONFIGS}/")


def _features(info: LaunchInfo) -> Iterator[Problem]:
    if info.says("ACCELERATE_USE_MEGATRON_LM") == "true":
        yield Problem("use_megatron_lm", f"Megatron-LM does not run here: take one of {CONFIGS}/")
    if info.says("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        yield Problem("parallelism_config", "tensor, context and sequence parallelism do not run here: leave it out")
    if (info.says("ACCELERATE_DYNAMO_BACKEND") or "NO").upper() != "NO":
        yield Problem("dynamo_backend", "torch.compile does not run here, since lengths differ in every step: say no")


def _precision(info: LaunchInfo) -> Iterator[Problem]:
    launcher, ours = info.says("ACCELERATE_MIXED_PRECISION") or "no", info.config.run.precision
    if launcher in ("fp16", "fp8"):
        yield Problem(
            "mixed_precision",
            f"{launcher} does not run here (a loss scaler is state that a checkpoint would have to carry): "
            "say bf16 or no",
        )
    if launcher == "bf16" and ours == "fp32":
        yield Problem("mixed_precision", "it is bf16 but run.precision is fp32: change one of them")


def _launcher_settings(info: LaunchInfo) -> Iterator[Problem]:
    accumulation = info.says("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if accumulation not in ("", "1", AUTO):
        yield Problem("gradient_accumulation_steps", accumulation_is_ours(accumulation))
    clipping = info.says("ACCELERATE_GRADIENT_CLIPPING")
    if clipping not in ("", AUTO, "none") and not same(clipping, info.config.optim.max_grad_norm):
        yield Problem("gradient_clipping", clipping_is_ours(clipping, info.config))


def _fsdp(info: LaunchInfo) -> Iterator[Problem]:
    if info.asked_engine != "fsdp2":
        return
    if info.says("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        yield Problem(
            "fsdp_cpu_ram_efficient_loading",
            "it leaves every process but the first without weights while the model is looked at: say false",
        )
    if info.says("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        yield Problem("fsdp_activation_checkpointing", "say false here and set model.gradient_checkpointing true")
    if info.says("FSDP_OFFLOAD_PARAMS") == "true":
        yield Problem("fsdp_offload_params", f"it does not run here: use {CONFIGS}/zero3_offload.yaml")


def _deepspeed(info: LaunchInfo) -> Iterator[Problem]:
    if info.deepspeed is not None:
        yield from problems_in_deepspeed(info.deepspeed, info.config)
