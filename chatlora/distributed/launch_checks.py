"""Was this launched as it was meant? A launch -> problems, which end it, and notes, which are said before it goes on.

Flags are not believed: accelerate starts one process for `--cpu --num_processes 2`, and plain DDP where
ACCELERATE_USE_CPU meets DeepSpeed. What runs is compared with what was asked for, by the launcher's variables and
DeepSpeed's JSON, with this project's settings, and with the devices at hand.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chatlora.config import Config
from chatlora.distributed.deepspeed import AUTO, accumulation_is_ours, clipping_is_ours, same, zero_stage
from chatlora.distributed.deepspeed import notes as notes_on_deepspeed
from chatlora.distributed.deepspeed import problems_in as problems_in_deepspeed
from chatlora.errors import Problem

Values = Mapping[str, Any]
CONFIGS = "accelerate_configs"


@dataclass(frozen=True)
class LaunchInfo:
    """What is known of a launch. `engine` and `num_processes` are None until the processes have found each other.

    environment: this process's variables. deepspeed: DeepSpeed's JSON as the user wrote it.
    device: cpu, cuda, mps, ... num_devices: how many of them this process sees. num_cards: NVIDIA's in this machine,
    seen by torch or not. torch_build: the CUDA or ROCm that torch was built for, or cpu. multiplies_bf16: natively.
    """

    config: Config
    environment: Mapping[str, str]
    device: str = "cpu"
    num_devices: int = 0
    num_cards: int = 0
    num_cores: int = 1
    torch_build: str = "cpu"
    multiplies_bf16: bool = True
    deepspeed: Values | None = None
    engine: str | None = None
    num_processes: int | None = None

    def says(self, variable: str) -> str:
        return self.environment.get(variable, "")

    @property
    def world_size(self) -> int:
        return int(self.says("WORLD_SIZE") or 1)

    @property
    def processes_here(self) -> int | None:
        """On this machine; None where several were started and nothing says where, as scripts for SLURM do."""
        return int(self.says("LOCAL_WORLD_SIZE") or 0) or (1 if self.world_size == 1 else None)

    @property
    def launched(self) -> bool:
        """By torchrun or `accelerate launch` for several processes, even if there is one."""
        return "LOCAL_RANK" in self.environment

    @property
    def keeps_to_cpu(self) -> bool:
        return self.says("ACCELERATE_USE_CPU").lower() in ("true", "1", "yes")

    @property
    def asked_engine(self) -> str:
        if self.says("ACCELERATE_USE_DEEPSPEED") == "true":
            return f"zero{zero_stage(self.deepspeed or {})}"
        if self.says("ACCELERATE_USE_FSDP") == "true":
            return "fsdp2"
        return "ddp" if self.world_size > 1 else "single"


def check_launch(launch: LaunchInfo) -> list[Problem]:
    """Everything that is wrong with a launch, in the order in which it would matter."""
    checks = (_processes, _engine, _features, _precision, _launcher_settings, _fsdp, _deepspeed)
    return [problem for check in checks for problem in check(launch)]


def notes_on(launch: LaunchInfo) -> list[str]:
    """What is not wrong but hardly meant, a line each. For a launch whose processes have found each other."""
    checks = (_no_gpu, _idle_gpus, _too_few_cores, _bf16)
    return [note for check in checks for note in check(launch)] + notes_on_deepspeed(launch.deepspeed or {})


# ---- problems


def _processes(launch: LaunchInfo) -> Iterator[Problem]:
    running = launch.num_processes
    if running is not None and running != launch.world_size:
        yield Problem(
            "WORLD_SIZE",
            f"{launch.world_size} processes were launched, but {running} found each other. Without a GPU, "
            f"`accelerate launch --config_file {CONFIGS}/multi_gpu.yaml` connects them over gloo",
        )
    # Where accelerate drops processes, their meeting point is all that is left of them.
    was_several = all(launch.says(name) for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"))
    if running == 1 and was_several and not launch.says("WORLD_SIZE"):
        yield Problem(
            "num_processes",
            "accelerate was asked for several processes and starts a single one, as it does for the CPU. For several "
            f"use --config_file {CONFIGS}/multi_gpu.yaml, which also runs without a GPU; for one, unset MASTER_PORT",
        )
    here = launch.processes_here or int(launch.says("LOCAL_RANK") or 0) + 1  # at least
    # One GPU may be each process's own (SLURM's --gpus-per-task=1), but not where one launcher started them all.
    see_the_same = launch.num_devices > 1 or "TORCHELASTIC_RUN_ID" in launch.environment
    if launch.device == "cuda" and here > launch.num_devices and see_the_same:
        yield Problem(
            "num_processes",
            f"{here} processes on this machine, but it shows {launch.num_devices} GPU(s): start one a GPU "
            "(see CUDA_VISIBLE_DEVICES)",
        )


def _engine(launch: LaunchInfo) -> Iterator[Problem]:
    if launch.says("ACCELERATE_USE_DEEPSPEED") == "true" and launch.says("ACCELERATE_USE_FSDP") == "true":
        yield Problem("distributed_type", "DeepSpeed and FSDP were both asked for: keep one of them")
        return
    asked = launch.asked_engine
    fsdp_version = launch.says("FSDP_VERSION") or "1"
    if asked.startswith("zero") and asked not in ("zero1", "zero2", "zero3"):
        yield Problem(
            "zero_optimization.stage",
            f"{asked[4:]} is none of 1, 2, 3 (0 is plain data parallelism: use {CONFIGS}/multi_gpu.yaml)",
        )
    if asked == "fsdp2" and fsdp_version != "2":
        yield Problem(
            "fsdp_version", f"it is {fsdp_version}; only 2 runs here: say `fsdp_version: 2`, as in {CONFIGS}/fsdp2.yaml"
        )
    if asked[:4] in ("zero", "fsdp") and launch.keeps_to_cpu:
        yield Problem(
            "ACCELERATE_USE_CPU",
            f"it turns {asked} into plain DDP without a word: unset it (and `use_cpu` in the launcher's file); "
            "without a GPU the CPU is used anyway",
        )
    elif asked[:4] in ("zero", "fsdp") and not launch.launched:
        yield Problem(
            "RANK", f"{asked} was asked for, but no launcher gave this process a rank: use `accelerate launch`"
        )
    elif launch.num_processes == launch.world_size and launch.engine != asked:
        if (asked, launch.engine) == ("single", "ddp") and launch.world_size == 1:
            return  # accelerate wraps the one process of a launcher, too
        yield Problem("distributed_type", f"{asked} was asked for and {launch.engine} runs: see {CONFIGS}/")


def _features(launch: LaunchInfo) -> Iterator[Problem]:
    if launch.says("ACCELERATE_USE_MEGATRON_LM") == "true":
        yield Problem("use_megatron_lm", f"Megatron-LM does not run here: take one of {CONFIGS}/")
    if launch.says("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        yield Problem("parallelism_config", "tensor, context and sequence parallelism do not run here: leave it out")
    if (launch.says("ACCELERATE_DYNAMO_BACKEND") or "NO").upper() != "NO":
        yield Problem("dynamo_backend", "torch.compile does not run here, since lengths differ in every step: say no")


def _precision(launch: LaunchInfo) -> Iterator[Problem]:
    launcher, ours = launch.says("ACCELERATE_MIXED_PRECISION") or "no", launch.config.run.precision
    if launcher in ("fp16", "fp8"):
        yield Problem(
            "mixed_precision",
            f"{launcher} does not run here (a loss scaler is state that a checkpoint would have to carry): "
            "say bf16 or no",
        )
    if launcher == "bf16" and ours == "fp32":
        yield Problem("mixed_precision", "it is bf16 but run.precision is fp32: change one of them")


def _launcher_settings(launch: LaunchInfo) -> Iterator[Problem]:
    accumulation = launch.says("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if accumulation not in ("", "1", AUTO):
        yield Problem("gradient_accumulation_steps", accumulation_is_ours(accumulation))
    clipping = launch.says("ACCELERATE_GRADIENT_CLIPPING")
    if clipping not in ("", AUTO, "none") and not same(clipping, launch.config.optim.max_grad_norm):
        yield Problem("gradient_clipping", clipping_is_ours(clipping, launch.config))


def _fsdp(launch: LaunchInfo) -> Iterator[Problem]:
    if launch.asked_engine != "fsdp2":
        return
    if launch.says("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        yield Problem(
            "fsdp_cpu_ram_efficient_loading",
            "it leaves every process but the first without weights while the model is looked at: say false",
        )
    if launch.says("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        yield Problem("fsdp_activation_checkpointing", "say false here and set model.gradient_checkpointing true")
    if launch.says("FSDP_OFFLOAD_PARAMS") == "true":
        yield Problem("fsdp_offload_params", f"it does not run here: use {CONFIGS}/zero3_offload.yaml")


def _deepspeed(launch: LaunchInfo) -> Iterator[Problem]:
    if launch.deepspeed is not None:
        yield from problems_in_deepspeed(launch.deepspeed, launch.config)


# ---- notes


def _no_gpu(launch: LaunchInfo) -> Iterator[str]:
    if launch.device != "cpu" or launch.keeps_to_cpu:
        return
    if launch.num_cards or "ACCELERATE_MIXED_PRECISION" in launch.environment:  # accelerate's launcher sets it
        yield f"no GPU is used, so that it goes on slowly, on the CPU: {_why_no_gpu(launch)}"


def _why_no_gpu(launch: LaunchInfo) -> str:
    cards = f"the {launch.num_cards} NVIDIA card(s) of this machine"
    if not launch.num_cards:
        return f"there is none in this machine (for the CPU alone: {CONFIGS}/cpu.yaml)"
    if launch.torch_build == "cpu":
        return f"torch is a build for CPUs and cannot use {cards}. See https://pytorch.org/get-started for one that can"
    visible = launch.environment.get("CUDA_VISIBLE_DEVICES", "all")
    if visible in ("", "-1", "NoDevFiles"):  # the last is SLURM's
        return f"CUDA_VISIBLE_DEVICES is '{visible}', which hides {cards}"
    return (
        f"torch, built for CUDA {launch.torch_build}, finds no way to {cards}. Is the driver missing or too old (see "
        f"nvidia-smi), or was this container or job given none (CUDA_VISIBLE_DEVICES: {visible})?"
    )


def _idle_gpus(launch: LaunchInfo) -> Iterator[str]:
    here, there = launch.processes_here, launch.num_devices
    if launch.device != "cuda" or here is None or here >= there:
        return
    config = f"--config_file {CONFIGS}/multi_gpu.yaml " if launch.world_size == 1 else "... "
    yield (
        f"{there - here} of {there} GPUs are idle. All work with `accelerate launch {config}"
        f"--num_processes {launch.world_size // here * there} train.py ...`"
    )


def _too_few_cores(launch: LaunchInfo) -> Iterator[str]:
    here, cores = launch.processes_here or 1, launch.num_cores
    if launch.device == "cpu" and here > cores:
        yield f"{here} processes share {cores} core(s), which is slower than a process a core: --num_processes {cores}"


def _bf16(launch: LaunchInfo) -> Iterator[str]:
    if launch.multiplies_bf16:
        return
    device, ours = "CPU" if launch.device == "cpu" else "GPU", launch.config.run.precision
    if ours == "bf16" or launch.says("ACCELERATE_MIXED_PRECISION") == "bf16":
        setting = "run.precision" if ours == "bf16" else "mixed_precision"
        yield (
            f"{setting} is bf16, which this {device} does not multiply itself: it is emulated, slowly. "
            "`run.precision: fp32` takes twice the memory"
        )
    elif ours == "auto" and device == "GPU":
        yield "precision is fp32, with twice bf16's memory, since this GPU does not multiply bf16 itself"
