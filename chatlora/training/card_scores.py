"""The scores in an adapter's card: made anew from RUN/eval whenever there are new ones, all else left as it stands.

A card is its owner's to edit. What is written here is the section between two marks and, of the metadata, the
results in `model-index` whose every metric has a signature; a card without the marks is left alone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chatlora.disk import name_beside, settle, sha256_of, sync
from chatlora.model.origin import FRONT_MATTER, front_matter, public_name

CARD, WEIGHTS = "README.md", "adapter_model.safetensors"
ADAPTERS = ("adapter", "adapter-best")
START, END = (
    "<!-- scores: evaluate.py writes from here on; all else in this file is yours -->",
    "<!-- end of scores -->",
)
SECTION = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
INDEX = re.compile(r"^model-index:.*\n(?:[ \t-].*\n)*", re.MULTILINE)
NONE_YET = "None yet: `chatlora evaluate RUN --compare base` writes them here."


@dataclass(frozen=True, slots=True)
class Scored:
    """What RUN/eval/NAME/scores.json says of an adapter, and RUN/eval/NAME-base of its base on the same samples."""

    name: str
    adapter: dict[str, Any]
    base: dict[str, Any] | None

    @property
    def data(self) -> list[str]:
        return [public_name(path) for path in self.adapter["data"]]


def refresh_cards(run: Path) -> list[Path]:
    """Write the scores there are into the cards of a run's adapters. Returns the cards that have changed.

    Raises OSError or UnicodeDecodeError where one cannot be read or written.
    """
    changed = []
    for card in (run / name / CARD for name in ADAPTERS):
        if not card.is_file():
            continue
        text = card.read_bytes().decode("utf-8")  # line ends as they are
        new = with_scores(text, run.absolute().name, scores_of(run, card.parent))
        if new != text:
            _replace(card, new, name_beside(run / CARD))
            changed.append(card)
    return changed


def _replace(card: Path, text: str, beside: Path) -> None:
    """Whole or not at all. beside: in the run, so that a kill leaves no file with a host's name where one publishes."""
    try:
        beside.write_bytes(text.encode("utf-8"))
        settle(beside)
        beside.replace(card)
        sync(card.parent)
    finally:
        beside.unlink(missing_ok=True)


def scores_of(run: Path, adapter: Path) -> list[Scored]:
    """What stands in the run's eval/ of these very weights."""
    sha256 = sha256_of(adapter / WEIGHTS)
    told = {path.parent.name: _read(path) for path in sorted((run / "eval").glob("*/scores.json"))}
    found = []
    for name, scores in told.items():
        if scores is None or scores["adapter"] is None or scores["inputs"]["adapter_sha256"] != sha256:
            continue
        base = told.get(f"{name}-base")
        of_same = base is not None and base["adapter"] is None and base["inputs"] == scores["inputs"]
        found.append(Scored(name, scores, base if of_same else None))
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """None where it is broken, or of an older version."""
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = isinstance(told["inputs"]["adapter_sha256"], str) and {"adapter", "data", "decoding"} <= told.keys()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return told if complete else None


def with_scores(card: str, model_name: str, found: Sequence[Scored]) -> str:
    """The card with these scores in its section and its metadata; as it is where its section is not there once."""
    if len(SECTION.findall(card)) != 1:
        return card
    section = "\n\n".join(map(_section, found)) or NONE_YET
    card = SECTION.sub(lambda _: f"{START}\n{section}\n{END}", card)
    return _with_index(card, model_name, [_result(one) for one in found])


def _section(scored: Scored) -> str:
    told, base = scored.adapter, scored.base
    lines = [
        f"`{scored.name}`: {told['samples']:,} samples of {', '.join(scored.data)}; greedy, up to "
        f"{told['decoding']['max_new_tokens']:,} tokens, {told['decoding']['precision']}",
        "",
        "| measure | base | adapter | signature |",
        "|---|---|---|---|",
    ]
    for name, score in told["scores"].items():
        before = "-" if base is None else f"{base['scores'][name]['value']:.2f}"
        signature = score["signature"].replace("|", "\\|")
        lines.append(f"| {name} | {before} | {score['value']:.2f} | `{signature}` |")
    return "\n".join(lines)


def _result(scored: Scored) -> dict[str, Any]:
    """One of `model-index`'s results, as the hub defines them."""
    data = ", ".join(scored.data)
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": data, "name": data, "split": scored.name},
        "metrics": [
            {
                "type": name.partition("-")[0],  # rouge, bleu, sacrebleu
                "name": name,
                "value": round(score["value"], 4),
                "args": {"signature": score["signature"]},
            }
            for name, score in scored.adapter["scores"].items()
        ],
    }


def _with_index(card: str, model_name: str, results: list[dict[str, Any]]) -> str:
    """Letter by letter the same but for `model-index`; as it is where the metadata does not take that."""
    found = FRONT_MATTER.match(card)
    if found is None:
        return card
    before = front_matter(card)
    try:
        index = _index(before.get("model-index"), model_name, results)
    except (TypeError, ValueError, KeyError):  # it is of another form: whoever wrote it knows why
        return card
    made = {"model-index": index} if index else {}
    block = yaml.safe_dump(made, sort_keys=False, allow_unicode=True) if made else ""
    new = card[: found.start(1)] + INDEX.sub("", found.group(1)) + block + card[found.end(1) :]
    wanted = {name: value for name, value in before.items() if name != "model-index"} | made
    return new if front_matter(new) == wanted else card


def _index(there: Any, model_name: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`model-index` with these results in the place of the earlier ones; those that were not made here stay."""
    if there is None:
        return [{"name": model_name, "results": results}] if results else []
    (model,) = there
    others = [one for one in model["results"] if not _made_here(one)]
    return [{**model, "results": [*results, *others]}] if results or others else []


def _made_here(result: dict[str, Any]) -> bool:
    return all("signature" in (metric.get("args") or {}) for metric in result["metrics"])
