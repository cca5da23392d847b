"""A model's answers to probes: its scores where the answers are known, and its own greedy text.

N: tokens of all known answers together, V: the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from chatlora.evaluation.generation import Model, greedy_settings, only_these_settings
from chatlora.merging.probes import Probe

NUM_TEXTS, NEW_TOKENS = 4, 24  # generation is what takes the time on a CPU


@dataclass(frozen=True, slots=True)
class Text:
    """Greedy ids, and at each of them how far the best token was before the second, in logits."""

    ids: list[int]
    margins: list[float]


@dataclass(frozen=True, slots=True)
class Answers:
    """logits: [N, V], fp32. texts: of the first probes."""

    logits: torch.Tensor
    texts: list[Text]


@torch.no_grad()
def answers_of(
    model: Model, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> Answers:
    """One probe at a time: nothing is padded, which recurrent layers would see."""
    texts = [_greedy(model, probe, tokenizer, stop_ids) for probe in probes[:NUM_TEXTS]]
    return Answers(logits_of(model, probes), texts)


@torch.no_grad()
def logits_of(model: Model, probes: Sequence[Probe]) -> torch.Tensor:
    """[N, V] in fp32 on the CPU: what the model says at each token of the answers, the one before it given."""
    rows = []
    for probe in probes:
        ids = torch.tensor([probe.prompt + probe.answer], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        rows.append(logits[len(probe.prompt) - 1 : -1].float().cpu())
    return torch.cat(rows)


def _greedy(model: Model, probe: Probe, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Text:
    pad = min(stop_ids) if tokenizer.pad_token_id is None and stop_ids else tokenizer.pad_token_id
    settings = greedy_settings(NEW_TOKENS, stop_ids, pad if pad is not None else 0)
    settings.output_logits, settings.return_dict_in_generate = True, True
    prompt = torch.tensor([probe.prompt], device=model.device)
    with only_these_settings(model):
        told = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    best = [step[0].float().topk(2).values for step in told.logits]
    ids = told.sequences[0, len(probe.prompt) :].tolist()
    return Text(ids, [float(top[0] - top[1]) for top in best])
