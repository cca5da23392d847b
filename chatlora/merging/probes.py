"""What the merged model and the adapter on its base are both asked: prompts with answers that are known."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from chatlora.data.evaluation_set import EvalSample

NUM_PROBES = 8
LONGEST_PROMPT, LONGEST_ANSWER = 512, 64  # tokens; of a longer prompt the end is taken, of an answer the beginning

# For where there are no rows. Languages and forms that tokenizers cut differently.
TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Q: How many legs do three spiders and two cats have together?\nA: Three spiders have 24 legs, two cats have 8.",
    "故宫位于北京市中心，是明清两代的皇家宫殿，旧称紫禁城。",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    'Return JSON only. {"name": "Lima", "country": "Peru", "population": 10092000, "coastal": true}',
    "Sehr geehrte Frau Schmidt, vielen Dank für Ihre Nachricht vom 3. Mai; wir melden uns bis Freitag.",
)


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids: a prompt [P] and what follows it [N]."""

    prompt: list[int]
    answer: list[int]


def probes_of_samples(samples: Sequence[EvalSample]) -> list[Probe]:
    """Of all samples, as many as are asked, evenly spread."""
    step = max(1, len(samples) / NUM_PROBES)
    chosen = [samples[int(index * step)] for index in range(min(NUM_PROBES, len(samples)))]
    return [
        Probe(sample.input_ids[-LONGEST_PROMPT:], sample.references[0][:LONGEST_ANSWER])
        for sample in chosen
        if sample.input_ids and sample.references[0]
    ]


def built_in_probes(tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Texts cut in the middle, as the tokenizer reads them."""
    read = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [Probe(ids[: len(ids) // 2], ids[len(ids) // 2 :][:LONGEST_ANSWER]) for ids in read if len(ids) > 1]
