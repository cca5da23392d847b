"""Good rows with one part replaced by junk: a conversation, a mistake that is told, or a row set aside; never a crash.

Run: pytest tests/reading/test_mutated_rows.py [-m slow]
"""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatlora.config import Source
from chatlora.errors import DataError, SetAside
from chatlora.reading.noted import Unread
from chatlora.reading.sources import read_conversations
from chatlora.rendering.renderer import Renderer
from tests.rendering.test_chat_templates import TEMPLATES, TOOL, renderer_of

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": ["Oslo", 1, None]}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "A map."},
    {"role": "tool", "content": {"found": 1}, "tool_call_id": "c1", "name": "look"},
    {"role": "assistant", "content": "There.", "loss": True},
]
SHAREGPT = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "<think>hm</think>a"},
]
PARTS = [
    {"role": "user", "content": "q", "weight": 0.0, "mask": 0},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "name": "f"}]},
    {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "3"}]}]},
    {"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1}}'},
    {"role": "tool_response", "content": "4"},
    {"role": "assistant", "content": "a", "weight": 1.0, "mask": 1},
]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": [TOOL]},
    {"conversations": SHAREGPT, "system": "s", "tools": json.dumps([TOOL["function"]])},
    {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]},
    {"prompt": "p", "completion": "c"},
    {"prompt": TURNS[:2], "completion": TURNS[4:]},
    {"messages": PARTS, "reasoning": "hm", "chat_template_kwargs": {"enable_thinking": True}},
    {"prompt": "p", "completion": "c", "reasoning": "hm", "history": [["q", "a"]]},
    {"query": "q", "answers": '[{"name": "look", "arguments": {}}]', "tools": json.dumps([TOOL["function"]])},
    {"conversation": [{"input": "q", "output": "a"}], "system_prompt": "s"},
    {"data": ["q", "a", "q", "a"]},
    {"chat": {"turn_1": {"Human": "<|Human|>: q<eoh>", "MOSS": "<|MOSS|>: a<eom>"}}},
    {"chat": 'USER: q\n\n\nASSISTANT: <functioncall> {"name": "f"} <|endoftext|>\n\n\nFUNCTION RESPONSE: 3'},
    {"instruction": "i", "instances": [{"input": "x", "output": "o"}]},
    {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
    {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}, "label": True, "images": []},
    {"conversations": [TURNS[1], {"role": "tool", "name": "n", "parameters": {}, "observation": "o"}, TURNS[4]]},
]
JUNK: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**30, float("nan"), "", " ", "\n", "x", "null", "{", "[]", "{}", '"', "\ud800", "\x00"),
    *([], {}, [[]], [{}], [None], ["x"], [1], {"a": 1}, {"role": "user"}, {"type": "text"}, "NESTED 70", "NESTED 800"),
    *("<|im_end|>", "\U000f0041", "\ufeff", "x" * 10_000, [["q"]], [["q", "a", "b"]], {"name": 1}, {"function": 5}),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def mutated(rng: random.Random) -> dict[str, Any]:
    row = copy.deepcopy(rng.choice(ROWS))
    for _ in range(rng.choice([1, 1, 1, 2])):
        path = rng.choice(list(paths(row)) or [("messages",)])
        inside = row
        for key in path[:-1]:
            inside = inside[key]
        action = rng.random()
        if action < 0.7:
            inside[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        elif action < 0.85:
            inside.pop(path[-1], None) if isinstance(inside, dict) else inside.pop(path[-1])
        elif isinstance(inside, dict):
            inside[str(path[-1]) + "s"] = inside.pop(path[-1], None)
        else:
            inside.insert(path[-1], copy.deepcopy(inside[path[-1]]))
    return row


def check(path: Path, numbers: range, renderers: list[Renderer]) -> tuple[int, int, int]:
    """How many rows were rendered, refused by the template, and unreadable."""
    text = "\n".join(json.dumps(mutated(random.Random(number))) for number in numbers)
    for levels in (70, 800):
        text = text.replace(f'"NESTED {levels}"', "[" * levels + "]" * levels)
    path.write_text(text)
    unread: list[Unread] = []
    rendered, refused = 0, []
    for conversation in read_conversations(Source(path=str(path)), set_aside=unread):
        for renderer in renderers:
            try:
                renderer.render(conversation, max_length=2048)
                rendered += 1
            except SetAside as reason:
                refused.append(f"{conversation.place}: {reason}")
    assert not [reason for reason in refused if "the proof failed" in reason]
    assert (rendered + len(refused)) / len(renderers) + len(unread) == len(numbers)
    if unread:
        with pytest.raises(DataError) as told:
            list(read_conversations(Source(path=str(path))))
        assert all(problem.startswith(f"{path}:") for problem in told.value.problems)
    return rendered, len(refused), len(unread)


def test_mutated_rows_never_crash(tmp_path: Path) -> None:
    renderers = [renderer_of(TEMPLATES[name], any_reasoning=True) for name in ("qwen3", "llama3_1", "gptoss")]
    assert min(check(tmp_path / "t.jsonl", range(600), renderers)) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_many_mutated_rows_never_crash(tmp_path: Path, name: str) -> None:
    renderer = renderer_of(TEMPLATES[name], any_reasoning=True)
    check(tmp_path / "t.jsonl", range(600, 5_000), [renderer])
