"""What a template makes of a reply without losing any of it: space trimmed, a think block or a channel put in.

All of it is what the model must generate, and so a target. It is counted by kind, for the person who wonders why a
trained model writes `<think>` where the data has none.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from chatlora.rendering.message_parts import REASONING, TEXT

TAGS = "what stands around a thought in the text is changed"
LONGEST = 60  # characters of the template's own that are shown


def template_edits(reply: str, message: Mapping[str, Any], spellings: Iterable[str]) -> tuple[str, ...]:
    """The kinds of change between an assistant's message, in template form, and its reply, a stop token included.

    `spellings` are the control tokens. Both texts are masked. Calls are not looked at: each template has a form of
    its own for them.
    """
    thought, content = message.get("reasoning_content", ""), message["content"]
    found = [
        f"space around {kind} is trimmed"
        for kind, value in ((REASONING, thought), (TEXT, content))
        if value.strip() and value not in reply and value.strip() in reply
    ]
    if content.strip() not in reply:  # of it all is there but this: a thought's place is found by its tags
        found.append(TAGS)
    if "tool_calls" in message or not content.strip():
        return tuple(found)
    said = _without_stop(reply, spellings)
    text = content if content in said else content.strip()
    before, there, after = said.rpartition(text)
    if text != content:  # what is left of its own space is not put in
        before, after = before.rstrip(), after.lstrip()
    if there and before and not thought.strip():
        found.append(f"{_shown(before)} is put before {TEXT}")
    if there and after:
        found.append(f"{_shown(after)} is put after {TEXT}")
    return tuple(found)


def _without_stop(reply: str, spellings: Iterable[str]) -> str:
    stops = (spelling for spelling in spellings if reply.endswith(spelling))
    return reply.removesuffix(max(stops, key=len, default=""))


def _shown(text: str) -> str:
    return repr(text if len(text) <= LONGEST else text[:LONGEST] + "...")
