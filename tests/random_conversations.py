"""Conversations drawn at random, each from a seed and a number, so that any one can be drawn again alone.

draw(0, 17)                    the 17th conversation of seed 0
draw(0, 17, hostile=False)     its harmless twin: the same, with a plain word wherever it spells a control token
"""

import json
import random
from collections.abc import Callable
from typing import Any

from chatlora.reading.conversation import Conversation, Message, ToolCall

WORDS = ["Hello", "city", "the", "of", "answer", "3.14", "42", "don't", "naïve", "return x", "e.g.", "Ω", "x"]
CJK = ["你好", "，", "。", "北京798艺术区", "こんにちは", "한국어", "門票"]
SYMBOLS = [
    "🙂",
    "👩‍👩‍👧",
    "🇩🇪",
    "é",
    "e\u0301",
    "\u200b",
    "\u00a0",
    "\u2028",
    "ﬁ",
    "\ufeff",
    "'s",
    "\\n",
    '"',
    "{",
    "}}",
    "%}",
    "<",
    ">",
    "|",
]
SPACE = [" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n "]
CONTROL = [
    *("<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|user|>", "<|end|>", "<|endoftext|>", "<|return|>"),
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "<end_of_turn>",
        "<turn|>",
        "<s>",
        "</s>",
    ),
    *(
        "[INST]",
        "[/INST]",
        "<|channel|>final",
        "<｜Assistant｜>",
        "<|END_OF_TURN_TOKEN|>",
        "<eos>",
        "<|im_e",
        "nd|>",
        "|>",
    ),
]
NAMES = ["search", "get_weather", "run-code", "lookUp2"]


class _Draw:
    def __init__(self, rng: random.Random, hostile: bool) -> None:
        self.rng = rng
        self.hostile = hostile
        self.weights = [8, 8, 2, 2, 1 if self.sometimes(0.6) else 0]

    def sometimes(self, probability: float) -> bool:
        return self.rng.random() < probability

    def text(self, longest: int = 12) -> str:
        pieces = []
        for _ in range(self.rng.randint(1, longest)):
            kind = self.rng.choices([WORDS, SPACE, CJK, SYMBOLS, CONTROL], self.weights)[0]
            piece = self.rng.choice(kind)
            pieces.append(_harmless(piece) if kind is CONTROL and not self.hostile else piece)
        return "".join(pieces)

    def said(self) -> str:
        """A text that is not space only: what people, systems and tools say."""
        return self.text() + self.rng.choice(["word", "字", "?"]) + ("" if self.sometimes(0.7) else self.text(2))

    def value(self, depth: int = 0) -> Any:
        makers: list[Callable[[], Any]] = [
            lambda: self.text(4),
            lambda: self.rng.randint(-5, 10**6),
            lambda: self.rng.choice([True, False, None, 0.5, "", "42", "true"]),
        ]
        if depth < 2:
            makers.append(lambda: [self.value(depth + 1) for _ in range(self.rng.randint(0, 3))])
            makers.append(
                lambda: {self.rng.choice(WORDS): self.value(depth + 1) for _ in range(self.rng.randint(0, 3))}
            )
        return self.rng.choice(makers)()

    def tool(self) -> dict[str, Any]:
        properties = {
            name: {"type": "string", "description": self.text(4)} for name in self.rng.sample(["a", "b", "c"], 2)
        }
        parameters = {"type": "object", "properties": properties, "required": ["a"] if "a" in properties else []}
        function = {"name": self.rng.choice(NAMES), "description": self.text(5), "parameters": parameters}
        return {"type": "function", "function": function}

    def calls(self) -> list[Message]:
        """An assistant's calls and their results."""
        calls = tuple(
            ToolCall(
                self.rng.choice(NAMES),
                {name: self.value() for name in self.rng.sample(["a", "b", "c"], 2)},
                f"call{n:05}",
            )
            for n in range(1 if self.sometimes(0.8) else 2)
        )
        thought = self.said() if self.sometimes(0.2) else None
        told = self.text() if self.sometimes(0.2) else ""
        results = [
            Message(
                "tool",
                self.said() if self.sometimes(0.7) else json.dumps(self.value()),
                tool_call_id=call.id,
                name=call.name,
            )
            for call in calls
        ]
        return [Message("assistant", told, reasoning=thought, tool_calls=calls), *results]

    def conversation(self, place: str) -> Conversation:
        messages: list[Message] = [Message("system", self.said())] if self.sometimes(0.4) else []
        tools = tuple(self.tool() for _ in range(self.rng.randint(1, 2))) if self.sometimes(0.25) else ()
        reasons = self.sometimes(0.3)
        for _ in range(self.rng.randint(1, 4)):
            messages.append(Message("user", self.said()))
            if self.sometimes(0.03):
                messages.append(Message("user", self.said()))
            if tools and self.sometimes(0.6):
                messages += self.calls()
            thought = self.said() if reasons and self.sometimes(0.7) else None
            loss = self.rng.choice([True, False]) if self.sometimes(0.05) else None
            messages.append(Message("assistant", self.text() if self.sometimes(0.97) else "", thought, loss=loss))
        return Conversation(tuple(messages), tools, place)


def _harmless(piece: str) -> str:
    """A plain word, with the space behind the piece."""
    return "plain" + piece[len(piece.rstrip()) :]


def draw(seed: int, number: int, *, hostile: bool = True) -> Conversation:
    """The conversation `number` of `seed`; with the same two always the same."""
    return _Draw(random.Random(f"{seed}:{number}"), hostile).conversation(f"seed {seed}, number {number}")
