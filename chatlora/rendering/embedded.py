"""Chat templates that come with the package, `model.chat_template: embedded:NAME`.

Two kinds. Most are a family's layout of plain text, or of all it knows, written here. `completed` is the tokenizer's
own template behind passes that tell in text what it has no place for (completion.py). A pass rewrites the messages
before a template sees them; it is Jinja too, so that what is saved with an adapter is one template like any other.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatlora.embedded_model import EMBEDDED
from chatlora.errors import ModelError, did_you_mean

FOLDER = Path(__file__).with_name("templates")
COMPLETED = "completed"
REPLY = "reply"
# In the order in which they run: tools add system messages, the last reply is taken with its calls told in it, and only
# what is left is cut into parts.
PASSES = ("thinking", "empty_thought", "thoughts", "tools", "system", REPLY, "parts")


class Family(NamedTuple):
    """The control tokens that its layout takes, and the passes that its file needs to render everything."""

    tokens: tuple[str, ...]
    passes: tuple[str, ...] = ("thoughts", "tools")


FAMILIES = {
    "chatml": Family(("<|im_start|>", "<|im_end|>")),
    "deepseek-r1": Family(("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), ()),
    "gemma": Family(("<start_of_turn>", "<end_of_turn>")),
    "llama3": Family(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "phi3": Family(("<|user|>", "<|assistant|>", "<|end|>")),
    "zephyr": Family(()),
}


def embedded_name(chat_template: Path | str | None) -> str | None:
    """`NAME` of `embedded:NAME`; None where it is a file or nothing. Raises ModelError where there is no such name."""
    given = str(chat_template or "")
    if not given.startswith(EMBEDDED):
        return None
    name, known = given.removeprefix(EMBEDDED), [*FAMILIES, COMPLETED]
    if name not in known:
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise ModelError(f"model.chat_template: there is no embedded template '{name}'{hint}")
    return name


def family_template(name: str) -> str:
    return behind(FAMILIES[name].passes, _text(f"{name}.jinja"))


def fitting_family(tokenizer: Any) -> str:
    """`embedded:NAME` for a tokenizer without a template: of a family whose control tokens it has, else of none."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return EMBEDDED + next(name for name, family in FAMILIES.items() if known.issuperset(family.tokens))


def behind(passes: Sequence[str], template: str) -> str:
    """The template behind these passes, in the order of PASSES, and after them to the letter what it is alone."""
    if REPLY in passes:  # Jinja takes one line break from the end of a template
        template = template.removesuffix("\n") + _text("passes/reply_end.jinja")
    chosen = [_text(f"passes/{name}.jinja").rstrip() for name in PASSES if name in passes]
    # An empty expression: behind a block, Jinja would take a line break away from the template's beginning.
    return "\n".join([*chosen, '{{- "" }}' + template]) if chosen else template


def source_of(name: str) -> str:
    """All that the package puts into a template of this name, for telling whether it is still the same."""
    return family_template(name) if name in FAMILIES else behind(PASSES, "")


@functools.cache
def _text(file: str) -> str:
    return (FOLDER / file).read_text(encoding="utf-8")
