"""The patches of docs/extending.md: each applies, touches two files at most, and does what the page says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
PATCHES = {
    title: re.search(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
MOST_LINES = 25  # added by one patch

# One process: a run that nobody stops, one that is stopped in step 5 and goes on, and what each patch adds.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
import train
from chatlora.distributed.runtime import Runtime
from chatlora.errors import Stopped
from chatlora.evaluation.metrics import score
from chatlora.model import loss
from chatlora.run_log import read_log

argv = sys.argv[1:]
train.main([*argv, "--run.output_dir", "whole"])
clip, steps = Runtime.clip_gradients, []

def stopping(runtime, *given):
    steps.append(None)
    if len(steps) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return clip(runtime, *given)

Runtime.clip_gradients = stopping
try:
    train.main([*argv, "--run.output_dir", "stopped"])
except Stopped as stop:
    print(stop)
train.main([*argv, "--run.output_dir", "stopped"])
assert len(steps) == 10

draw = torch.Generator().manual_seed(0)
weight, targets = torch.randn(50, 8, generator=draw), torch.randint(50, (300,), generator=draw)
losses, gradients = [], []
for way in ("ours", "torch"):
    hidden = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if way == "ours":
        summed = loss.SummedCrossEntropy.apply(hidden, weight, targets, 0.1)
    else:
        logits = hidden @ weight.T
        summed = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    summed.backward()
    losses.append(float(summed)), gradients.append(hidden.grad)
found = {
    "smoothing": [abs(losses[0] / losses[1] - 1), float((gradients[0] - gradients[1]).norm() / gradients[1].norm())],
    "chrf": score(["Oslo is in Norway."], ["Oslo is in Norway."]).values["chrf"],
    "signature": score(["Oslo"], ["Oslo"]).signatures["chrf"],
    "rates": [line["learning_rate"] for line in read_log(Path("stopped/log.jsonl"))],
}
Path("found.json").write_text(json.dumps(found))
"""
FLAGS = (
    *("--optim.schedule", "wsd", "--optim.warmup_ratio", "0.2", "--optim.learning_rate", "0.01"),
    *("--checkpoint.every_steps", "4", "--optim.max_steps", "10"),
)


def house(folder: Path) -> Path:
    """A copy of the code to patch."""
    for name in ("chatlora", "train.py", "evaluate.py"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / name)
    return folder


def apply(title: str, folder: Path, *flags: str) -> None:
    patch = PATCHES[title]
    assert patch is not None, f"{title} has no patch"
    told = subprocess.run(
        ["git", "apply", *flags, "-"], cwd=folder, input=patch[1], text=True, capture_output=True, check=False
    )
    assert told.returncode == 0, f"{title}: {told.stderr}"


def test_the_page_has_its_six_patches() -> None:
    assert list(PATCHES) == [
        "Another optimizer",
        "Label smoothing",
        "A metric",
        "A learning-rate schedule",
        "A row form",
        "A tracker",
    ]


@pytest.mark.parametrize("title", PATCHES)
def test_a_patch_applies_and_is_small(title: str, tmp_path: Path) -> None:
    apply(title, house(tmp_path))
    patch = PATCHES[title]
    assert patch is not None
    assert len(re.findall(r"^\+\+\+ b/", patch[1], re.MULTILINE)) <= 2
    assert len(re.findall(r"^\+(?!\+\+)", patch[1], re.MULTILINE)) <= MOST_LINES


def test_with_all_patches_a_stopped_run_goes_on_as_if_nothing_had_happened(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = house(tmp_path)
    for title in PATCHES:
        apply(title, folder, "-C0")  # their surroundings are each other's
    rows = [json.loads(line)["messages"] for line in (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [
        [{"question": q["content"], "answer": a["content"]} for q, a in zip(r[::2], r[1::2], strict=True)] for r in rows
    ]
    text = "".join(json.dumps({"pairs": each}, ensure_ascii=False) + "\n" for each in pairs)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(world / "my.yaml"), *FLAGS, "--data.train", "pairs.jsonl"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert "stopped after step 5, which is saved" in told.stdout
    found = json.loads((folder / "found.json").read_text())

    whole, stopped = folder / "whole", folder / "stopped"
    for adapter in ("adapter", "adapter-best"):
        name = f"{adapter}/adapter_model.safetensors"
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    kept = {name.split(".")[0] for name in optimizer_state(stopped / "checkpoints" / "step-000010")}
    assert kept == {"momentum_buffer"}, "Muon keeps one tensor a matrix"
    assert max(found["smoothing"]) <= 1e-5, "loss and gradient are those of torch's label smoothing"
    assert found["chrf"] == pytest.approx(100)
    assert "version:" in found["signature"]
    assert found["rates"] == pytest.approx([0.005, 0.01, *[0.01] * 7, 0.00625])
    losses = [json.loads(line)["loss"] for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert logged(stopped / "tensorboard") == pytest.approx(losses, rel=1e-6)


def optimizer_state(checkpoint: Path) -> list[str]:
    """`KIND.PARAMETER` of all that the optimizer's file in a checkpoint holds."""
    from safetensors import safe_open

    (path,) = set(checkpoint.glob("*.safetensors")) - {checkpoint / "adapter.safetensors"}
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def logged(folder: Path) -> list[float]:
    """The losses that TensorBoard shows, in the order of their steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload().Scalars("training/loss")
    return [event.value for event in events]
