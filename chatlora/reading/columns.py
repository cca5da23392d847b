"""What the columns of a row mean: which a form takes, which speak against training on it, which were probably meant.

Names that publishers give to the same thing are tables here. What no table says, a source's `columns` does.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from chatlora.reading.values import listed

BESIDE: dict[str, tuple[str, ...]] = {  # what else a form may read -> what publishers call it
    "system": ("system", "system_prompt", "meta_instruction"),
    "tools": ("tools", "functions"),
    "input": ("input",),
    "history": ("history",),
    "reasoning": ("reasoning", "reasoning_content", "thinking"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
TURN_COLUMNS = ("conversation", "dialogue", "dialog", "contents", "chat", "turns", "data")
PROMPTS = ("prompt", "question", "query", "input", "problem", "context")
REPLIES = ("completion", "response", "answer", "output", "target", "solution")

MEDIA = ("images", "videos", "audios", "image", "video", "audio")
PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")


def implied_columns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The `columns` under which a row of a published form reads, most telling first; several where it could be either.

    What one of them reads is never a part of what another reads.
    """
    there = {name for name, value in row.items() if value is not None}
    if {"query", "answers", "tools"} <= there:  # xLAM
        return [{"prompt": "query", "calls": "answers"}]
    turns = [name for name in TURN_COLUMNS if isinstance(row.get(name), (list, Mapping, str)) and row[name]]
    if turns and (turns[0] not in ("data", "turns") or not isinstance(row[turns[0]], str)):
        return [{"messages": turns[0]}]
    found: list[dict[str, str]] = []
    replies = [name for name in REPLIES if name in there]
    if "instruction" in there:
        details = [name for name in ("input", "context") if name in there]
        found += [{"output": reply, **({"input": details[0]} if details else {})} for reply in replies]
    covered = {name for mapping in found for name in (*mapping.values(), "instruction")}
    prompts = [name for name in PROMPTS if name in there and name not in covered]
    return found + [{"prompt": p, "completion": reply} for p in prompts for reply in replies]


def refused_columns(row: Mapping[str, Any], left_alone: Iterable[str]) -> list[str]:
    """A sentence for each column that says that the row is not what it seems to be."""
    there = [name for name in row if name not in left_alone]
    found = [sentence(row) for name, sentence in _REFUSED.items() if name in there and _REFUSES[name](row[name])]
    preference = [name for name in there if name in PREFERENCE and row[name]]
    if preference:
        found.append(_told_preference(row, preference))
    media = [name for name in there if name in MEDIA and row[name]]
    if media:
        found.append(
            f"{listed(media)}: chatlora trains on text; leave such rows out with on_bad_row: set_aside, or train on "
            f"their text alone with ignore: [{listed(media)}]"
        )
    return found


def _is_false(value: Any) -> bool:
    return value in (False, 0) if isinstance(value, (bool, int, float)) else str(value).casefold() == "false"


def _told_label(row: Mapping[str, Any]) -> str:
    return (
        f"label is {row['label']!r}: preference data (KTO) whose reply must not be learned; leave such rows out with "
        "on_bad_row: set_aside, or, if it means something else, read on with ignore: [label]"
    )


def _told_kto(row: Mapping[str, Any]) -> str:
    return (
        f"kto_tag is {row['kto_tag']!r}: preference data (KTO), whose replies are not all good; keep the good ones in "
        "a file of their own, and read it with ignore: [kto_tag]"
    )


_REFUSED: dict[str, Callable[[Mapping[str, Any]], str]] = {"label": _told_label, "kto_tag": _told_kto}
_REFUSES: dict[str, Callable[[Any], bool]] = {"label": _is_false, "kto_tag": lambda value: value is not None}


def _told_preference(row: Mapping[str, Any], names: list[str]) -> str:
    if "chosen" not in names or "messages" in row or "conversations" in row:
        others = [name for name in row if name not in names]
        way = f"ignore: [{listed(names)}] trains on {listed(others)} alone"
    else:
        ours = "messages" if isinstance(row["chosen"], list) else "completion"
        rest = [name for name in names if name != "chosen"]
        ignored = f", ignore: [{listed(rest)}]" if rest else ""
        way = f"columns: {{{ours}: chosen}}{ignored} trains on what was preferred"
    return f"{listed(names)}: preference data (DPO), which chatlora does not train on; {way}"


def likeliest_columns(row: Mapping[str, Any]) -> str:
    """The YAML that would most likely read a row of no known form; where nothing would, the way by a function."""
    mapping = _likeliest(row)
    if mapping is None:
        return "a function of yours can turn it into messages: reader: my_rows.py:read"
    inside = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items())
    return f"perhaps columns: {{{inside}}}; what columns cannot say, reader: my_rows.py:read can"


def _likeliest(row: Mapping[str, Any]) -> dict[str, str] | None:
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
            return {"messages": str(name)}
    texts = [str(name) for name, value in row.items() if isinstance(value, str) and value]
    prompt = _meant(texts, (*PROMPTS, "instruction", "user", "human", "text", "content", "article", "source", "src"))
    reply = _meant(texts, (*REPLIES, "reply", "assistant", "summary", "label", "translation", "tgt"))
    others = [name for name in texts if name not in (prompt, reply)]
    prompt = prompt or (others.pop(0) if others else None)
    reply = reply or (others.pop() if others else None)
    return {"prompt": prompt, "completion": reply} if prompt and reply and prompt != reply else None


def _meant(names: list[str], words: Iterable[str]) -> str | None:
    for word in words:
        for name in names:
            if word in name.casefold():
                return name
    return None
