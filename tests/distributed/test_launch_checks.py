"""Thirty ways to launch what was not meant, each with its sentence; and right launches, which have none."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from chatlora.config import Config
from chatlora.distributed.deepspeed import engine_settings, notes, settings_of_launcher
from chatlora.distributed.launch_checks import LaunchInfo, check_launch
from tests.engine_runs import environment_of
from tests.launched import REPOSITORY, launched

RANKED = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
ZERO = {**RANKED, "ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {**RANKED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CONFIG = Config().with_values("optim", learning_rate=2e-4, global_batch_size=16, max_grad_norm=1.0)


def zero(stage: Any = 2, **settings: Any) -> LaunchInfo:
    section = {"stage": stage, **settings.pop("zero_optimization", {})}
    given = {"zero_optimization": section, **settings}
    return LaunchInfo(CONFIG, ZERO, deepspeed=given, engine=f"zero{stage}", num_processes=2)


def fsdp(**environment: str) -> LaunchInfo:
    return LaunchInfo(CONFIG, {**FSDP, **environment}, engine="fsdp2", num_processes=2)


def one(environment: dict[str, str] | None = None, **known: Any) -> LaunchInfo:
    return LaunchInfo(CONFIG, environment or {}, **{"engine": "single", "num_processes": 1, **known})


def two(environment: dict[str, str] | None = None, **known: Any) -> LaunchInfo:
    return LaunchInfo(CONFIG, {**RANKED, **(environment or {})}, **{"engine": "ddp", "num_processes": 2, **known})


ELASTIC = {"TORCHELASTIC_RUN_ID": "none"}  # torchrun's and accelerate's launcher of several processes
ALONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}  # accelerate's launcher of one process
SEVERAL = {**ALONE, "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FP32 = CONFIG.with_values("run", precision="fp32")
BAD: list[tuple[LaunchInfo, str, str]] = [
    # the processes
    (one(RANKED), "WORLD_SIZE", "2 processes were launched, but 1 found each other"),
    (one(SEVERAL), "num_processes", "starts a single one, as it does for the CPU"),
    (two(ELASTIC, device="cuda", num_devices=1), "num_processes", "2 processes on this machine, but it shows 1 GPU(s)"),
    (two({"LOCAL_WORLD_SIZE": "9"}, device="cuda", num_devices=8), "num_processes", "9 processes on this machine"),
    (
        one({"LOCAL_RANK": "8", "WORLD_SIZE": "16"}, device="cuda", num_devices=8, num_processes=16, engine="ddp"),
        "num_processes",
        "9 processes on this machine",
    ),
    # the engine
    (replace(zero(), engine="ddp"), "distributed_type", "zero2 was asked for and ddp runs"),
    (replace(fsdp(), engine="ddp"), "distributed_type", "fsdp2 was asked for and ddp runs"),
    (replace(zero(), environment={**ZERO, "ACCELERATE_USE_CPU": "true"}), "ACCELERATE_USE_CPU", "into plain DDP"),
    (fsdp(ACCELERATE_USE_CPU="true"), "ACCELERATE_USE_CPU", "turns fsdp2 into plain DDP"),
    (fsdp(FSDP_VERSION="1"), "fsdp_version", "only 2 runs here"),
    (zero(0), "zero_optimization.stage", "0 is none of 1, 2, 3"),
    (zero("auto"), "zero_optimization.stage", "auto is none of 1, 2, 3"),
    (one({"ACCELERATE_USE_DEEPSPEED": "true"}, deepspeed={"zero_optimization": {"stage": 2}}), "RANK", "no launcher"),
    (fsdp(ACCELERATE_USE_DEEPSPEED="true"), "distributed_type", "DeepSpeed and FSDP were both asked for"),
    (two({"ACCELERATE_USE_MEGATRON_LM": "true"}), "use_megatron_lm", "Megatron-LM does not run here"),
    (two({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}), "parallelism_config", "leave it out"),
    (one({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}), "dynamo_backend", "say no"),
    # precision
    (one({"ACCELERATE_MIXED_PRECISION": "fp16"}), "mixed_precision", "a loss scaler is state"),
    (two({"ACCELERATE_MIXED_PRECISION": "fp8"}), "mixed_precision", "fp8 does not run here"),
    (replace(one({"ACCELERATE_MIXED_PRECISION": "bf16"}), config=FP32), "mixed_precision", "run.precision is fp32"),
    (zero(fp16={"enabled": True}), "fp16.enabled in DeepSpeed's JSON", "fp16 does not run here"),
    (replace(zero(bf16={"enabled": True}), config=FP32), "bf16.enabled in DeepSpeed's JSON", "change one of them"),
    # accumulation, clipping, batch size
    (two({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}), "gradient_accumulation_steps", "say auto or 1"),
    (zero(gradient_accumulation_steps=4), "gradient_accumulation_steps in DeepSpeed's JSON", "it is 4"),
    (two({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}), "gradient_clipping", "optim.max_grad_norm is 1.0"),
    (zero(gradient_clipping=0.3), "gradient_clipping in DeepSpeed's JSON", "it is 0.3 and optim.max_grad_norm is 1.0"),
    (zero(train_batch_size=64), "train_batch_size in DeepSpeed's JSON", "optim.global_batch_size is 16"),
    (zero(train_micro_batch_size_per_gpu=4), "train_micro_batch_size_per_gpu in DeepSpeed's JSON", "cut by tokens"),
    # DeepSpeed's other blocks
    (zero(optimizer={"type": "AdamW", "params": {"lr": 1e-3}}), "optimizer.params.lr in DeepSpeed's JSON", "0.0002"),
    (zero(optimizer={"type": "Lamb"}), "optimizer.type in DeepSpeed's JSON", "Lamb does not run here"),
    (zero(optimizer={"params": {"betas": [0.9, 0.95]}}), "optimizer.params.betas in DeepSpeed's JSON", "0.999"),
    (
        zero(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 9}}),
        "scheduler in",
        "optim.schedule (cosine)",
    ),
    (zero(3, zero_optimization={"zero_quantized_gradients": True}), "zero_quantized_gradients in", "say false"),
    (zero(curriculum_learning={"enabled": True}), "curriculum_learning in", "leave it out"),
    # FSDP's
    (fsdp(FSDP_CPU_RAM_EFFICIENT_LOADING="true"), "fsdp_cpu_ram_efficient_loading", "say false"),
    (fsdp(FSDP_ACTIVATION_CHECKPOINTING="true"), "fsdp_activation_checkpointing", "model.gradient_checkpointing true"),
    (fsdp(FSDP_OFFLOAD_PARAMS="true"), "fsdp_offload_params", "zero3_offload.yaml"),
]


@pytest.mark.parametrize(
    ("launch", "setting", "sentence"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bad_launch_is_told_with_its_setting_and_the_remedy(launch: LaunchInfo, setting: str, sentence: str) -> None:
    problems = check_launch(launch)
    assert [problem.setting for problem in problems if problem.setting.startswith(setting)], problems
    (told,) = problems
    assert sentence in told.sentence
    assert len(str(told)) < 300


def test_thirty_at_least_and_all_at_once() -> None:
    assert len(BAD) >= 30
    worse = zero(0, gradient_clipping=0.3, train_batch_size=64, optimizer={"type": "Lamb"}, fp16={"enabled": True})
    assert len(check_launch(worse)) == 5


AUTO_JSON = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


GOOD: list[LaunchInfo] = [
    one(),
    one({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}),
    one({**RANKED, "WORLD_SIZE": "1"}, engine="ddp"),  # torchrun, or a job of one task
    one({**ALONE, **RANKED, **ELASTIC, "WORLD_SIZE": "1"}, engine="ddp"),
    one(ALONE),
    one({"MASTER_ADDR": "here", "MASTER_PORT": "29500"}),  # left by whoever wrote the job's script
    one({**SEVERAL, "WORLD_SIZE": "1", "RANK": "0"}),
    one({"ACCELERATE_MIXED_PRECISION": "bf16"}),
    one(device="cuda", num_devices=8),
    two(),
    two(ELASTIC, device="cuda", num_devices=8),
    # SLURM's --gpus-per-task=1; two machines of eight, started by a launcher, and by a script that says less
    two({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, device="cuda", num_devices=1, num_processes=8),
    two({**ELASTIC, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, device="cuda", num_devices=8, num_processes=16),
    one({"LOCAL_RANK": "7", "WORLD_SIZE": "16"}, device="cuda", num_devices=8, num_processes=16, engine="ddp"),
    zero(1),
    zero(2, gradient_clipping=1.0, train_batch_size=16, gradient_accumulation_steps=1),
    zero(3, bf16={"enabled": True}),
    replace(zero(3), deepspeed=AUTO_JSON),
    fsdp(),
]


@pytest.mark.parametrize("launch", GOOD)
def test_a_right_launch_has_no_problem(launch: LaunchInfo) -> None:
    assert check_launch(launch) == []


@pytest.mark.parametrize("config", ["multi_gpu", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "multi_node"])
def test_what_accelerate_makes_of_our_own_files_has_no_problem(config: str) -> None:
    more = ("--num_machines", "1") if config == "multi_node" else ()
    environment = {**RANKED, **environment_of(config, *more)}
    settings = None
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        settings = json.loads((REPOSITORY / environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
    launch = LaunchInfo(CONFIG, environment, deepspeed=settings, num_processes=2)
    assert check_launch(replace(launch, engine=launch.asked_engine)) == []


def test_deepspeed_is_told_what_the_user_said_and_what_is_decided_here() -> None:
    told = engine_settings(AUTO_JSON, 0.7)
    assert told["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert not {"optimizer", "scheduler", "train_batch_size"} & told.keys()
    assert told["bf16"] == told["fp16"] == {"enabled": False}
    assert (told["gradient_clipping"], told["gradient_accumulation_steps"]) == (0.7, 1)
    assert len(notes(AUTO_JSON)) == 2
    assert notes({"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}) == []


def test_the_launchers_own_fields_make_the_same_settings() -> None:
    environment = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/nvme",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    }
    wanted = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}
    assert settings_of_launcher(environment) == {"zero_optimization": wanted}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_file_says_when_to_use_it_in_three_lines(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.startswith("# ") for line in lines[:4]] == [True, True, True, False]
    assert f"--config_file accelerate_configs/{path.name} " in lines[2]
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings.get("mixed_precision", "no") == "no"


# ---- through the real launcher


def launch(world: Path, cwd: Path, *words: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of `accelerate launch WORDS train.py my.yaml`."""
    argv = [str(world / "my.yaml"), "--run.output_dir", "run", "--optim.max_steps", "2"]
    variables = {"CHATLORA_CACHE": str(world / "cache"), **environment}
    told = launched("train", argv, cwd, words=words, environment=variables)
    return told.returncode, told.stdout + told.stderr


def of(config: str) -> list[str]:
    path = REPOSITORY / "accelerate_configs" / f"{config}.yaml"
    return ["--config_file", str(path), "--num_processes", "2", "--main_process_port", "0"]


def two_for_the_cpu(folder: Path) -> tuple[list[str], dict[str, str]]:
    return ["--cpu", "--num_processes", "2"], {}


def zero_on_a_named_cpu(folder: Path) -> tuple[list[str], dict[str, str]]:
    return of("zero2"), {"ACCELERATE_USE_CPU": "true"}


def json_with_a_batch_size(folder: Path) -> tuple[list[str], dict[str, str]]:
    settings = {**AUTO_JSON, "train_batch_size": 64}
    (folder / "ds.json").write_text(json.dumps(settings))
    words = ["--use_deepspeed", "--deepspeed_config_file", str(folder / "ds.json"), "--num_processes", "2"]
    return [*words, "--num_machines", "1", "--main_process_port", "0"], {}


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (two_for_the_cpu, "num_processes: accelerate was asked for several processes and starts a single one"),
        pytest.param(
            *(zero_on_a_named_cpu, "ACCELERATE_USE_CPU: it turns zero2 into plain DDP"), marks=pytest.mark.slow
        ),
        pytest.param(
            *(
                json_with_a_batch_size,
                "train_batch_size in DeepSpeed's JSON: it is 64 and optim.global_batch_size is 16",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_bad_launch_ends_at_once_through_the_real_launcher(
    world: Path, tmp_path: Path, how: Callable[[Path], tuple[list[str], dict[str, str]]], sentence: str
) -> None:
    words, environment = how(tmp_path)
    status, output = launch(world, tmp_path, *words, **environment)
    assert status != 0
    assert sentence in output
    assert "Loading weights" not in output
    assert not (tmp_path / "run").exists()


def test_two_jobs_in_one_output_directory(world: Path, tmp_path: Path) -> None:
    """The other rank does not wait, for half an hour, for the one that left."""
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        status, output = launch(world, tmp_path, *of("multi_gpu"))
    assert status != 0
    assert "another process is training in run" in output
