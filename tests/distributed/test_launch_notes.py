"""What runs and is hardly meant, each with its line: GPUs missing or idle, cores too few, bf16 where it is emulated."""

from dataclasses import replace
from typing import Any

import pytest

from chatlora.distributed.launch_checks import LaunchInfo, check_launch, notes_on
from tests.distributed.test_launch_checks import ALONE, CONFIG, ELASTIC, FP32, ZERO, fsdp, one, two, zero

BF16 = CONFIG.with_values("run", precision="bf16")
T4: dict[str, Any] = {
    "device": "cuda",
    "num_devices": 1,
    "num_cards": 1,
    "torch_build": "13.0",
    "multiplies_bf16": False,
}
EIGHT: dict[str, Any] = {"device": "cuda", "num_devices": 8, "num_cards": 8, "torch_build": "13.0"}
LAUNCHED = {**ELASTIC, "ACCELERATE_MIXED_PRECISION": "no"}
NO_GPU = "no GPU is used, so that it goes on slowly, on the CPU"
NOTED: dict[str, tuple[LaunchInfo, list[str]]] = {
    "single_gpu.yaml without a GPU": (one(ALONE), [f"{NO_GPU}: there is none in this machine"]),
    "multi_gpu.yaml x 2 without a GPU": (two(LAUNCHED, num_cores=2), [f"{NO_GPU}: there is none"]),
    "multi_gpu.yaml x 8 without a GPU": (
        two({**LAUNCHED, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, num_processes=8, num_cores=2),
        [f"{NO_GPU}: there is none", "8 processes share 2 core(s), which is slower than a process a core"],
    ),
    "zero2.yaml without a GPU": (replace(zero(), environment={**ZERO, **LAUNCHED}, num_cores=2), [NO_GPU]),
    "fsdp2.yaml without a GPU": (replace(fsdp(**LAUNCHED), num_cores=2), [NO_GPU]),
    "torchrun x 8 on two cores": (
        two({**ELASTIC, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, num_processes=8, num_cores=2),
        ["8 processes share 2 core(s), which is slower than a process a core: --num_processes 2"],
    ),
    "a CPU build beside a card": (
        one(num_cards=1),
        ["torch is a build for CPUs and cannot use the 1 NVIDIA card(s) of this machine. See https://pytorch.org"],
    ),
    "a driver too old": (one(num_cards=1, torch_build="13.0"), ["torch, built for CUDA 13.0, finds no way to the 1"]),
    "a broken driver under SLURM": (
        one({"CUDA_VISIBLE_DEVICES": "0"}, num_cards=1, torch_build="13.0"),
        ["Is the driver missing or too old (see nvidia-smi), or was this container or job given none (CUDA_VISIBLE"],
    ),
    "a hidden card": (
        one({"CUDA_VISIBLE_DEVICES": "-1"}, num_cards=1, torch_build="13.0"),
        ["CUDA_VISIBLE_DEVICES is '-1', which hides the 1 NVIDIA card(s)"],
    ),
    "one process beside seven idle cards": (
        one(**EIGHT),
        [
            "7 of 8 GPUs are idle. All work with `accelerate launch --config_file accelerate_configs/multi_gpu.yaml "
            "--num_processes 8 train.py ...`"
        ],
    ),
    "two processes beside six": (
        two(ELASTIC, **EIGHT),
        ["6 of 8 GPUs are idle. All work with `accelerate launch ... --num_processes 8 train.py ...`"],
    ),
    "half of two machines": (
        two({**ELASTIC, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, num_processes=8, **EIGHT),
        ["4 of 8 GPUs are idle. All work with `accelerate launch ... --num_processes 16 train.py ...`"],
    ),
    "bf16 on a T4": (
        replace(one(**T4), config=BF16),
        ["run.precision is bf16, which this GPU does not multiply itself"],
    ),
    "the launcher's bf16 on a T4": (
        one({"ACCELERATE_MIXED_PRECISION": "bf16"}, **T4),
        ["mixed_precision is bf16, which this GPU does not multiply itself"],
    ),
    "auto on a T4": (one(**T4), ["precision is fp32, with twice bf16's memory, since this GPU does not"]),
    "fp32 on a T4": (replace(one(**T4), config=FP32), []),
    "python on a machine without a GPU": (one(multiplies_bf16=False), []),
    "cpu.yaml": (one({**ALONE, "ACCELERATE_USE_CPU": "True"}), []),
    "cpu.yaml beside eight cards": (
        one({**ALONE, "ACCELERATE_USE_CPU": "True"}, **{**EIGHT, "device": "cpu"}),
        [],
    ),
    "one visible card of eight": (one({"CUDA_VISIBLE_DEVICES": "3"}, **{**EIGHT, "num_devices": 1}), []),
    "a GPU a task": (
        two({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, num_processes=8, **{**EIGHT, "num_devices": 1}),
        [],
    ),
    "two machines, one variable less": (
        one({"LOCAL_RANK": "0", "WORLD_SIZE": "16"}, num_processes=16, engine="ddp", **EIGHT),
        [],
    ),
}


@pytest.mark.parametrize("how", NOTED)
def test_what_is_hardly_meant_is_told_and_runs(how: str) -> None:
    launch, expected = NOTED[how]
    assert check_launch(launch) == []
    told = notes_on(launch)
    assert len(told) == len(expected), told
    for note, sentence in zip(told, expected, strict=True):
        assert sentence in note
