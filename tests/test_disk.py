"""Files are there whole or not at all, and as readable as the umask says: those of a run and of a converted model."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

import evaluate
import train
from chatlora.chatglm3.checkpoint import convert_checkpoint
from chatlora.disk import PARTIAL, sweep, whole_lines, write_json, write_text, written_beside
from chatlora.run_directory import read_status
from tests.chatglm3_checkpoints import TINY, write_checkpoint
from tests.syscalls import AVAILABLE, Call, trace

UMASKS = (0o022, 0o027)


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def unlike_umask(folder: Path, umask: int) -> list[str]:
    """The files and folders that are not as readable as the umask says, with their modes."""
    wrong = []
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            wrong.append(f"{path.relative_to(folder)} {mode:o}")
    return wrong


def test_every_file_of_a_finished_run_follows_the_umask(run: Callable[..., Path], world: Path, umask: int) -> None:
    rows = (world / "rows.jsonl").read_text("utf-8").splitlines()[:2]
    Path("test.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    folder = run("--optim.max_steps", "5", "--data.test", "test.jsonl", "--evaluation.max_new_tokens", "3")
    evaluate.main([str(folder), "--compare", "base"])
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written >= {
        "adapter/adapter_model.safetensors",
        "adapter-best/adapter_model.safetensors",
        "checkpoints/step-000005/adapter.safetensors",
        "checkpoints/step-000005/manifest.json",
        "config.yaml",
        "log.jsonl",
        "status.json",
        "eval/test/predictions.jsonl",
        "eval/test-base/scores.json",
    }
    assert unlike_umask(folder, umask) == []


def test_a_converted_model_follows_the_umask(tmp_path: Path, umask: int) -> None:
    write_checkpoint(tmp_path / "old", TINY, num_shards=2)
    convert_checkpoint(tmp_path / "old", tmp_path / "new", lambda line: None)
    assert (tmp_path / "new" / "model-00001-of-00002.safetensors").is_file()
    assert unlike_umask(tmp_path / "new", umask) == []


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"old": 1})
    with written_beside(tmp_path / "folder") as beside:
        beside.mkdir()
        (beside / "old").touch()
    for name in ("file", "folder"):
        with suppress(RuntimeError), written_beside(tmp_path / name) as beside:
            beside.mkdir()
            (beside / "half").touch()
            raise RuntimeError
    assert json.loads((tmp_path / "file").read_text("utf-8")) == {"old": 1}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["file", "folder"]
    with written_beside(tmp_path / "folder") as beside:
        beside.mkdir()
        (beside / "new").touch()
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["file", "folder", "new"]


def test_only_what_a_killed_process_was_writing_is_swept(tmp_path: Path) -> None:
    (tmp_path / f".adapter.4711{PARTIAL}").mkdir()
    (tmp_path / f".adapter.4711{PARTIAL}" / "half").touch()
    (tmp_path / f".status.json.4711{PARTIAL}").touch()
    (tmp_path / "mine.partial").touch()
    sweep(tmp_path, "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {f".status.json.4711{PARTIAL}", "mine.partial"}
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.partial"]


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"a": "\u2028"}\n{"a": 2}\n{"a": 3', "utf-8")
    assert whole_lines(tmp_path / "log") == [{"a": "\u2028"}, {"a": 2}]


# ---- what is on the disk when


def write_adapter(folder: Path) -> None:
    with written_beside(folder) as beside:
        (beside / "more").mkdir(parents=True)
        save_file({"weight": ones(3)}, beside / "adapter.safetensors")
        (beside / "more" / "card.md").write_text("card")


def out_of_order(calls: list[Call], path: Path, files: list[str]) -> list[str]:
    """Which of the files, or folders, was not on the disk when `path` appeared, or `path` itself afterwards."""
    (published,) = [
        at for at, call in enumerate(calls) if call.name.startswith("rename") and call.path.endswith(PARTIAL)
    ]
    beside = calls[published].path
    synced = {call.path: at for at, call in enumerate(calls) if call.name == "fsync"}
    early = [name for name in files if synced.get(f"{beside}{name}", published) >= published]
    return early + ([] if synced.get(str(path.parent), -1) > published else ["the folder's list of names"])


@pytest.mark.skipif(not AVAILABLE, reason="system calls are watched on Linux, x86-64 and arm64")
@pytest.mark.parametrize("broken", ["", "unsynced"])
def test_all_of_it_is_on_the_disk_before_it_appears(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:
        monkeypatch.setattr("chatlora.disk.sync", lambda path: None)
    folder, file = tmp_path / "adapter", tmp_path / "status.json"
    calls = trace(lambda: write_adapter(folder), tmp_path)
    found = out_of_order(calls, folder, ["", "/adapter.safetensors", "/more", "/more/card.md"])
    assert len(found) == (5 if broken else 0), found
    found = out_of_order(trace(lambda: write_text(file, "done"), tmp_path), file, [""])
    assert len(found) == (2 if broken else 0), found


@pytest.mark.skipif(not AVAILABLE, reason="system calls are watched on Linux, x86-64 and arm64")
def test_the_adapters_are_on_the_disk_before_the_run_is_done(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATLORA_CACHE", str(world / "cache"))
    run = tmp_path / "run"
    argv = [str(world / "my.yaml"), "--run.output_dir", str(run), "--optim.max_steps", "1"]
    calls = trace(lambda: train.main(argv), tmp_path)
    assert read_status(run)["state"] == "done"
    status = f"{run}/.status.json."
    done = max(at for at, call in enumerate(calls) if call.name.startswith("rename") and call.path.startswith(status))
    synced = [call.path for call in calls[:done] if call.name == "fsync"]
    for name in ("adapter", "adapter-best"):
        files = [path.name for path in (run / name).iterdir()]
        assert "adapter_model.safetensors" in files
        unsynced = [file for file in files if not any(f"/.{name}." in path and path.endswith(file) for path in synced)]
        assert unsynced == []
