"""Broken files and rows, each with where it is broken, what is said of it and how it is mended."""

# ruff: noqa: E501  (a table)
import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import parquet

USER, REPLY = {"role": "user", "content": "Where is Oslo?"}, {"role": "assistant", "content": "In Norway."}
CALL = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": {"at": "Oslo"}}}]}
GOOD = json.dumps({"messages": [USER, REPLY]})
REWRITE = "write the line with a JSON library, or remove it"
AGAIN = "Write it again, or remove the line"
ROLES = "it is one of system, user, assistant, tool"
STRICT_TEMPLATE = (  # as Gemma's: roles alternate, and there is no system role
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Broken:
    """place: how the sentence about it begins, `{}` standing for the file. said, remedy: parts of that sentence."""

    name: str
    content: bytes
    place: str
    said: str
    remedy: str
    file: str = "t.jsonl"
    flags: tuple[str, ...] = ()
    readable: bool = False  # rows that can be read, and cannot be rendered


def messages(*turns: Any, **columns: Any) -> bytes:
    return json.dumps({"messages": list(turns), **columns}).encode()


def second(line: bytes | str) -> bytes:
    """A good row, then this one."""
    return f"{GOOD}\n".encode() + (line.encode() if isinstance(line, str) else line) + b"\n"


def nested(levels: int) -> Any:
    value: Any = "deep"
    for _ in range(levels):
        value = [value]
    return value


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), written)
    return written.getvalue()


def call_with(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


_PARQUET = parquet_of([{"prompt": f"question {number}", "completion": "yes"} for number in range(500)])
_NOTHING_TO_LEARN = "look at the roles"

LINES = [  # lines of JSON Lines that are no row
    Broken("cut in a text", second('{"messages": [{"role": "us'), "{}:2", "the JSON breaks off", AGAIN),
    Broken("cut after a comma", second('{"messages": [],'), "{}:2", "the JSON breaks off", AGAIN),
    Broken("cut in the middle", second(GOOD[:30]) + GOOD.encode(), "{}:2", "the JSON breaks off", AGAIN),
    Broken("10 MB, cut", second('{"prompt": "' + "word " * 2_000_000), "{}:2", "the JSON breaks off after 1000001", AGAIN),
    Broken("cut in a character", second('{"prompt": "你'.encode()[:-1]), "{}:2", "not UTF-8", "convert the file"),
    Broken("NUL tail", second(b"\0" * 4096), "{}:2", "NUL bytes", "write the file again, or remove the line"),
    Broken("NUL in a line", second(b'{"prompt": "a\0b", "completion": "c"}'), "{}:2", "NUL bytes", "write the file again"),
    Broken("GBK", second('{"prompt": "你好", "completion": "再见"}'.encode("gbk")), "{}:2", "not UTF-8", "iconv -f GB18030"),
    Broken("Latin-1", second(b'{"prompt": "caf\xe9", "completion": "c"}'), "{}:2", "byte 0xe9", "convert the file to UTF-8"),
    Broken("UTF-16", f"{GOOD}\n".encode("utf-16"), "{}:1", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
    Broken("BOM inside", second(f"\ufeff{GOOD}"), "{}:2", "byte-order mark stands inside the file", "remove it"),
    Broken("key twice", second('{"prompt": "a", "prompt": "b", "completion": ""}'), "{}:2", "'prompt' stands twice", "keep one"),
    Broken("key twice inside", second('{"messages": [{"role": "user", "role": "user"}]}'), "{}:2", "stands twice", "keep one"),
    Broken("two objects", second(GOOD + GOOD), "{}:2", "Extra data", REWRITE),
    Broken("comma at the end", second('{"prompt": "p", "completion": "c",}'), "{}:2", "not JSON at column", REWRITE),
    Broken("single quotes", second("{'prompt': 'p', 'completion': 'c'}"), "{}:2", "not JSON at column 2", REWRITE),
    Broken("line break in a text", second('{"prompt": "a\nb", "completion": "c"}'), "{}:2", "the JSON breaks off", AGAIN),
    Broken("tab in a text", second('{"prompt": "a\tb", "completion": "c"}'), "{}:2", "Invalid control character", REWRITE),
    Broken("bad escape", second('{"prompt": "C:\\dir", "completion": "c"}'), "{}:2", "Invalid \\escape", REWRITE),
    Broken("a comment", second("// rows"), "{}:2", "not JSON at column 1", REWRITE),
    Broken("a list as a row", second('["p", "c"]'), "{}:2", "a list where a row was expected", "named columns"),
    Broken("a text as a row", second('"p"'), "{}:2", "a str where a row was expected", "named columns"),
    Broken("a listed file", f"[{GOOD}]".encode(), "{}:1", "not one object a line", "name it .json"),
    Broken("an indented file", b'{\n "prompt": "p",\n "completion": "c"\n}', "{}:1", "not one object a line", "name it .json"),
    Broken("nested far", second('{"prompt": ' + "[" * 100_000), "{}:2", "nested too deeply", "write it flatter"),
    Broken("an endless number", second('{"prompt": ' + "1" * 5000 + "}"), "{}:2", "more than 4,300 digits", "put it in quotes"),
    Broken("empty", b"", "{}", "holds no rows", "is it the right file?"),
    Broken("blank lines only", b"\n\n \n", "{}", "holds no rows", "is it the right file?"),
]  # fmt: skip
ROWS = [  # rows in which something is missing or wrong
    Broken("integer as text", second(messages({"role": "user", "content": 5}, REPLY)), "{}:2", "the number 5", "put it in quotes"),
    Broken("null as text", second(messages({"role": "user", "content": None}, REPLY)), "{}:2", "missing or null", 'is written as ""'),
    Broken("NaN as text", second('{"prompt": NaN, "completion": "c"}'), "{}:2", "the number nan", "put it in quotes"),
    Broken("no content", second(messages({"role": "user"}, REPLY)), "{}:2", "messages[0].content is missing", "is written as"),
    Broken("content misspelled", second(messages({"role": "user", "contnet": "x"}, REPLY)), "{}:2", "content is missing", "did you mean 'contnet'?"),
    Broken("unknown role", second(messages({"role": "robot", "content": "x"}, REPLY)), "{}:2", "role is 'robot'", "the roles are"),
    Broken("role misspelled", second(messages(USER, {"role": "asistant", "content": "x"})), "{}:2", "'asistant'", "did you mean 'assistant'?"),
    Broken("no role", second(messages({"content": "x"}, REPLY)), "{}:2", "messages[0].role is missing", ROLES),
    Broken("a number as role", second(messages({"role": 1, "content": "x"})), "{}:2", "the number 1", "system, user, assistant, tool"),
    Broken("a text as message", second(messages("hello")), "{}:2", "messages[0] is the text 'hello'", "a message with role and content"),
    Broken("messages no list", second('{"messages": 5}'), "{}:2", "messages is the number 5", "not a list"),
    Broken("lone surrogate", second('{"prompt": "a\\ud83d", "completion": "c"}'), "{}:2", "half a character", "write the whole character"),
    Broken("lone surrogate in a call", second(messages(USER, call_with(name="f", arguments={"a": "\ud800"}))), "{}:2", "half a character", "write the whole"),
    Broken("picture", second(messages({"role": "user", "content": [{"type": "image_url"}]}, REPLY)), "{}:2", "type is 'image_url'", "only parts of type 'text'"),
    Broken("column misspelled", second('{"prompt": "p", "completon": "c"}'), "{}:2", "completion is missing or null", "the row has the columns"),
    Broken("unknown columns", second('{"head": "p", "body": "c"}'), "{}:2", "no known form", "perhaps columns: {prompt: head, completion: body}"),
    Broken("empty object", second("{}"), "{}:2", "no known form", "chatlora reads messages"),
    Broken("two forms", second('{"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}'), "{}:2", "could be", "say which with format:"),
    Broken("loss as text", second(messages(USER, {**REPLY, "loss": "no"})), "{}:2", "loss is the text 'no'", "true or false"),
    Broken("arguments no JSON", second(messages(USER, call_with(name="f", arguments="{x"))), "{}:2", "should be JSON", "'{x'"),
    Broken("arguments nested far", second(messages(USER, call_with(name="f", arguments=nested(300)))), "{}:2", "more than 64 levels", "write it flatter"),
    Broken("schema nested far", second(messages(USER, REPLY, tools=[{"name": "f", "parameters": nested(900)}])), "{}:2", "more than 64 levels", "write it flatter"),
    Broken("call without a name", second(messages(USER, call_with(arguments={}))), "{}:2", "function.name is missing", "is written as"),
    Broken("nameless tool", second(messages(USER, REPLY, tools=[{"description": "x"}])), "{}:2", "tools[0].name is missing", "is written as"),
    Broken("tools no JSON", second(messages(USER, REPLY, tools="[{")), "{}:2", "tools should be JSON", "'[{'"),
    Broken("result without a call", second(messages(USER, {"role": "tool", "content": "3"}, REPLY)), "{}:2", "message 2 of 3 is a tool's result", "put the call there"),
    Broken("result of another call", second(messages(USER, CALL, {"role": "tool", "content": "3", "tool_call_id": "c2"}, REPLY)), "{}:2", "for the call 'c2'", "the ids are c1"),
    Broken("two systems", second(messages({"role": "system", "content": "a"}, USER, REPLY, system="b")), "{}:2", "say different things", "keep one of them"),
    Broken("two thoughts", second(messages(USER, {**REPLY, "reasoning": "a", "thinking": "b"})), "{}:2", "different texts", "keep one"),
    Broken("history no pairs", second('{"instruction": "i", "output": "o", "history": ["q"]}'), "{}:2", "history[0] is the text 'q'", "a pair [question, answer]"),
    Broken("another form than stated", second('{"prompt": "p", "completion": "c"}'), "{}:2", "messages is missing", "the form messages needs", flags=("--data.train", '[{"path": "t.jsonl", "format": "messages"}]')),
    Broken("forms mixed, one broken", second('{"prompt": "p", "completion": "c"}\n{"instruction": "p"}'), "{}:3", "output is missing", "the row has the columns"),
]  # fmt: skip
FILES = [  # other kinds of file
    Broken("list never closed", f"[\n{GOOD},\n{GOOD}\n".encode(), "{}:4", "the list is never closed", "Write it again", "t.json"),
    Broken("list without commas", f"[\n{GOOD}\n{GOOD}]".encode(), "{}:3", "Expecting ',' delimiter", "nothing after it was read", "t.json"),
    Broken("two lists", f"[{GOOD}]\n[{GOOD}]".encode(), "{}:1", "something follows the list", "one list of rows", "t.json"),
    Broken("a number in the list", f"[{GOOD}, 3]".encode(), "{}:1", "a int where a row was expected", "named columns", "t.json"),
    Broken("list not UTF-8", f"[{GOOD},\n".encode() + b"\xff]", "{}:2", "not UTF-8", "convert the file to UTF-8", "t.json"),
    Broken("empty list", b"[]", "{}", "holds no rows", "is it the right file?", "t.json"),
    Broken("list nested far", b"[" * 100_000, "{}:1", "nested too deeply", "nothing after it was read", "t.json"),
    Broken("too many fields", b"prompt,completion\np,c\np,c,d\n", "{}:3", "3 fields where the header has 2", "not quoted?", "t.csv"),
    Broken("open quote", b'prompt,completion\np,"c\n', "{}:2", "is a quote left open?", "Close it", "t.csv"),
    Broken("column named twice", b"prompt,prompt\np,c\n", "{}:1", "names 'prompt' twice", "a name of its own", "t.csv"),
    Broken("semicolons", b"prompt;completion\np;c\n", "{}:1", "is ';' the delimiter?", "a comma in .csv", "t.csv"),
    Broken("tabs in .csv", b"prompt\tcompletion\np\tc\n", "{}:1", "is '\\t' the delimiter?", "a tab in .tsv", "t.csv"),
    Broken("commas in .tsv", b"prompt,completion\np,c\n", "{}:1", "is ',' the delimiter?", "a tab in .tsv", "t.tsv"),
    Broken("CSV with NUL", b"prompt,completion\np,c\0\n", "{}:2", "NUL", "write the file again", "t.csv"),
    Broken("CSV not UTF-8", b"prompt,completion\np,c\n\xff,c\n", "{}:", "not UTF-8", "convert the file to UTF-8", "t.csv"),
    Broken("header only", b"prompt,completion\n", "{}", "holds no rows", "is it the right file?", "t.csv"),
    Broken("Parquet cut short", _PARQUET[: len(_PARQUET) // 2], "{}", "not readable as Parquet", "Copy it again", "t.parquet"),
    Broken("Parquet's middle lost", _PARQUET[:4] + b"\0" * 200 + _PARQUET[204:], "{}", "not readable as Parquet", "Copy it again", "t.parquet"),
    Broken("no Parquet", b"PAR1 broken", "{}", "not readable as Parquet", "Copy it again", "t.parquet"),
    Broken("integers in Parquet", parquet_of([{"prompt": 5, "completion": "c"}]), "{}: row 1", "the number 5", "put it in quotes", "t.parquet"),
]  # fmt: skip
RENDERED = [  # rows that can be read, and cannot be learned from
    Broken("empty conversation", messages(), "{}:1", "no assistant message is a target", _NOTHING_TO_LEARN, readable=True),
    Broken("no assistant", messages(USER), "{}:1", "no assistant message is a target", _NOTHING_TO_LEARN, readable=True),
    Broken("nothing to learn", messages(USER, {**REPLY, "loss": False}), "{}:1", "no assistant message is a target", "`loss` in the rows", readable=True),
    Broken("two user turns", messages(USER, USER, REPLY), "{}:1", "roles must alternate", "take model.chat_template embedded:", flags=("--model.chat_template", "strict.jinja"), readable=True),
    Broken("system not taken", messages({"role": "system", "content": "x"}, USER, REPLY), "{}:1", "roles must alternate", "take model.chat_template embedded:", flags=("--model.chat_template", "strict.jinja"), readable=True),
    Broken("calls not rendered", messages(USER, CALL), "{}:1", "drops tool calls", "take model.chat_template embedded:", readable=True),
    Broken("reasoning not rendered", messages(USER, {**REPLY, "reasoning": "far north"}), "{}:1", "drops reasoning", "take model.chat_template embedded:", flags=("--data.reasoning", "field"), readable=True),
    Broken("private characters", messages({"role": "user", "content": "\U000f0041"}, REPLY), "{}:1", "private planes", "without such characters", readable=True),
    Broken("10 MB", messages({"role": "user", "content": "word " * 2_000_000}, REPLY), "{}:1", "no reply fits", "raise data.max_length", readable=True),
    Broken("too long", messages({"role": "user", "content": "word " * 300}, REPLY), "{}:1", "256", "over_length", flags=("--data.over_length", "error")),
]  # fmt: skip
EVERY = [*LINES, *ROWS, *FILES, *RENDERED]
