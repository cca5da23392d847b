"""LoRA fine-tuning for chat models: one visible loop, proved masks, honest numbers.

The names below are the Python face. They are imported when first used, so that `import chatlora` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatlora.evaluation.metrics import score
    from chatlora.model.loading import load_for_inference
    from chatlora.reading.formats import parse_row
    from chatlora.rendering.single import render, render_for_evaluation

__version__ = "0.1.0"
__all__ = ["__version__", "load_for_inference", "parse_row", "render", "render_for_evaluation", "score"]

_HOMES = {
    "load_for_inference": "chatlora.model.loading",
    "parse_row": "chatlora.reading.formats",
    "render": "chatlora.rendering.single",
    "render_for_evaluation": "chatlora.rendering.single",
    "score": "chatlora.evaluation.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chatlora' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
