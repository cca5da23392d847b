"""Imports point one way, the light rooms stay light, and nothing is written twice."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "chatlora"

# From the ground up. A room imports from its own layer and from those below it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "cache", "disk", "hub", "progress", "scripts", "terminal"}),
    frozenset({"config", "config_rows", "config_files", "config_paths", "settings", "yaml_text"}),
    frozenset({"checkpoint_names", "run_log", "run_directory", "run_lock", "embedded_model", "weights"}),
    frozenset({"reading"}),
    frozenset({"rendering"}),
    frozenset({"data"}),
    frozenset({"distributed"}),
    frozenset({"model"}),
    frozenset({"inspection"}),
    frozenset({"chatglm3", "training", "evaluation"}),
    frozenset({"merging", "chat"}),
    frozenset({"commands", "__init__", "__main__"}),
)
WITHOUT_TORCH = (
    "chatlora",
    "chatlora.errors",
    "chatlora.config",
    "chatlora.config_files",
    "chatlora.run_directory",
    "chatlora.reading.conversation",
    "chatlora.reading.formats",
    "chatlora.reading.sources",
    "chatlora.data.batches",
    "chatlora.evaluation.metrics",
    "chatlora.model.folder",
    "chatlora.training.named_files",
    "chatlora.training.schedule",
    "train",
    "evaluate",
)


def level(room: str) -> int:
    (found,) = [index for index, layer in enumerate(LAYERS) if room in layer]
    return found


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("chatlora.")}
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    above = {room for room in imported_rooms(path) if level(room) > level(own)}
    assert not above, f"{path.relative_to(REPOSITORY)} imports from above: {above}"


def test_no_room_but_the_scripts_imports_a_script() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {"train", "evaluate"} & {alias.name for alias in node.names}, path


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_rooms_do_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr or f"{module} imports torch"


def test_no_block_of_six_lines_stands_twice() -> None:
    """Blank lines, comments, imports and lone punctuation do not count."""
    blocks: dict[tuple[str, ...], str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        skipped = {number for node in imports for number in range(node.lineno, (node.end_lineno or 0) + 1)}
        numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
        lines = [(number, line) for number, line in numbered if number not in skipped and re.search(r"^[^#].*\w", line)]
        for start in range(len(lines) - 5):
            block = tuple(line for _, line in lines[start : start + 6])
            place = f"{path.relative_to(REPOSITORY)}:{lines[start][0]}"
            assert block not in blocks, f"{place} and {blocks[block]} are the same: one of them can go"
            blocks[block] = place


def test_training_does_not_know_evaluation() -> None:
    for path in (PACKAGE / "training").rglob("*.py"):
        assert "evaluation" not in imported_rooms(path), path


def test_without_deepspeed_everything_is_imported_all_the_same() -> None:
    """As README's first line installs it: the optional package is not there."""
    rooms = "chatlora.distributed.runtime, chatlora.training.setup, chatlora.training.export, chatlora.evaluation.setup"
    code = f"import sys; sys.modules['deepspeed'] = None; import {rooms}"
    told = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
