"""A list of turns, in whatever shape a row has it -> messages.

shape                                   of
[{role, content}], [{from, value}]      nearly all
[{human, assistant}], [{input, output}] MOSS 003, Capybara: an exchange each (PAIRS)
["question", "answer", ...]             UltraChat, LIMA: the user begins
{role: [...], content: [...]}           `datasets` under Sequence
{turn_1: {Human, MOSS, ...}, ...}       MOSS
"USER: ... ASSISTANT: ..."              Glaive
[{role, parts: [{text}]}]               Gemini
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chatlora.reading.calls import read_tools
from chatlora.reading.conversation import Message, reply
from chatlora.reading.flags import flags_of, read_loss, report_unknown_flags, told_learned_context
from chatlora.reading.marked_text import GLAIVE, MOSS, read_glaive, read_moss
from chatlora.reading.messages import read_message, unread_keys
from chatlora.reading.roles import CALL_ROLES, folded
from chatlora.reading.values import listed, read_list, read_text, says_nothing

PAIRS = (  # what a turn that is a whole exchange calls its two texts
    ("human", "assistant"),
    ("user", "assistant"),
    ("input", "output"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
)
WITH_A_QUESTION = (  # what a question may need to be answered: read with it, or not at all
    *("context", "contexts", "passage", "passages", "paragraph", "article", "document", "documents", "story"),
    *("background", "knowledge", "evidence", "options", "choices", "input", "instruction"),
)
NOT_READ = (
    "would not be read; a function of yours can join them: reader: my_rows.py:read; or leave it out with ignore: "
)
KEYS = (("role", "content"), ("from", "value"))
MESSAGE_KEYS = {  # what `columns` may name inside a turn -> its key here
    "role": "role",
    "content": "content",
    "loss": "loss",
    "masked": "masked",
    "reasoning_content": "reasoning_content",
    "tool_calls": "tool_calls",
}


@dataclass(slots=True)
class Turns:
    """Messages; the tools that a system message offers; the keys of turns that nothing read; what is to be said of
    turns of the system and the user that ask to be learned."""

    messages: list[Message] = field(default_factory=list)
    tools: tuple[dict[str, Any], ...] = ()
    not_used: set[str] = field(default_factory=set)
    learned_context: list[str] = field(default_factory=list)


def read_turns(
    value: Any,
    path: str,
    problems: list[str],
    *,
    keys: Mapping[str, str] | None = None,
    ignored: frozenset[str] = frozenset(),
) -> Turns:
    """`keys`: our key of a turn -> the file's; `ignored`: keys that are not looked at."""
    if isinstance(value, str) and GLAIVE.match(value):
        return Turns(read_glaive(value, path, problems))
    if isinstance(value, Mapping) and MOSS & value.keys():
        return Turns(read_moss(value, path, problems))
    turns = _columns_of_turns(value) or read_list(value, path, problems)
    if keys or ignored:
        turns = [_renamed(turn, keys or {}, ignored) for turn in turns]
    if len(turns) > 1 and all(isinstance(turn, str) for turn in turns):
        return Turns(list(_alternating(turns, path, problems)))
    found = Turns()
    role_key = "from" if any(map(_is_sharegpt, turns)) else "role"
    flags = flags_of(turns, role_key, path, problems)
    for index, turn in enumerate(turns):
        at = f"{path}[{index}]"
        pair = _pair_of(turn)
        if pair is not None:
            found.messages += _exchange(turn, pair, at, problems, flags)
            found.not_used |= unread_keys(turn, None) - set(pair)
            continue
        role_key, content_key = KEYS[_is_sharegpt(turn)]
        turn = _from_gemini(turn)
        read = read_message(turn, at, problems, role_key=role_key, content_key=content_key, flags=flags)
        _append(found, read, turn, role_key)
        _note(found, turn, at, problems)
    return found


def looks_like_turns(value: Any) -> bool:
    """Whether a column that no form names holds turns, in one of the shapes above."""
    if isinstance(value, str):
        return value.lstrip().startswith("[") or GLAIVE.match(value) is not None
    if isinstance(value, Mapping):
        return bool(MOSS & value.keys()) or _columns_of_turns(value) is not None
    return isinstance(value, list) and bool(value) and all(isinstance(turn, (Mapping, str)) for turn in value)


def is_sharegpt(turns: Any) -> bool:
    return isinstance(turns, list) and any(map(_is_sharegpt, turns))


def _is_sharegpt(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "role" not in turn and ("from" in turn or "value" in turn)


def _append(found: Turns, read: Sequence[Message], turn: Any, role_key: str) -> None:
    """A call that stands as a turn of its own belongs to the reply in front of it: parallel calls, or text and call."""
    last = found.messages[-1] if found.messages else None
    is_call = isinstance(turn, Mapping) and folded(turn.get(role_key)) in CALL_ROLES
    if is_call and read and last is not None and (last.role, last.loss, None) == _joins(read[0]):
        found.messages[-1] = replace(last, tool_calls=last.tool_calls + read[0].tool_calls)
    else:
        found.messages += read


def _joins(call: Message) -> tuple[str, bool | None, str | None]:
    """What the message in front of it is like; a thought of its own would come to stand in front of that one's text."""
    return "assistant", call.loss, call.reasoning or call.thought_text


def _note(found: Turns, turn: Any, path: str, problems: list[str]) -> None:
    if not isinstance(turn, Mapping):
        return
    last = found.messages[-1] if found.messages else None
    own = folded(turn.get("role", turn.get("from")))
    found.not_used |= unread_keys(turn, own if own in CALL_ROLES or last is None else last.role)
    if last is not None and last.loss and last.role in ("system", "user"):
        found.learned_context.append(told_learned_context(turn, last.role, path))
    if turn.get("tools") and last is not None and last.role == "system":  # GLM-4
        found.tools += read_tools(turn["tools"], f"{path}.tools", problems)
        if last.content == "":
            found.messages.pop()


def _renamed(turn: Any, keys: Mapping[str, str], ignored: frozenset[str]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    theirs = {own: ours for ours, own in keys.items()}
    shadowed = {ours for ours, own in keys.items() if own in turn}
    return {
        theirs.get(key, key): value
        for key, value in turn.items()
        if key not in ignored and (key in theirs or key not in shadowed)
    }


def _columns_of_turns(value: Any) -> list[Any] | None:
    """`{role: [...], content: [...]}` as a list of turns."""
    if not isinstance(value, Mapping) or not all(isinstance(column, list) for column in value.values()):
        return None
    if not any(set(keys) <= value.keys() for keys in KEYS) or len({len(column) for column in value.values()}) > 1:
        return None
    return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]


def _alternating(texts: Sequence[str], path: str, problems: list[str]) -> Iterator[Message]:
    for index, value in enumerate(texts):
        text = read_text(value, f"{path}[{index}]", problems)
        if text is not None:
            yield reply(text) if index % 2 else Message("user", text)


def _pair_of(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, Mapping) or any(key in turn for keys in KEYS for key in keys):
        return None
    return next((pair for pair in PAIRS if set(pair) <= turn.keys()), None)


def _exchange(
    turn: Mapping[str, Any], pair: tuple[str, str], path: str, problems: list[str], flags: Mapping[str, bool]
) -> list[Message]:
    report_unknown_flags(turn, {*pair, *flags}, path, problems)
    beside = [key for key in (*WITH_A_QUESTION, "system") if key not in pair and not says_nothing(turn.get(key))]
    if beside:
        problems.append(f"{path}: {listed(beside)} beside {pair[0]} and {pair[1]} {NOT_READ}[{', '.join(beside)}]")
    question, answer = (read_text(turn[key], f"{path}.{key}", problems) for key in pair)
    loss = read_loss(turn, path, problems, flags)
    messages = exchange(question, answer)
    return [*messages[:1], *(replace(answered, loss=loss) for answered in messages[1:])]


def exchange(question: str | None, answer: str | None) -> list[Message]:
    if question is None or answer is None:
        return []
    return [Message("user", question), reply(answer)]


def _from_gemini(turn: Any) -> Any:
    if isinstance(turn, Mapping) and "content" not in turn and isinstance(turn.get("parts"), list):
        return {"content" if key == "parts" else key: value for key, value in turn.items()}
    return turn
