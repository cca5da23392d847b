"""Random ChatGLM3 checkpoints in the original's form, and the original's rules for token ids, said a second time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chatlora.chatglm3.naming import known_tensors

TINY: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 24,
    "hidden_size": 16,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 1,
    "num_attention_heads": 2,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 64,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "tie_word_embeddings": False,
}


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    num_shards: int = 1,
    suffix: str = "safetensors",
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Write config.json and random weights under the original's names; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.rand(known.shape, generator=generator).sub(0.5).to(dtype or torch.float16)
        for name, known in known_tensors(config).items()
    }
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(weights)
    cut = [
        names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        for number in range(num_shards)
    ]
    weight_map = {}
    for number, some in enumerate(cut, start=1):
        file = f"{stem}-{number:05}-of-{num_shards:05}.{suffix}" if num_shards > 1 else f"{stem}.{suffix}"
        save = save_file if suffix == "safetensors" else torch.save
        save({name: weights[name] for name in some}, folder / file)
        weight_map.update(dict.fromkeys(some, file))
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return weights


ROLES = {"system": 64794, "user": 64795, "assistant": 64796, "observation": 64797}
PREFIX, EOS = [64790, 64792], 2


class Original:
    """What the original made of conversations, with its own tokenizer."""

    def __init__(self, tokenizer_model: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.encode = SentencePieceProcessor(model_file=str(tokenizer_model)).encode

    def message(self, role: str, content: str, metadata: str = "") -> list[int]:
        return [ROLES[role], *self.encode(f"{metadata}\n"), *self.encode(content)]

    def training(self, messages: Sequence[dict[str, str]], max_length: int) -> tuple[list[int], list[int]]:
        """input_ids and labels: a token is a target where the one before it belongs to an assistant or observation."""
        ids, learned = list(PREFIX), [False, False]
        for message in messages:
            spelled = self.message(**message)
            ids += spelled
            learned += [message["role"] in ("assistant", "observation")] * len(spelled)
        ids.append(EOS)
        labels = [id if target else -100 for id, target in zip(ids, [False, *learned], strict=True)]
        return ids[:max_length], labels[:max_length]

    def evaluation(
        self, messages: Sequence[dict[str, str]], max_input: int, max_output: int
    ) -> list[tuple[list[int], list[int]]]:
        """(input_ids, output_ids) of each assistant message in front of which the context is not too long."""
        samples, context = [], list(PREFIX)
        for message in messages:
            if len(context) >= max_input:
                break
            spelled = self.message(**message)
            if message["role"] == "assistant":
                samples.append(([*context, ROLES["assistant"]], [*spelled[1:], EOS][:max_output]))
            context += spelled
        return samples
