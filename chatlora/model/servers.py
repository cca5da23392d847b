"""Which servers do not take an adapter as it is, by name, with what to do: said after an export, and on its card.

Read in vLLM 0.33.0, SGLang 0.5.23, llama.cpp's convert_lora_to_gguf.py and PEFT 0.21; tests/servers.py tells where.
What transformers 5.23 does by itself was tried (tests/chat/test_transformers_serve.py).
"""

from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig
from transformers import PreTrainedModel

from chatlora.model.experts import BY_HAND, SERVED_STACKED, expert_names, has_single, has_stacked, model_type_of

MERGE = "merge it into the model"
DORA = "takes no DoRA adapter"
LOST = (
    "loses the magnitudes of a DoRA adapter where it opens the folder itself, as `transformers serve` does, with a "
    f"warning: load it with PEFT, or {MERGE}"
)
MIXED_FLAG = "--enable-mixed-moe-lora-format"
MIXED = f"takes these experts when it is started with {MIXED_FLAG}"


def not_taken_in(base: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Server -> what it does with the adapter in `folder` other than serve it, and the way out."""
    settings = PeftConfig.from_pretrained(str(folder))
    return not_taken(base, settings) if isinstance(settings, PeftLoraConfig) else {}


def not_taken(base: PreTrainedModel, settings: PeftLoraConfig) -> dict[str, str]:
    """The same of the settings in an adapter's folder. Empty where all take it."""
    if settings.use_dora:
        return {**dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), f"{DORA}: {MERGE}"), "transformers": LOST}
    model_type, notes = model_type_of(base), {}
    if has_stacked(settings):
        single = "lora.expert_format per_expert writes it for it, or " if expert_names(base) else ""
        notes = dict.fromkeys(("SGLang", "llama.cpp"), f"takes no stacked experts: {single}{MERGE}")
        if model_type not in SERVED_STACKED:
            notes["vLLM"] = f"{MIXED} and the request says is_3d_lora_weight"
    elif has_single(base, settings):
        if model_type in SERVED_STACKED:
            notes["vLLM"] = MIXED
        if model_type in BY_HAND:
            notes["PEFT"] = (
                "leaves out this family's experts where each has its own tensors, with a warning: open it with "
                "chatlora.model.loading.load_for_inference, or set lora.expert_format to stacked"
            )
    return notes
