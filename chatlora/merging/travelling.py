"""The small files of a merged model: the base's settings, and the tokenizer, template and stop tokens of training."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from chatlora.disk import sync

# Weights are written anew, and a trainer's state and code are no part of a model.
STAY = ("*.safetensors*", "*.bin", "*.index.json", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.py")
# No card or receipt is true of the result, and what the base's template was told is not what the adapter's was.
OF_THE_BASE_ALONE = ("README*.md", "merge.json", "conversion.json", "embedded.json", "chatlora.json")
OF_THE_ADAPTER_ALONE = ("adapter_config.json", "README.md")
# Templates that would be taken before or beside the one of training.
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def files_that_travel(base: Path, adapter: Path) -> dict[str, Path]:
    """Name in the merged folder -> the file to copy."""
    found = {path.name: path for path in _small(base) if not any(path.match(each) for each in OF_THE_BASE_ALONE)}
    own = {path.name: path for path in _small(adapter) if path.name not in OF_THE_ADAPTER_ALONE}
    if "tokenizer_config.json" in own:
        found = {name: path for name, path in found.items() if name not in TEMPLATES}
    return found | {name: path for name, path in own.items() if name != "config.json"}


def copy_all(files: Mapping[str, Path], target: Path) -> None:
    for name, path in files.items():
        shutil.copyfile(path, target / name)
        sync(target / name)


def _small(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [path for path in files if not any(path.match(each) for each in STAY)]
