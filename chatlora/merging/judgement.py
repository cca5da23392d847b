"""Whether a merged model is base and adapter: its distance from them, against that of rounding alone.

To store a sum of weights in the checkpoint's type rounds it, and that moves logits. How far is measured on the same
probes: the adapter is merged in memory by PEFT and rounded once, by code that shares nothing with what wrote the files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from chatlora.merging.answers import Answers, Text

TIMES_ROUNDING = 2.0  # the tolerance
FLOOR = 16  # of fp32's own steps at the largest logit: what the order of additions may cost


@dataclass(frozen=True, slots=True)
class Distance:
    """Of a model from base and adapter: largest difference of logits, KL in nats (mean and largest over positions).

    same_best: share of positions with the same most likely token.
    """

    logits: float
    kl: float
    kl_max: float
    same_best: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The merged model's distance, what rounding costs, and how far the base is without the adapter."""

    merged: Distance
    rounding: Distance
    base: Distance
    tolerance: Mapping[str, float]  # by field of Distance
    texts: int
    same_texts: int
    same_texts_rounded: int
    faults: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def distance(reference: torch.Tensor, other: torch.Tensor) -> Distance:
    """Both [N, V]. KL(reference, other)."""
    divergences = []
    for ours, theirs in zip(torch.split(reference, 64), torch.split(other, 64), strict=True):
        expected = ours.double().log_softmax(-1)
        divergences.append((expected.exp() * (expected - theirs.double().log_softmax(-1))).sum(-1))
    kl = torch.cat(divergences).clamp(min=0)
    return Distance(
        float((reference - other).abs().max()),
        float(kl.mean()),
        float(kl.max()),
        float((reference.argmax(-1) == other.argmax(-1)).double().mean()),
    )


def judge(reference: Answers, rounded: Answers, base: torch.Tensor, merged: Answers) -> Verdict:
    """reference: of base and adapter. rounded: of PEFT's merge, rounded. base: logits without the adapter."""
    found, rounding = distance(reference.logits, merged.logits), distance(reference.logits, rounded.logits)
    floor = FLOOR * torch.finfo(torch.float32).eps * max(1.0, float(reference.logits.abs().max()))
    tolerance = {
        "logits": TIMES_ROUNDING * rounding.logits + floor,
        "kl": TIMES_ROUNDING * rounding.kl + floor**2,
        "kl_max": TIMES_ROUNDING * rounding.kl_max + floor**2,
    }
    faults = []
    if not merged.logits.isfinite().all():
        faults.append("its logits are not finite")
    for name, limit in tolerance.items():
        value = getattr(found, name)
        if not value <= limit:  # NaN is a fault too
            faults.append(f"{WORDS[name]} is {value:.3g}, and {limit:.3g} is allowed")
    faults += texts_that_differ(reference.texts, merged.texts, 2 * tolerance["logits"])
    return Verdict(
        merged=found,
        rounding=rounding,
        base=distance(reference.logits, base),
        tolerance=tolerance,
        texts=len(reference.texts),
        same_texts=_same(reference.texts, merged.texts),
        same_texts_rounded=_same(reference.texts, rounded.texts),
        faults=tuple(faults),
    )


WORDS = {
    "logits": "the largest difference of logits",
    "kl": "the mean KL divergence in nats",
    "kl_max": "the largest KL divergence in nats",
}


def texts_that_differ(reference: Sequence[Text], other: Sequence[Text], close: float) -> list[str]:
    """Texts that part where the best token was more than `close` before the second: logits that moved by half of it
    cannot have done that."""
    faults = []
    for number, (ours, theirs) in enumerate(zip(reference, other, strict=True), start=1):
        pairs = zip(ours.ids, theirs.ids, strict=False)
        parted = next((at for at, (left, right) in enumerate(pairs) if left != right), None)
        if parted is not None and ours.margins[parted] > close:
            faults.append(
                f"greedy text {number} parts from the adapter's at token {parted}, where the adapter's choice was "
                f"{ours.margins[parted]:.3g} before the next and {close:.3g} is a near tie"
            )
    return faults


def _same(reference: Sequence[Text], other: Sequence[Text]) -> int:
    return sum(ours.ids == theirs.ids for ours, theirs in zip(reference, other, strict=True))
