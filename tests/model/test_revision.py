"""A model of the hub at a revision: in training, in what the run records, and in what the adapter asks for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
import train
from chatlora import load_for_inference

train.main(sys.argv[1:])
model, _ = load_for_inference("run")
print(json.dumps([model.peft_config["default"].revision, model.get_base_model().name_or_path]))
"""


def test_a_revision_reaches_everything_that_reads_the_model(world: Path, tmp_path: Path) -> None:
    """The hub's cache holds the tag v2 alone: whoever asks for main finds nothing."""
    cache = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(world / "model", cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "v2").write_text(COMMIT)
    flags = ["--model.name_or_path", "owner/model", "--model.revision", "v2", "--optim.max_steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(world / "my.yaml"), *flags, "--run.output_dir", "run"],
        cwd=tmp_path,
        env=os.environ
        | {
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "CHATLORA_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["v2", "owner/model"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["base_model"] == f"commit:{COMMIT}"
