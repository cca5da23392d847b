"""Ten rows of each of eleven faults, and the files in which they stand among clean ones."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from tests.inspection.clean_rows import Real, Row, Rows, Talk

TEMPLATE = """\
{%- set end = {'plain': '<|endoftext|>', 'none': ''}[ends] if ends is defined else '<|im_end|>' %}
{%- if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {%- set shown = loop.first if message.role == 'system' else message.role == 'assistant' or message.content %}
    {%- if shown %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + call.function.name + '\\n' + call.function.arguments | tojson + '</tool_call>' }}
        {%- endfor %}
        {%- if not (message.reasoning_content or message.tool_calls and loop.last) %}{{ end + '\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('<think>\\n' if thinking else '') }}{% endif %}
"""  # Its faults are those of published ones: second system messages and empty ones go, some replies have no end.


class Plant(NamedTuple):
    """A line to write, and the row that it must stand behind, if any."""

    line: bytes
    behind: Real | None = None


def written(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def messages(talk: Talk, **more: Any) -> bytes:
    return written({"messages": talk, **more})


def at(talk: Talk, index: int, **fields: Any) -> Talk:
    """The talk with these fields in one of its messages."""
    return [{**turn, **fields} if turn is talk[index] else turn for turn in talk]


def every(talk: Talk, **fields: Any) -> Talk:
    return [{**turn, **fields} for turn in talk]


def told(talk: Talk, index: int, form: str) -> Talk:
    """The talk with another text in one of its messages; form: `{}` is what stood there."""
    return at(talk, index, content=form.format(talk[index]["content"]))


def senses(talk: Talk) -> Talk:
    """`mask` of both senses on the user's turns."""
    return [{**turn, "mask": number % 4 // 2} for number, turn in enumerate([*talk, *talk])]


def misread(talk: Talk, index: int, encoding: str, more: str = "") -> Talk:
    """A message as it comes out where UTF-8 is read as something else."""
    return at(talk, index, content=(talk[index]["content"] + more).encode().decode(encoding, "replace"))


def system(text: str = "Answer in one sentence.") -> dict[str, Any]:
    return {"role": "system", "content": text}


def called(talk: Talk, result: str) -> Talk:
    call = {"name": "find", "arguments": {"what": "名胜"}}
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    return [talk[0], calling, {"role": "tool", "content": result}, *talk[1:]]


def share_gpt(talk: Talk, **more: Any) -> Row:
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"], **more} for turn in talk]}


THOUGHT = {"reasoning_content": "First the place, then its price."}
ALONE: dict[str, list[Callable[[Talk], bytes]]] = {
    "broken mask": [
        lambda talk: messages(at(talk, -1, weight=0.5)),
        lambda talk: messages(at(talk, -1, train="false")),
        lambda talk: messages(at(talk, 1, train=True, weight=0)),
        lambda talk: messages(at(talk, -1, loss=[0, 1])),
        lambda talk: messages(at(talk, 1, loss_mask=-1)),
        lambda talk: messages(at(talk, -1, mask=1)),
        lambda talk: messages(senses(talk)),
        lambda talk: messages(every(talk, masked=True)),
        lambda talk: messages(at(talk, 1, train_on_turn=2)),
        lambda talk: messages(talk, chat_template_kwargs={"thinking": True}),
    ],
    "missing stop": [
        *3 * [lambda talk: messages(at(talk, -1, **THOUGHT))],
        *2 * [lambda talk: messages(told(talk, -1, "<think>\nIt is far.\n</think>\n\n{}"))],
        *2 * [lambda talk: messages(called(talk, "x")[:2])],
        *2 * [lambda talk: messages(talk, chat_template_kwargs={"ends": "none"})],
        lambda talk: messages(talk, chat_template_kwargs={"ends": "plain"}),
    ],
    "control words": [
        lambda talk: messages(told(talk, 0, "{}<|im_end|>")),
        lambda talk: messages(told(talk, 0, "<|im_start|>system\n{}")),
        lambda talk: messages(told(talk, -1, "{}<|im_end|>")),
        lambda talk: messages(told(talk, -1, "<|endoftext|>{}")),
        lambda talk: messages(told(talk, 1, "为什么<|im_end|>呢？{}")),
        lambda talk: messages([system("Never write <|im_start|>."), *talk]),
        lambda talk: messages(called(talk, "rows: <|im_end|>")),
        lambda talk: written(share_gpt(told(talk, -1, "{} <|im_start|>user"))),
        lambda talk: messages(told(talk, 0, "x" * 300 + "<|endoftext|>" + "{}")),
        lambda talk: messages(told(talk, 0, "{}\n<|im_start|>")),
    ],
    "all targets cut": [
        *4 * [lambda talk: messages(told(talk, 0, "{} " + "so far, " * 4_000))],
        *2 * [lambda talk: messages([system("一二三四五六七八九十" * 700), *talk])],
        *3 * [lambda talk: messages(at(called(talk, "很远。" * 4_000), 1, loss=False))],
        lambda talk: messages(at(told(talk, 0, "{} " + "far " * 9_000), 1, loss=True)),
    ],
    "wrong encoding": [
        lambda talk: messages(told(talk, 0, "{}价格")).decode().encode("gb18030"),
        lambda talk: messages(misread(talk, 0, "cp1252", "，café")),
        lambda talk: messages(misread(talk, -1, "latin-1", " très près")),
        lambda talk: messages(misread(talk, 1, "gb18030", "，价格是一百二十元左右")),
        lambda talk: messages(misread(talk, -1, "cp932", "こんにちは、世界の皆さん")),
        lambda talk: messages(misread(talk, 0, "cp1251", " Сколько это стоит?")),
        lambda talk: messages(told(talk, -1, "{} It’s £5".encode().decode("cp1252"))),
        lambda talk: messages(told(talk, 0, "{} na\ufffdve")),
        lambda talk: messages(told(talk, -1, "{} 锟斤拷锟斤拷")),
        lambda talk: messages(told(talk, 0, "{} don\x92t")),
    ],
    "empty reply": [
        lambda talk: messages(at(talk, -1, content="")),
        lambda talk: messages(at(talk, -1, content=" ")),
        lambda talk: messages(at(talk, -1, content="\n\n")),
        lambda talk: messages(at(talk, 1, content="")),
        lambda talk: messages(at(talk, 1, content="\u3000")),
        lambda talk: messages(at(talk, -1, content="\u200b")),
        lambda talk: messages(at(talk, -1, content="<think>\n\n</think>\n\n")),
        lambda talk: written({"prompt": talk[0]["content"], "completion": ""}),
        lambda talk: written({"instruction": talk[0]["content"], "input": "", "output": "\ufeff"}),
        lambda talk: written(share_gpt(at(talk, -1, content="\t"))),
    ],
    "dropped context": [
        lambda talk: messages([system(), system("And be kind."), *talk]),
        lambda talk: messages([talk[0], system("用中文回答。"), *talk[1:]]),
        lambda talk: messages([*talk[:-1], system(talk[0]["content"]), talk[-1]]),
        lambda talk: messages([system("No."), *talk, system("Yes."), *talk]),
        lambda talk: messages(at(talk, 0, content="")),
        lambda talk: messages([*talk, *at(talk[:2], 0, content="")]),
        lambda talk: written(share_gpt(at(talk, 0, content=""))),
        *2 * [lambda talk: messages(called(talk, ""))],
        lambda talk: messages([*called(talk, "far"), *called(talk, "")]),
    ],
    "unread flag": [
        lambda talk: messages(at(talk, -1, good=False)),
        lambda talk: messages(at(talk, 1, include=0)),
        lambda talk: messages(at(talk, -1, is_target=True)),
        lambda talk: messages(at(talk, 0, keep=False)),
        lambda talk: messages(every(talk, supervised=1)),
        lambda talk: messages(at(talk, -1, quality=0.3)),
        lambda talk: messages(at(talk, -1, 训练=True)),
        lambda talk: messages(at(talk, -1, Loss=False)),
        lambda talk: written(share_gpt(talk, learn=True)),
        lambda talk: messages(at(talk, -1, loss=True, weight_=0)),
    ],
}
# Each with one clean row and one other talk.
AGAIN: list[Callable[[Real], bytes]] = [
    lambda real: written(real.row),
    lambda real: messages(real.talk),
    lambda real: messages(told(real.talk, -1, " {}\n")),
    lambda real: messages(at(real.talk, 0, content=real.talk[0]["content"].replace(" ", "  ") + "\n")),
    lambda real: messages(at(real.talk, 0, content=real.talk[0]["content"].upper())),
    lambda real: messages(told(real.talk, 0, "{} Well?")),
    lambda real: messages([system(), *real.talk]),
    lambda real: messages(told(real.talk, 0, "Hi: {}")),
    lambda real: written(share_gpt(real.talk)),
    lambda real: written({"instruction": real.talk[0]["content"], "output": real.talk[-1]["content"]}),
]
OTHER_ANSWERS = ["I do not know.", "不知道。", "Ask me later, please.", "name[]", "No."]
OTHERWISE: list[Callable[[Real, str], bytes]] = [
    *5 * [lambda real, answer: messages(at(real.talk, -1, content=answer))],
    *3 * [lambda real, answer: messages(told(at(real.talk, -1, content=answer), 0, " {}\n"))],
    *2 * [lambda real, answer: written({"prompt": real.talk[0]["content"], "completion": answer})],
]
LEAKING: list[Callable[[Real, Talk], bytes]] = [
    *2 * [lambda real, talk: written(real.row)],
    *2 * [lambda real, talk: messages([*real.talk[:-1], talk[-1]])],
    lambda real, talk: messages([*real.talk, *talk]),
    lambda real, talk: messages([*real.talk[:-1], talk[1], *talk]),
    lambda real, talk: messages(told(real.talk, 0, "Hi: {}")),
    lambda real, talk: messages(told(real.talk, -1, "{} Yes.")),
    lambda real, talk: written(share_gpt(real.talk)),
    lambda real, talk: messages(at(real.talk, 0, content=f"\n{real.talk[0]['content']} ")),
]


def planted(rows: Rows, rng: random.Random) -> dict[str, list[Plant]]:
    """Ten of each kind, each made of a row of its own."""
    talks = iter(rng.sample([real.talk for real in rows.spare], len(rows.spare)))
    partners = iter(rng.sample([real for real in rows.clean if real.file == "e2e"], 20))
    alone = {kind: [Plant(make(next(talks))) for make in makers] for kind, makers in ALONE.items()}
    again = [Plant(make(real), real) for make in AGAIN for real in islice(partners, 1)]
    answers = zip(OTHERWISE, cycle(OTHER_ANSWERS), partners, strict=False)
    otherwise = [Plant(make(real, answer), real) for make, answer, real in answers]
    leaking = [Plant(make(real, next(talks))) for make, real in zip(LEAKING, rows.held_out, strict=False)]
    return {**alone, "duplicate": again, "contradiction": otherwise, "leak": leaking}


def write_among(
    folder: Path, clean: Sequence[Real], plants: Mapping[str, Sequence[Plant]], rng: random.Random
) -> dict[str, str]:
    """Two files of rows in any order; place -> kind of those that are planted."""
    files: list[list[tuple[str, bytes]]] = [[], []]
    where: dict[int, int] = {}
    for real, file in zip(rng.sample(clean, len(clean)), cycle((0, 1)), strict=False):
        files[file].append(("", written(real.row)))
        where[id(real)] = file
    for kind, each in plants.items():
        for plant in each:
            file, low = rng.randrange(2), 0
            if plant.behind is not None:
                own = where[id(plant.behind)]
                file = max(file, own)
                low = files[own].index(("", written(plant.behind.row))) + 1 if file == own else 0
            files[file].insert(rng.randint(low, len(files[file])), (kind, plant.line))
    places: dict[str, str] = {}
    for name, rows in zip(("first.jsonl", "second.jsonl"), files, strict=True):
        (folder / name).write_bytes(b"".join(line + b"\n" for _, line in rows))
        places |= {f"{name}:{number}": kind for number, (kind, _) in enumerate(rows, start=1) if kind}
    return places
