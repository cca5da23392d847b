"""Out of memory is a sentence that names what to lower where it happened, and nothing else is taken for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from chatlora.distributed.memory import out_of_memory_told
from chatlora.errors import OutOfMemoryError
from chatlora.run_directory import read_status

SHORT = ("--optim.max_steps", "2", "--checkpoint.every_steps", "1", "--data.validation", "0")


def ask_for_too_much(*_: Any, **__: Any) -> None:
    torch.empty(10**15)


def test_only_a_lack_of_memory_is_told_as_one() -> None:
    for error in (RecursionError("too deep"), NotImplementedError("not on this device"), RuntimeError("another")):
        with pytest.raises(type(error)), out_of_memory_told("sentence"):
            raise error
    for lacking in (ask_for_too_much, lambda: bytearray(10**15)):
        with pytest.raises(OutOfMemoryError, match="sentence"), out_of_memory_told("sentence"):
            lacking()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("chatlora.training.setup.load_base_model", "in fp32 does not fit while it is loaded.*run.precision bf16"),
        ("chatlora.training.setup.why_not_packed", "in fp32 does not fit while it is loaded.*run.precision bf16"),
        ("chatlora.training.setup.TargetLoss", "in fp32 does not fit while it is loaded.*run.precision bf16"),
        ("chatlora.training.state.gather", r"for a checkpoint\. Lower optim\.max_tokens_per_micro_batch"),
        ("chatlora.training.export.gather_adapter", "fewer processes on it, and the same command exports the adapter"),
    ],
)
def test_each_stage_says_what_to_lower_and_the_same_command_goes_on(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, place: str, sentence: str
) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(place, ask_for_too_much)
        with pytest.raises(OutOfMemoryError, match=sentence):
            run(*SHORT)
    assert read_status(Path("run"))["state"] == "failed"
    assert read_status(run(*SHORT))["state"] == "done"


def test_an_evaluation_that_cannot_load_its_model_says_so(
    run: Callable[..., Path], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(*SHORT)
    monkeypatch.setattr("chatlora.evaluation.setup.load_base_model", ask_for_too_much)
    with pytest.raises(OutOfMemoryError, match="does not fit while it is loaded"):
        evaluate.main([str(folder), "--data", str(world / "rows.jsonl")])
