"""What each form of a row holds, and how it becomes messages.

A form is a line of FORMS: the columns that a row of it has, and the function that reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatlora.errors import did_you_mean
from chatlora.reading.calls import read_calls, read_tools
from chatlora.reading.columns import REPLIES
from chatlora.reading.conversation import Message, reply
from chatlora.reading.fields import Fields
from chatlora.reading.marked_text import split_glaive_system
from chatlora.reading.turns import exchange, is_sharegpt
from chatlora.reading.values import described, is_json, parse_json, read_list, read_text

SWITCHES = ("on", "off")  # Nemotron's column `reasoning`, which is no thought
RESERVED = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "strftime_now",
)  # what a template is always given


@dataclass(frozen=True, slots=True)
class Form:
    needs: tuple[str, ...]
    read: Callable[[Fields, list[str]], list[Message]]


def _read_messages(fields: Fields, problems: list[str]) -> list[Message]:
    """A list of turns. Where a user has the last word, a reply beside the list is the one it lacks."""
    column = "messages" if "messages" in fields.names else "conversations"
    messages = fields.take_turns(column, problems).messages
    replies = [name for name in REPLIES if name in fields.row and name not in fields.ignored]
    if messages and messages[-1].role == "user" and len(replies) == 1:
        fields.name({"completion": replies[0]})
        messages += _reply(fields, "completion", problems)
    return messages


def _read_prompt_completion(fields: Fields, problems: list[str]) -> list[Message]:
    """Texts, or lists of messages of which only the completion's are to be learned (as in TRL), or one of each."""
    return _prompt(fields, problems) + _reply(fields, "completion", problems)


def _read_prompt_calls(fields: Fields, problems: list[str]) -> list[Message]:
    calls = read_calls(fields.take("calls"), fields.path("calls"), problems)
    return [*_prompt(fields, problems), Message("assistant", "", tool_calls=calls)]


def _read_alpaca(fields: Fields, problems: list[str]) -> list[Message]:
    instruction = read_text(fields.take("instruction"), fields.path("instruction"), problems)
    details = read_text(fields.take("input") or "", fields.path("input"), problems)
    question = "\n".join(part for part in (instruction, details) if part)  # as LLaMA-Factory joins them
    return [*_history(fields, problems), Message("user", question), *_reply(fields, "output", problems)]


def _read_self_instruct(fields: Fields, problems: list[str]) -> list[Message]:
    instances, column = (
        read_list(fields.take("instances"), fields.path("instances"), problems),
        fields.path("instances"),
    )
    if len(instances) != 1 or not isinstance(instances[0], Mapping):
        problems.append(f"{column} is not one object with input and output; make each of them a row of its own")
        return []
    one = Fields({"instruction": fields.take("instruction"), **instances[0]}, {}, fields.ignored)
    one.name({name: name for name in ("instruction", "input", "output")})
    return _read_alpaca(one, problems)


FORMS: dict[str, Form] = {  # in the order in which they are tried
    "messages": Form(("messages",), _read_messages),
    "conversations": Form(("conversations",), _read_messages),  # from and value are read as ShareGPT's all the same
    "sharegpt": Form(("conversations",), _read_messages),
    "prompt_completion": Form(("prompt", "completion"), _read_prompt_completion),
    "alpaca": Form(("instruction", "output"), _read_alpaca),
    "prompt_calls": Form(("prompt", "calls"), _read_prompt_calls),
    "self_instruct": Form(("instruction", "instances"), _read_self_instruct),
}


def read_form(form: str, fields: Fields, problems: list[str]) -> list[Message]:
    messages = _with_system(fields, FORMS[form].read(fields, problems), problems)
    if form == "conversations" and not is_sharegpt(fields.peek("conversations")):
        # ChatGLM3's: observations may stand anywhere, and a user's loss goes unheard, as they did for the original.
        fields.turns.not_used |= (
            {"loss: true on a turn of the system or the user"} if fields.turns.learned_context else set()
        )
    elif not problems:
        problems += fields.turns.learned_context
        _check_results(messages, problems)
    return messages


def read_offered(fields: Fields, problems: list[str]) -> tuple[dict[str, Any], ...]:
    """The tools of the row's column, or of its system message."""
    offered = read_tools(fields.take("tools"), fields.path("tools"), problems)
    if "calls" in fields.names:
        offered = tuple(map(_as_schema, offered))
    of_system = fields.turns.tools
    if offered and of_system and offered != of_system:
        problems.append(f"{fields.path('tools')} and the system message offer different tools; keep one of them")
    return offered or of_system


def read_kwargs(fields: Fields, problems: list[str]) -> dict[str, Any]:
    """What the chat template is to be told for this row alone."""
    value, path = fields.take("chat_template_kwargs"), fields.path("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        value = parse_json(value, path, problems)
    if not value:
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"{path} is {described(value)}, not an object")
        return {}
    for name in set(value) & set(RESERVED):
        problems.append(f"{path}.{name} is given to every template; put it into a column of its own")
    return dict(value) if is_json(value, path, problems) else {}


# ---- parts of a form


def _prompt(fields: Fields, problems: list[str]) -> list[Message]:
    prompt = fields.peek("prompt")
    if isinstance(prompt, list) and not all(isinstance(turn, Mapping) and "type" in turn for turn in prompt):
        return [_unlearned(message) for message in fields.take_turns("prompt", problems).messages]
    text = read_text(fields.take("prompt"), fields.path("prompt"), problems)
    return _history(fields, problems) + ([] if text is None else [Message("user", text)])


def _reply(fields: Fields, name: str, problems: list[str]) -> list[Message]:
    """A text, or messages; a thought in a column of its own belongs to it."""
    value, path = fields.peek(name), fields.path(name)
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) and "type" not in turn for turn in value):
        messages = fields.take_turns(name, problems).messages
    else:
        text = read_text(fields.take(name), path, problems)
        messages = [] if text is None else [reply(text)]
    thought = fields.peek("reasoning")
    if thought is None or thought in SWITCHES or not messages:
        return messages
    text = read_text(fields.take("reasoning"), fields.path("reasoning"), problems)
    if messages[-1].reasoning is not None and messages[-1].reasoning != text:
        problems.append(f"{fields.path('reasoning')} and {path} tell different thoughts; keep one of them")
    told = messages[-1].thought_text if messages[-1].reasoning is not None else None
    return [*messages[:-1], replace(messages[-1], reasoning=text, thought_text=told)]


def _history(fields: Fields, problems: list[str]) -> list[Message]:
    messages: list[Message] = []
    column = fields.path("history")
    for index, pair in enumerate(read_list(fields.take("history") or [], column, problems)):
        path = f"{column}[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            problems.append(f"{path} is {described(pair)}, not a pair [question, answer]")
            continue
        messages += exchange(*(read_text(text, f"{path}[{i}]", problems) for i, text in enumerate(pair)))
    return messages


def _unlearned(message: Message) -> Message:
    if message.role != "assistant" or message.loss is not None:
        return message
    return replace(message, loss=False)


def _with_system(fields: Fields, messages: list[Message], problems: list[str]) -> list[Message]:
    system = fields.take("system")
    if isinstance(system, Mapping) and "parts" in system:  # Gemini
        system = system["parts"]
    if system is None or system == "":
        return messages
    text = read_text(system, fields.path("system"), problems)
    if text is None:
        return messages
    if isinstance(fields.peek("messages"), str):
        text, tools = split_glaive_system(text)
        fields.turns.tools += read_tools(tools, fields.path("system"), problems)
    stated = [message.content for message in messages if message.role == "system"]
    if stated and stated != [text]:
        column = fields.path("system")
        problems.append(f"the column {column} and a system message say different things; keep one of them")
    return messages if stated else [Message("system", text), *messages]


def _as_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """xLAM gives the parameters alone, where a schema has them under `properties`."""
    function = tool.get("function", {})
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping) or "properties" in parameters or isinstance(parameters.get("type"), str):
        return tool
    return {**tool, "function": {**function, "parameters": {"type": "object", "properties": dict(parameters)}}}


def _check_results(messages: Sequence[Message], problems: list[str]) -> None:
    """A tool's result stands behind a call: the assistant's, which some data sets write as text."""
    called: list[str] = []
    for index, message in enumerate(messages):
        called += [call.id for call in message.tool_calls if call.id is not None]
        which = f"message {index + 1} of {len(messages)} is a tool's result"
        if message.role == "tool" and (index == 0 or messages[index - 1].role not in ("assistant", "tool")):
            problems.append(f"{which}, but no assistant's message is in front of it; put the call there")
        elif message.tool_call_id is not None and called and message.tool_call_id not in called:
            remedy = did_you_mean(message.tool_call_id, called) or f"; the ids are {', '.join(called)}"
            problems.append(f"{which} for the call {message.tool_call_id!r}, which is not in front of it{remedy}")
