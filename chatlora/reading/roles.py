"""Who speaks in a turn: the names that data sets have for the four roles, in any case of letters."""

from collections.abc import Mapping
from typing import Any

from chatlora.errors import did_you_mean
from chatlora.reading.conversation import ROLES, Role
from chatlora.reading.values import described, instead_of

ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "developer": "system",  # OpenAI
    "human": "user",  # ShareGPT
    "prompter": "user",  # Open Assistant
    "gpt": "assistant",  # ShareGPT
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "moss": "assistant",
    "model": "assistant",  # Gemma, Gemini
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "observation": "tool",  # ChatGLM3, ShareGPT
    "function": "tool",  # OpenAI before tool_calls
    "function_response": "tool",
    "tool_response": "tool",  # ms-swift
    "tool_result": "tool",
    "ipython": "tool",  # Llama 3.1
}
CALL_ROLES = ("function_call", "tool_call")  # LLaMA-Factory, ms-swift: an assistant's turn whose text is a call in JSON
ROLES_UNDER = {  # by the key of the role, which tells the form: what a role is called there
    "role": ROLES,
    "from": ("system", "human", "gpt", "function_call", "observation"),
}


def folded(value: Any) -> str | None:
    """The name of a role as the tables above have it; None where it is no text."""
    return value.strip().casefold().replace(" ", "_") if isinstance(value, str) else None


def read_role(fields: Mapping[str, Any], key: str, path: str, problems: list[str]) -> Role | None:
    value = fields.get(key)
    known = ", ".join(ROLES_UNDER[key])
    role = ROLE_NAMES.get(folded(value) or "")
    if value is None:
        problems.append(f"{path}.{key} is missing{instead_of(key, fields)}; it is one of {known}")
    elif not isinstance(value, str):
        problems.append(f"{path}.{key} is {described(value)}, not one of {known}")
    elif role is None:
        meant = did_you_mean(folded(value) or "", (*ROLES_UNDER[key], *ROLE_NAMES)) or ";"
        problems.append(f"{path}.{key} is {value!r}{meant} the roles are {known}")
    return role
