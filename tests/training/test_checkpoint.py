"""A checkpoint's files: read back equal, every damage found and named, nothing in them ever run; rotation."""

import pickle
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chatlora.checkpoint_names import published, step_of
from chatlora.errors import CheckpointError
from chatlora.training import checkpoint as checkpoint_module
from chatlora.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    refuse_full_disk,
    rotate,
    sweep,
    why_broken,
    write_checkpoint,
)

KINDS = ("exp_avg", "exp_avg_sq")  # that AdamW keeps for each element
FILES = ("adapter.safetensors", "optimizer.safetensors", "progress.json", "manifest.json")


def state(step: int) -> Checkpoint:
    draws = torch.Generator().manual_seed(step)
    names = ("layers.0.lora_A.weight", "layers.0.lora_B.weight")
    return Checkpoint(
        step,
        {name: torch.randn(3, 5, generator=draws) for name in names},
        {kind: {name: torch.randn(3, 5, generator=draws) for name in names} for kind in KINDS},
        "AdamW",
    )


def bits(checkpoint: Checkpoint) -> bytes:
    tensors = [*checkpoint.adapter.values(), *(t for each in checkpoint.optimizer.values() for t in each.values())]
    return str(checkpoint.step).encode() + b"".join(tensor.numpy().tobytes() for tensor in tensors)


def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    home = write_checkpoint(tmp_path, state(7))
    found = read_checkpoint(home)
    assert home.name == "step-000007"
    assert sorted(path.name for path in home.iterdir()) == sorted(FILES)
    assert found.adapter.keys() == state(7).adapter.keys()
    assert found.optimizer.keys() == set(KINDS)
    assert found.optimizer_class == "AdamW"
    assert bits(found) == bits(state(7))


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = write_checkpoint(tmp_path / "a", state(7)), write_checkpoint(tmp_path / "b", state(7))
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def sign(home: Path) -> None:
    """A manifest that vouches for whatever is there."""
    files = {name: checkpoint_module._signature(home / name) for name in checkpoint_module.SIGNED}
    (home / "manifest.json").write_bytes(checkpoint_module._as_json({"files": files}))


def damages(path: Path, draws: random.Random) -> dict[str, bytes | None]:
    """What a file may turn into; None: it is gone."""
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    torn = content[: len(content) // 2] + b"\0" * (len(content) - len(content) // 2)
    return {
        "flipped": bytes(flipped),
        "shorter by a byte": content[:-1],
        "cut in half": content[: len(content) // 2],
        "empty": b"",
        "zeroed": b"\0" * len(content),
        "torn": torn,
        "longer": content + b"\0",
        "gone": None,
    }


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found_named_and_passed_over(tmp_path: Path, name: str) -> None:
    older = write_checkpoint(tmp_path, state(3))
    newer = write_checkpoint(tmp_path, state(5))
    path, draws = newer / name, random.Random(0)
    whole = path.read_bytes()
    for damage in [each for _ in range(25) for each in damages(path, draws).items()]:
        kind, content = damage
        path.unlink() if content is None else path.write_bytes(content)
        said: list[str] = []
        found = newest_checkpoint(tmp_path, said.append)
        assert found is not None
        assert found.step == 3, kind
        assert bits(found) == bits(state(3))
        assert len(said) == 1
        assert str(newer) in said[0]
        assert name in said[0] or name == "manifest.json"
        path.write_bytes(whole)
    assert why_broken(newer) is None
    assert why_broken(older) is None


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
def test_a_flipped_bit_anywhere_in_the_small_files_is_found(tmp_path: Path, name: str) -> None:
    home = write_checkpoint(tmp_path, state(5))
    whole = (home / name).read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (home / name).write_bytes(flipped)
        assert why_broken(home), f"bit {bit}: {bytes(flipped)!r}"


def test_a_check_of_sizes_alone_would_miss_flipped_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant that the two tests above catch."""
    monkeypatch.setattr(checkpoint_module, "_signature", lambda path: {"bytes": path.stat().st_size, "sha256": ""})
    home = write_checkpoint(tmp_path, state(5))
    content = bytearray((home / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (home / "adapter.safetensors").write_bytes(content)
    assert why_broken(home) is None


def test_a_folder_under_another_step_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, state(5)).rename(tmp_path / "step-000009")
    with pytest.raises(CheckpointError, match="do not belong together"):
        read_checkpoint(tmp_path / "step-000009")


def test_no_good_checkpoint_at_all(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_checkpoint(tmp_path / "nowhere", said.append) is None
    (write_checkpoint(tmp_path, state(5)) / "manifest.json").unlink()
    assert newest_checkpoint(tmp_path, said.append) is None
    assert len(said) == 1


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("signed", [True, False])
def test_a_planted_pickle_never_runs(tmp_path: Path, signed: bool) -> None:
    """In place of any file, with and without a manifest that vouches for it, and under the names others would load."""
    canary = tmp_path / "canary"
    poison = pickle.dumps(Canary(canary))
    folder = tmp_path / "checkpoints"
    write_checkpoint(folder, state(3))
    for name in FILES:
        home = write_checkpoint(folder, state(5))
        for other in ("optimizer.bin", "random_states_0.pkl", "pytorch_model.bin", "custom_checkpoint_0.pkl", "x.pt"):
            (home / other).write_bytes(poison)
        (home / name).write_bytes(poison)
        if signed and name != "manifest.json":
            sign(home)
        found = newest_checkpoint(folder, lambda line: None)
        assert found is not None
        assert found.step == 3
        with pytest.raises(CheckpointError):
            read_checkpoint(home)
        shutil.rmtree(home)
    assert not canary.exists()
    torch.load(_saved(tmp_path / "x.pt", poison), weights_only=False)  # the canary is able to sing
    assert canary.exists()


def _saved(path: Path, content: bytes) -> Path:
    path.write_bytes(b"")
    torch.save(Canary(path.with_name("canary")), path)
    return path


# ---- rotation


def make(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "manifest.json").touch()


FOREIGN = (
    "step-000100.bak",
    "step-7",
    "my-step-000004",
    "step-0000012",
    "notes",
    "best",
    ".writing-step-000003.txt",
    "step-1000000-copy",
)


def foreign_to(folder: Path) -> None:
    for name in FOREIGN:
        make(folder, name)
    (folder / "step-000001").touch()  # a file
    (folder / ".deleting-step-000001").touch()
    (folder / "step-000002").symlink_to(folder / "notes")
    (folder / ".writing-step-000002").symlink_to(folder / "notes")


def play(folder: Path, draws: random.Random) -> None:
    """A random sequence of saves, better and worse losses, kills and resumes; what is there equals the model's."""
    foreign = {path.name for path in folder.iterdir()}
    keep_last, keep_best = draws.randint(1, 4), draws.random() < 0.7
    model: list[int] = []  # the steps that should be there
    losses: dict[int, float] = {}
    step = draws.choice([2, 90, 999_990])
    for _ in range(draws.randint(1, 8)):
        step += draws.randint(1, 9)
        if draws.random() < 0.2:  # killed while it wrote or deleted
            make(folder, draws.choice([".writing-", ".deleting-"]) + f"step-{step:06}")
            sweep(folder)
            continue
        make(folder, f"step-{step:06}")
        model.append(step)
        if draws.random() < 0.8:
            losses[step] = draws.random()
        best = min(losses, key=losses.__getitem__) if losses and keep_best else None
        rotate(folder, keep_last=keep_last, keep=() if best is None else (best,))
        model = [old for old in model if old in sorted(model)[-keep_last:] or old == best]
        names = {path.name for path in folder.iterdir()}
        assert names == foreign | {f"step-{kept:06}" for kept in model}
        assert [step_of(home) for home in published(folder)] == sorted(model)


def play_many(folder: Path, number: int) -> None:
    foreign_to(folder)
    for seed in range(number):
        play(folder, random.Random(seed))
        for home in published(folder):
            shutil.rmtree(home)


def test_rotation_keeps_the_newest_the_best_and_what_is_not_ours(tmp_path: Path) -> None:
    play_many(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rotation_over_ten_thousand_random_sequences(tmp_path: Path) -> None:
    play_many(tmp_path, 10_000)


@pytest.mark.parametrize("broken", ["by name", "without the best", "whatever begins with step-"])
def test_broken_rotations_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    if broken == "by name":
        by_name = lambda folder: sorted(published(folder), key=lambda home: home.name)  # noqa: E731
        monkeypatch.setattr(checkpoint_module, "published", by_name)
    elif broken == "without the best":
        forgetful = partial(lambda real, folder, keep_last, keep: real(folder, keep_last=keep_last, keep=()), rotate)
        monkeypatch.setattr(f"{__name__}.rotate", forgetful)
    else:
        anything = lambda folder: sorted(path for path in folder.glob("step-*") if path.is_dir())  # noqa: E731
        monkeypatch.setattr(checkpoint_module, "published", anything)
    with pytest.raises((AssertionError, OSError)):
        play_many(tmp_path, 300)


# ---- room on the disk


def test_a_disk_too_small_for_the_run_is_refused_with_the_bytes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    refuse_full_disk(tmp_path / "not" / "there" / "yet", 1000, keep_last=2)
    with pytest.raises(CheckpointError, match=r"up to [\d,]+ bytes .* [\d,]+ are free .*checkpoint\.keep_last"):
        refuse_full_disk(tmp_path, free // 4, keep_last=2)


def test_what_a_run_has_written_already_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, state(3))
    size = sum(path.stat().st_size for path in (tmp_path / "step-000003").iterdir())
    parameters = size // 4
    needed = 4 * parameters * (3 * 3 + 2)
    usage = shutil.disk_usage(tmp_path)
    for free, refused in ((needed - size, False), (needed - size - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if refused:
            with pytest.raises(CheckpointError):
                refuse_full_disk(tmp_path, parameters, keep_last=1)
        else:
            refuse_full_disk(tmp_path, parameters, keep_last=1)
