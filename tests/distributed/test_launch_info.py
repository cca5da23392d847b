"""What is read off the machine: NVIDIA's cards, with a driver or without, and DeepSpeed's JSON."""

from pathlib import Path

import pytest

from chatlora.config import Config
from chatlora.distributed.launch_info import _num_cards, launch_info_of
from chatlora.errors import LaunchError


def test_cards_are_counted_without_a_driver(tmp_path: Path) -> None:
    assert _num_cards(tmp_path) == 0
    for address, vendor, kind in (
        ("0000:17:00.0", "0x10de", "0x030200"),
        ("0000:2a:00.0", "0x10de", "0x030000"),
        ("0000:2a:00.1", "0x10de", "0x040300"),  # the sound of the one before
        ("0000:00:02.0", "0x8086", "0x030000"),
    ):
        device = tmp_path / "sys" / "bus" / "pci" / "devices" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    assert _num_cards(tmp_path) == 2
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert _num_cards(tmp_path) == 3


def test_deepspeeds_json_is_found_from_the_repository_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate_configs/zero3.json")
    assert (launch_info_of(Config()).deepspeed or {})["zero_optimization"]["stage"] == 3
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mine/zero3.json")
    with pytest.raises(LaunchError, match=r"mine/zero3\.json is neither in .* give its whole path"):
        launch_info_of(Config())
