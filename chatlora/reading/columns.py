"""What the columns of a row mean: which a form takes, which speak against training on it, which were probably meant.

Names that publishers give to the same thing are tables here. What no table says, a source's `columns` does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from chatlora.reading.conversation import Message
from chatlora.reading.flags import EITHER_SENSE, FLAGS
from chatlora.reading.turns import NOT_READ, WITH_A_QUESTION, looks_like_turns
from chatlora.reading.values import described, listed

BESIDE: dict[str, tuple[str, ...]] = {  # what else a form may read -> what publishers call it
    "system": ("system", "system_prompt", "meta_instruction", "systemInstruction", "system_instruction"),
    "tools": ("tools", "functions"),
    "input": ("input",),
    "history": ("history",),
    "reasoning": ("reasoning", "reasoning_content", "thinking"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
TURN_COLUMNS = ("conversation", "dialogue", "dialog", "contents", "chat", "turns", "data")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input", "context")
INSTRUCTED = (["instruction", "input"], ["instruction", "context"])  # the second belongs to the first, as in Alpaca
REPLIES = ("completion", "response", "answer", "output", "target", "solution")


def implied_columns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The `columns` under which a row of a published form reads; several where it could be either."""
    there = {name for name, value in row.items() if value is not None}
    if {"query", "answers", "tools"} <= there:  # xLAM
        return [{"prompt": "query", "calls": "answers"}]
    turns = [name for name in TURN_COLUMNS if looks_like_turns(row.get(name))]
    if turns:
        return [{"messages": turns[0]}]
    asked = [name for name in QUESTIONS if name in there]
    replies = [name for name in REPLIES if name in there]
    joined = [{"instruction": p, "input": d, "output": reply} for p, d in combinations(asked, 2) for reply in replies]
    alone = [{"prompt": question, "completion": reply} for question in asked for reply in replies]
    return joined if asked in INSTRUCTED else joined + alone


def refused_columns(row: Mapping[str, Any], left_alone: Iterable[str]) -> list[str]:
    """A sentence for each kind of columns that says that the row is not what it seems to be."""
    found = []
    for refused in REFUSED:
        names = [name for name in refused.names if name in row and name not in left_alone and refused.says(row[name])]
        found += [refused.told(row, names)] if names else []
    return found


def refused_beside(left: Mapping[str, Any], form: Iterable[str], messages: Iterable[Message]) -> list[str]:
    """A sentence where a column that a question may need is left over, and its text stands in no message either.

    left: the row's columns that nothing read.
    """
    said = "\n".join(message.content for message in messages if message.role != "assistant")
    beside = [name for name in WITH_A_QUESTION if not all(text in said for text in _texts_in(left.get(name)))]
    return [f"{listed(beside)} beside {listed(form)} {NOT_READ}[{', '.join(beside)}]"] if beside else []


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, (Mapping, list)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(each)
    elif value is not None:
        yield str(value).strip()


def _is_false(value: Any) -> bool:
    return value in (False, 0) if isinstance(value, (bool, int, float)) else str(value).casefold() == "false"


def _is_mask(value: Any) -> bool:
    """Whether it says of a whole row, or of each of its turns, that it is not learned, or in part."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, (bool, int, float)) for each in value)
    return isinstance(value, (bool, int, float)) and value != 1


def _told_mask(row: Mapping[str, Any], names: list[str]) -> str:
    return (
        f"{names[0]} is {described(row[names[0]])}: what is learned of a row is read on its messages alone; put it "
        f"there with reader: my_rows.py:read, or learn all replies with ignore: [{listed(names)}]"
    )


def _told_label(row: Mapping[str, Any], names: list[str]) -> str:
    return (
        f"label is {row['label']!r}: preference data (KTO) whose reply must not be learned; leave such rows out with "
        "on_bad_row: set_aside, or, if it means something else, read on with ignore: [label]"
    )


def _told_kto(row: Mapping[str, Any], names: list[str]) -> str:
    return (
        f"kto_tag is {row['kto_tag']!r}: preference data (KTO), whose replies are not all good; keep the good ones in "
        "a file of their own, and read it with ignore: [kto_tag]"
    )


def _told_preference(row: Mapping[str, Any], names: list[str]) -> str:
    others = [name for name in names if name != "chosen"]
    if "chosen" not in names or "messages" in row or "conversations" in row:
        left = [name for name in row if name not in names]
        way = f"ignore: [{listed(names)}] trains on {listed(left)} alone"
    else:
        ours = "messages" if isinstance(row["chosen"], list) else "completion"
        ignored = f", ignore: [{listed(others)}]" if others else ""
        way = f"columns: {{{ours}: chosen}}{ignored} trains on what was preferred"
    return f"{listed(names)}: preference data (DPO), which chatlora does not train on; {way}"


def _told_media(row: Mapping[str, Any], names: list[str]) -> str:
    return (
        f"{listed(names)}: chatlora trains on text; leave such rows out with on_bad_row: set_aside, or train on their "
        f"text alone with ignore: [{listed(names)}]"
    )


@dataclass(frozen=True, slots=True)
class Refused:
    """Columns that speak against training on a row, where they say something; and what is told of them."""

    names: tuple[str, ...]
    says: Callable[[Any], bool]
    told: Callable[[Mapping[str, Any], list[str]], str]


REFUSED = (
    Refused(
        (*(name for name, sense in FLAGS.items() if sense), EITHER_SENSE, "masks", "weights"), _is_mask, _told_mask
    ),
    Refused(("label",), _is_false, _told_label),
    Refused(("kto_tag",), lambda value: value is not None, _told_kto),
    Refused(("chosen", "rejected", "rejected_response", "rejected_messages"), bool, _told_preference),
    Refused(("images", "videos", "audios", "image", "video", "audio"), bool, _told_media),
)


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
    prompt = _meant(texts, (*QUESTIONS, "user", "human", "text", "content", "article", "source", "src"))
    reply = _meant(texts, (*REPLIES, "reply", "assistant", "summary", "label", "translation", "tgt"))
    others = [name for name in texts if name not in (prompt, reply, *WITH_A_QUESTION)]
    others.sort(key=lambda name: -len(row[name]))
    prompt = prompt or (others.pop(0) if others else None)
    beside = [name for name in WITH_A_QUESTION if row.get(name) and name not in (prompt, reply)]
    reply = reply or (others.pop(0) if others and not beside else None)
    if prompt is None or reply is None or prompt == reply:
        return None
    if not beside:
        return {"prompt": prompt, "completion": reply}
    is_text = len(beside) == 1 and isinstance(row[beside[0]], str)
    return {"instruction": prompt, "input": beside[0], "output": reply} if is_text else None


def _meant(names: list[str], words: Iterable[str]) -> str | None:
    for word in words:
        for name in names:
            if word in name.casefold():
                return name
    return None
