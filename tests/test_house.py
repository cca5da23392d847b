"""What CONTRIBUTING says of the house, read off the code: sizes, circles, and the patches of other people's objects."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "chatlora"
SCRIPTS = [REPOSITORY / "train.py", REPOSITORY / "evaluate.py"]
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, DEEPEST = 300, 60, 3
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)

# What is changed in objects that are not ours, with the reason in CONTRIBUTING.
PATCHED = {
    ("model/lean_lora.py", "module.__class__"),
    ("distributed/engines.py", "PartialState().distributed_type"),
    ("distributed/engines.py", "accelerator.state.distributed_type"),
    ("distributed/engines.py", "accelerator.state.fsdp_plugin"),
    ("distributed/engines.py", "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm']"),
    ("distributed/signals.py", "sys.unraisablehook"),
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*SCRIPTS, *MODULES], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_reader_holds_it_in_mind(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST_FILE
    for function in ast.walk(parsed(path)):
        if isinstance(function, ast.FunctionDef):
            assert function.end_lineno is not None
            assert function.end_lineno - function.lineno < LONGEST_FUNCTION, function.name
            assert depth(function) <= DEEPEST, function.name


def depth(node: ast.AST) -> int:
    """How deep the blocks in a function are nested; `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def test_no_folder_holds_more_than_a_quarter_of_the_house() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    for folder in (path for path in PACKAGE.iterdir() if path.is_dir()):
        assert 4 * sum(size for path, size in lines.items() if folder in path.parents) <= sum(lines.values()), folder


def test_no_module_imports_itself_over_others() -> None:
    names = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in MODULES}
    wanted = {name: {each for each in imported(path) if each in names} for name, path in names.items()}

    def reached(name: str, seen: set[str]) -> Iterator[str]:
        for other in wanted[name] - seen:
            seen.add(other)
            yield other
            yield from reached(other, seen)

    circles = [name for name in names if name in set(reached(name, set()))]
    assert not circles


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_what_is_changed_in_other_peoples_objects_is_named() -> None:
    found = {(str(path.relative_to(PACKAGE)), target) for path in MODULES for target in patched(path)}
    assert found == PATCHED
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"`chatlora/{file}`" in contributing for file, _ in PATCHED)


def patched(path: Path) -> Iterator[str]:
    """Targets of assignments that belong to an imported module, an accelerator, or a class somebody else made."""
    tree = parsed(path)
    modules = {
        alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if not isinstance(each, ast.Attribute | ast.Subscript):
                    continue
                spelled = ast.unparse(each)
                root = spelled.split(".")[0].split("[")[0]
                if spelled.startswith("sys.modules["):  # a module of ours
                    continue
                if root in modules | {"accelerator", "PartialState()"} or spelled.endswith(".__class__"):
                    yield spelled
