"""Real rows that are clean, by a check that shares nothing with chatlora's."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Talk = list[dict[str, Any]]
Row = dict[str, Any]

# Of 2,000 rows; the others are of e2e.
MOST = {
    "kdconv_travel": 100,
    "glaive_toolcall_zh_demo": 200,
    "glaive_toolcall_en_demo": 180,
    "identity": 80,
}  # of 2,000
SPARE = {"kdconv_travel": 45, "e2e": 60}  # clean rows beside these, to plant with
HELD_OUT = 30  # of e2e
ALIKE = 0.6  # Jaccard of five-character pieces; chatlora tells from 0.8 on, and estimates it
NOT_CLEAN = ("<|", "<think>", "\ufffd", "Ã", "Â", "â€")


class Real(NamedTuple):
    """A row as it was published, and what is said in it: role and content."""

    file: str
    row: Row
    talk: Talk


def real_rows(data: Path) -> Iterator[Real]:
    for line in (data / "kdconv_travel.jsonl").read_text(encoding="utf-8").splitlines():
        yield Real("kdconv_travel", json.loads(line), json.loads(line)["conversations"])
    for file in ("glaive_toolcall_zh_demo", "glaive_toolcall_en_demo"):
        for row in json.loads((data / f"{file}.json").read_text(encoding="utf-8")):
            talk = [{"role": turn["from"], "content": turn["value"]} for turn in row["conversations"]]
            yield Real(file, row, talk)
    for row in json.loads((data / "identity.json").read_text(encoding="utf-8")):
        yield Real("identity", row, asked(row["instruction"] + row["input"], row["output"]))
    for line in (data / "e2e.jsonl").read_text(encoding="utf-8").splitlines():
        # The other way round: its 547 prompts have several answers each, its 4,672 answers are nearly all different.
        row = {"prompt": json.loads(line)["completion"], "completion": json.loads(line)["prompt"]}
        yield Real("e2e", row, asked(row["prompt"], row["completion"]))


def asked(prompt: str, reply: str) -> Talk:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


class Rows(NamedTuple):
    """All of them are clean, together too. spare: Chinese talks of many turns, English ones of one."""

    clean: list[Real]
    spare: list[Real]
    held_out: list[Real]


def clean_rows(data: Path, number: int) -> Rows:
    """`number` clean rows, of all files. No two rows ask the same, or have 0.6 of their five-character pieces in
    common; no text is empty, or holds what looks like a control token or a wrong encoding."""
    most = {file: rows * number // 2_000 for file, rows in MOST.items()}
    most["e2e"] = number - sum(most.values()) + HELD_OUT
    chosen = {file: _chosen(data, file, rows + SPARE.get(file, 0)) for file, rows in most.items()}
    spare = [chosen[file].pop() for file, rows in SPARE.items() for _ in range(rows)]
    held_out = [chosen["e2e"].pop() for _ in range(HELD_OUT)]
    return Rows([real for rows in chosen.values() for real in rows], spare, held_out)


def _chosen(data: Path, file: str, number: int) -> list[Real]:
    """The first rows of a file that are clean; those of two files are of other kinds."""
    chosen, sets, prompts = list[Real](), list[tuple[int, int]](), set[str]()
    numbers: dict[str, int] = {}
    for real in (real for real in real_rows(data) if real.file == file):
        texts = [" ".join(turn["content"].casefold().split()) for turn in real.talk]
        prompt = json.dumps(texts[:-1])
        broken = not all(texts) or any(mark in turn["content"] for mark in NOT_CLEAN for turn in real.talk)
        bits = _bits(" ".join(texts), numbers)
        if broken or prompt in prompts or _is_alike(bits, bits.bit_count(), sets):
            continue
        sets.append((bits, bits.bit_count()))
        prompts.add(prompt)
        chosen.append(real)
        if len(chosen) == number:
            return chosen
    raise AssertionError(f"{file}: only {len(chosen)} of {number}")


def _bits(text: str, numbers: dict[str, int]) -> int:
    """The set of a text's pieces of five characters, as the bits of a number: two are compared in a microsecond."""
    bits = 0
    for piece in {text[begin : begin + 5] for begin in range(len(text) - 4)}:
        bits |= 1 << numbers.setdefault(piece, len(numbers))
    return bits


def _is_alike(bits: int, size: int, others: Sequence[tuple[int, int]]) -> bool:
    enough = ALIKE / (1 + ALIKE)  # of both sizes: shared / (both - shared) is then ALIKE
    return any(
        ALIKE * size <= other_size <= size / ALIKE and (bits & other).bit_count() >= enough * (size + other_size)
        for other, other_size in others
    )
