"""Use of tools that is told in text, as Hermes, Qwen and many data sets have it -> calls, results and tools.

    in a reply         <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one or several, behind its text
    in a turn's text   <tool_response>...</tool_response>, one or several, and nothing else
    in system          <tools>[...]</tools> between words that tell how to call (KNOWN_WORDS)

JSON may also be written as Python writes it. Where something would be lost or moved, `problem` says what, and the
conversation stays as it is.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from chatlora.reading.calls import read_tool_call, read_tools
from chatlora.reading.conversation import Conversation, Message, ToolCall

HERMES = "tool use told in text"  # how all of these begin
CALLS_READ = f"{HERMES}: calls are read out of the reply"
RESULTS_READ = f"{HERMES}: results are read as a tool's"
TOOLS_READ = f"{HERMES}: the tools on offer are read out of the system message, with the words around them"
NO_CALL = f"{HERMES}: a <tool_call> holds no JSON with name and arguments"
NOT_CLOSED = f"{HERMES}: a <tool_call> is not closed"
TEXT_AFTER = f"{HERMES}: text stands after a <tool_call>"
TEXT_BESIDE = f"{HERMES}: text stands beside a <tool_response>"
NO_TOOLS = f"{HERMES}: <tools> holds no JSON with tools"

TAGS = tuple(f"<{end}{tag}>" for tag in ("tool_call", "tool_response", "tools") for end in ("", "/"))

_MEANT = re.compile(r"<tool_call>\s*(?:[\[{]|<function=)")  # as a call, and not as a word about calls
_SPACE = re.compile(r"\s*")

_OF_CALL = {"name", "arguments"}

_A_CALL = r"<tool_call> ?</tool_call>"
KNOWN_WORDS = (  # around the tools, sentence by sentence; a space stands for any
    r"# Tools",
    r"You are a function calling AI model(?: named Hermes 2 Pro)?\.",
    r"You are provided with function signatures within <tools> ?</tools> XML tags[.:]",
    r"You may call one or more functions to assist with the user query\.",
    r"If available tools are not relevant in assisting with user query, just respond in natural conversational "
    r"language\.",
    r"Don't make assumptions about what values to plug into functions\.",
    r"After calling & executing the functions, you will be provided with function results within "
    r"<tool_response> ?</tool_response> XML tags\.",
    r"Here are the available tools:",
    r"These functions can be called:",
    r"Use the following pydantic model json schema for each tool call you will make: \{[^<]{0,999}\}",
    r"For each function call,? return a (?:json|JSON) object,? with function name and arguments within "
    rf"{_A_CALL} XML tags(?: as follows)?:",
    r"For each function call return a JSON object, with the following pydantic model json schema: \{[^<]{0,999}\}",
    rf"Each function call should be enclosed within {_A_CALL} XML tags\.",
    r"A call is JSON between tags, and a reply may hold several:",
    r"<tool_call> \{(?:[^<]|<(?:function-name|args-dict|args-json-object)>){0,200}\} </tool_call>",
)
_SENTENCE = "|".join(words.replace(" ", r"\s*") for words in KNOWN_WORDS)
_FIRST_SENTENCE, _SENTENCES = re.compile(_SENTENCE), re.compile(rf"(?:(?:{_SENTENCE})\s*)+")


@dataclass(frozen=True, slots=True)
class Hermes:
    """What was read. changes: in how many messages what was read out of text. own_words: the system message tells of
    its tools in words that are not known, and stays as it is."""

    conversation: Conversation
    changes: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""
    own_words: bool = False


class _Block(NamedTuple):
    start: int
    end: int
    body: str


class _Inexact(Exception):
    """Its text is the problem."""


class _Ambiguous(Exception):
    """JSON that says a name twice, or NaN."""


def read_hermes(conversation: Conversation) -> Hermes | None:
    """None where no message tells of tool use in its text."""
    if not any(tag in message.content for message in conversation.messages for tag in TAGS[::2]):
        return None
    changes: Counter[str] = Counter()
    try:
        tools, messages, own_words = _read_offer(conversation, changes)
        read = tuple(told for index in range(len(messages)) for told in _read_message(messages, index, changes))
    except _Inexact as inexact:
        return Hermes(conversation, problem=str(inexact))
    if not changes:
        return None
    return Hermes(replace(conversation, messages=read, tools=tools), changes, own_words=own_words)


def _read_message(messages: tuple[Message, ...], index: int, changes: Counter[str]) -> Iterator[Message]:
    message = messages[index]
    if message.role == "assistant" and not message.tool_calls and _MEANT.search(message.content):
        changes[CALLS_READ] += 1
        yield _with_calls(message)
    elif "<tool_response>" in message.content and _answers(messages, index):
        yield from _results(message, changes)
    else:
        yield message


def _answers(messages: tuple[Message, ...], index: int) -> bool:
    if messages[index].role != "user" or index == 0:
        return messages[index].role == "tool"
    before = messages[index - 1]
    return bool(before.role == "tool" or before.tool_calls or _MEANT.search(before.content))


def _with_calls(message: Message) -> Message:
    """Raises _Inexact where not all that follows the first call is calls."""
    text = message.content[: next(_MEANT.finditer(message.content)).start()]
    told = message.content[len(text) :]
    blocks = list(_blocks(told, "tool_call"))
    rest = _outside(told, blocks)
    if "<tool_call>" in rest:
        raise _Inexact(NOT_CLOSED)
    calls = tuple(call for block in blocks for call in _calls(block.body.strip()))
    if rest.strip():
        raise _Inexact(TEXT_AFTER)
    return replace(message, content=text.rstrip(), tool_calls=calls)


def _calls(body: str) -> Iterator[ToolCall]:
    values = _values(body, NO_CALL)
    for value in values[0] if len(values) == 1 and isinstance(values[0], list) else values:
        problems: list[str] = []
        known = isinstance(value, Mapping) and _OF_CALL <= value.keys() <= _OF_CALL | {"id", "type"}
        call = read_tool_call(value, "call", problems) if known else None
        if call is None or problems:
            raise _Inexact(NO_CALL)
        yield call


def _results(message: Message, changes: Counter[str]) -> Iterator[Message]:
    """Raises _Inexact where anything but results stands in the text of a user; a tool may say what it likes."""
    blocks = list(_blocks(message.content, "tool_response"))
    if _outside(message.content, blocks).strip():
        if message.role == "user":
            raise _Inexact(TEXT_BESIDE)
        yield message
        return
    changes[RESULTS_READ] += 1
    loss = message.loss if message.role == "tool" else None
    for body in (block.body.removeprefix("\n").removesuffix("\n") for block in blocks):
        yield replace(message, role="tool", content=body, name=message.name or _name_in(body), loss=loss)


def _name_in(body: str) -> str | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = value.get("name") if isinstance(value, Mapping) else None
    return name if isinstance(name, str) else None


def _read_offer(
    conversation: Conversation, changes: Counter[str]
) -> tuple[tuple[dict[str, Any], ...], tuple[Message, ...], bool]:
    """The tools, the messages without them, and whether they are told in other words than the known ones.

    Beside tools of the row's own only the same ones are read out, so that no template tells them twice.
    """
    messages = conversation.messages
    system = messages[0] if messages and messages[0].role == "system" else None
    blocks = _blocks(system.content, "tools") if system is not None else ()
    found = next((block for block in blocks if block.body.lstrip().startswith(("[", "{"))), None)
    if system is None or found is None:
        return conversation.tools, messages, False
    around = _around(system.content[: found.start], system.content[found.end :])
    if around is None:
        return conversation.tools, messages, not conversation.tools
    tools = _tools_in(found.body)
    if tools is None and not conversation.tools:
        raise _Inexact(NO_TOOLS)
    if tools is None or (conversation.tools and conversation.tools != tools):
        return conversation.tools, messages, False
    changes[TOOLS_READ] += 1
    return tools, ((replace(system, content=around),) if around else ()) + messages[1:], False


def _tools_in(body: str) -> tuple[dict[str, Any], ...] | None:
    problems: list[str] = []
    try:
        values = _values(body.strip(), NO_TOOLS)
    except _Inexact:
        return None
    tools = read_tools(values[0] if len(values) == 1 else values, "tools", problems)
    return None if problems else tools


def _blocks(text: str, tag: str) -> Iterator[_Block]:
    """Each `<tag>...</tag>`, the innermost, from the left. In linear time, which no pattern is on hostile text."""
    opening, closing, end = f"<{tag}>", f"</{tag}>", 0
    while (close := text.find(closing, end)) >= 0:
        start = text.rfind(opening, end, close)
        end = close + len(closing)
        if start >= 0:
            yield _Block(start, end, text[start + len(opening) : close])


def _outside(text: str, blocks: Sequence[_Block]) -> str:
    starts, ends = [block.start for block in blocks], [block.end for block in blocks]
    return "".join(text[end:start] for end, start in zip([0, *ends], [*starts, len(text)], strict=True))


def _around(before: str, after: str) -> str | None:
    """What the system message says beside its tools and the known words about them; None where those are others."""
    first = _FIRST_SENTENCE.search(before)
    told = _SENTENCES.match(after.lstrip(" .\n"))
    if first is None or told is None or _SENTENCES.fullmatch(before, first.start()) is None:
        return None
    parts = (before[: first.start()].rstrip(), after.lstrip(" .\n")[told.end() :])
    return "\n\n".join(part for part in parts if part.strip())


def _values(body: str, otherwise: str) -> list[Any]:
    """The JSON values that stand one after the other, or the one that Python wrote. Raises _Inexact(otherwise)."""
    decoder, position, values = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number), 0, []
    try:
        while position < len(body):
            value, end = decoder.raw_decode(body, position)
            values.append(value)
            position = end + len(_SPACE.match(body, end)[0])  # type: ignore[index]
        return values
    except _Ambiguous:
        raise _Inexact(otherwise) from None
    except (ValueError, RecursionError):
        return [_written_by_python(body, otherwise)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Ambiguous
    return fields


def _no_number(constant: str) -> None:
    raise _Ambiguous(constant)


def _written_by_python(body: str, otherwise: str) -> Any:
    try:
        value = ast.literal_eval(body)
        if json.loads(json.dumps(value)) == value:
            return value
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        pass
    raise _Inexact(otherwise)
