"""A chat template, compiled once: messages -> text, under fixed keyword arguments and a fixed date.

Templates are code from strangers. They run in transformers' immutable sandbox, see plain JSON values only, and are
bounded in time, memory and output (limits.py).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

from jinja2 import TemplateSyntaxError

from chatlora.errors import ModelError, SetAside
from chatlora.rendering.control_text import PRIVATE, is_masked
from chatlora.rendering.embedded import fitting_family
from chatlora.rendering.limits import PROBE, TOO_MUCH, bounded, check_output

ESCAPE = "\\U000f"  # how Python's repr begins to write a character of plane 15, where masked text is
RAISES = "the chat template raises an error"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template's text and everything else that decides what it renders, but the conversation.

    `special_tokens` are the tokenizer's (`bos_token`, `eos_token`, ...), which templates name as variables.
    """

    text: str
    kwargs: Mapping[str, Any]
    date: date
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, prompt: bool) -> str:
        """What `apply_chat_template(tokenize=False, add_generation_prompt=prompt)` gives on the day `date`.

        `messages` as `template_messages` makes them. Raises SetAside with the template's own words.
        """
        try:
            text = str(
                self._compiled().render(
                    messages=messages,
                    tools=tools or None,
                    documents=None,
                    add_generation_prompt=prompt,
                    strftime_now=self._strftime,
                    **{**self.special_tokens, **self.kwargs},
                )
            )
        except MemoryError as error:
            raise SetAside(TOO_MUCH, "no memory is left for it") from error
        except Exception as error:  # a template may fail in any way that Python can
            raise SetAside(RAISES, f"{type(error).__name__}: {error}") from error
        check_output(text, messages, tools)
        return _unescaped(text, messages, tools) if ESCAPE in text else text

    def _strftime(self, form: str) -> str:
        return datetime.combine(self.date, time()).strftime(form)

    def _compiled(self) -> Any:
        return _compile(self.text)

    def knows(self, name: str) -> bool:
        """Whether the template reads a variable of this name."""
        return name in _variables(self.text)

    def takes_arguments_as_text(self) -> bool:
        """Whether it renders a call only where the arguments are JSON text, as OpenAI's API has them."""
        question = {"role": "user", "content": "Hello"}
        result = {"role": "tool", "name": "look", "content": "nothing"}
        for arguments in ({"at": "Oslo"}, '{"at": "Oslo"}'):
            call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
            try:
                self.render(
                    [question, {"role": "assistant", "content": "", "tool_calls": [call]}, result], (), prompt=True
                )
            except SetAside:
                continue
            return isinstance(arguments, str)
        return False

    def digest(self) -> str:
        described = [self.text, dict(self.kwargs), self.date.isoformat(), dict(self.special_tokens)]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template: a thought is also called `thinking`, as gpt-oss has it."""
    return [
        {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else dict(message)
        for message in messages
    ]


def chat_template_of(tokenizer: Any, chat_template: str | None) -> str:
    """The template to use: the one given, else the tokenizer's own. Raises ModelError where there is neither."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    template = chat_template if chat_template is not None else own
    if not template:
        raise ModelError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template (a base model, perhaps); "
            f"set `model.chat_template` to {fitting_family(tokenizer)}, or to a Jinja file, e.g. the one of the "
            "model's chat version"
        )
    try:
        with bounded(PROBE):
            _compile(template)  # which computes what is constant
    except ModelError:
        raise
    except Exception as error:  # jinja2 raises its own kinds, transformers ImportError for an old jinja2
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ModelError(
            f"the chat template (of model.chat_template, else of {tokenizer.name_or_path or 'the tokenizer'}) does not "
            f"compile{line}: {str(error).rstrip('.')}; mend it, or set model.chat_template to another Jinja file"
        ) from error
    return str(template)


def resolve_template_kwargs(template: str, kwargs: Mapping[str, Any], *, any_reasoning: bool) -> dict[str, Any]:
    """The template's keyword arguments, `enable_thinking: false` added where no row of the data carries reasoning.

    Added only where the template knows the variable and the user did not set it: otherwise a model that thinks would
    be taught to open a thought and leave it empty.
    """
    resolved = dict(kwargs)
    if not any_reasoning and "enable_thinking" not in resolved and "enable_thinking" in _variables(template):
        resolved["enable_thinking"] = False
    return resolved


def _unescaped(text: str, messages: Any, tools: Any) -> str:
    """Masked characters that the template wrote as Python's repr does, as characters.

    Raises SetAside where a message spells such an escape beside masked text: the two cannot be told apart.
    """
    source = json.dumps([messages, tools], ensure_ascii=False, default=str)
    if not is_masked(source):
        return text
    if ESCAPE in source:
        raise SetAside(PRIVATE, f"it spells {ESCAPE}")
    return re.sub(re.escape(ESCAPE) + "([0-9a-f]{4})", lambda found: chr(0xF0000 + int(found[1], 16)), text)


def _compile(template: str) -> Any:
    # Cached there, which keeps what holds a ChatTemplate picklable. Private, but nothing else gives the same sandbox.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compile_template: Callable[[str], Any] = _compile_jinja_template
    return compile_template(template)


def _variables(template: str) -> frozenset[str]:
    from transformers.utils.chat_template_utils import _get_template_variables

    variables: frozenset[str] = _get_template_variables(template)
    return variables
