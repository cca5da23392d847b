"""Run as a script: what vLLM's or SGLang's own loader says of adapters, printed as one line of JSON.

    python asked_loaders.py vllm|sglang WHEELS ADAPTER...

The files are taken from the servers' wheels as they are. What they import of the rest, which needs a GPU and is not
used in reading an adapter, is an empty module here.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


class _Anything(types.ModuleType):
    """A module in which every name is a class of nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return logger if name == "init_logger" else type(name, (), {})


class _Rest(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the server's modules that were not unpacked."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        known = name.split(".")[0] in ("vllm", "sglang")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def logger(name: str) -> Any:
    found: Any = logging.getLogger(name)
    found.info_once = found.warning_once = lambda *arguments, **options: None
    return found


def unpacked(wheels: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, wheels / f"{name.replace('.', '/')}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def vllm(wheels: Path, adapter: Path) -> dict[str, Any]:
    """PEFTHelper's rank and scaling for each module, as `LoRAModel.from_lora_tensors` asks for them."""
    sys.modules.setdefault("regex", __import__("re"))
    helper = unpacked(wheels, "vllm.lora.peft_helper").PEFTHelper.from_local_dir(str(adapter), 4096)
    parse = unpacked(wheels, "vllm.lora.utils").parse_fine_tuned_lora_name
    modules = {parse(name)[0] for name in load_file(adapter / "adapter_model.safetensors")}
    return {
        "scales": {module: helper.get_rank_and_scaling(module)[1] for module in modules},
        "refused": helper._validate_features(),
    }


def sglang(wheels: Path, adapter: Path) -> dict[str, Any]:
    """LoRAAdapter's one scaling, and the tensors for which `get_target_module_name` finds no place."""
    utils = unpacked(wheels, "sglang.srt.lora.utils")
    config = unpacked(wheels, "sglang.srt.lora.lora_config").LoRAConfig(str(adapter))
    vars(importlib.import_module("sglang.srt.layers.utils"))["get_layer_id"] = layer_of
    loader = unpacked(wheels, "sglang.srt.lora.lora")
    base: Any = types.SimpleNamespace(num_hidden_layers=2, architectures=[], model_type="")
    loaded = loader.LoRAAdapter("adapter", config, base, None, None)
    loaded.initialize_weights_from_tensors(load_file(adapter / "adapter_model.safetensors"))
    places = utils.get_normalized_target_modules(config.target_modules)
    without_place = []
    for layer in loaded.layers:
        for name in layer.weights:
            try:
                utils.get_target_module_name(name, places)
            except ValueError:
                without_place.append(name)
    return {"scaling": loaded.scaling, "without_place": without_place, "use_dora": config.use_dora}


def layer_of(name: str) -> int | None:
    """sglang/srt/layers/utils, `get_layer_id`: the number behind `layers.`."""
    words = name.split(".")
    return int(words[words.index("layers") + 1]) if "layers" in words else None


if __name__ == "__main__":
    sys.meta_path.append(_Rest())
    ask = {"vllm": vllm, "sglang": sglang}[sys.argv[1]]
    print(json.dumps([ask(Path(sys.argv[2]), Path(adapter)) for adapter in sys.argv[3:]]))
