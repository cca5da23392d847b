"""What is said to a chat: commands, room in the model's context, rows that are saved, thoughts shown apart."""

import io
import json
import re
import signal
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from chatlora.chat.answers import Answer, Answering, open_chat
from chatlora.chat.asked import Sampling, help_text, parse
from chatlora.chat.lines import Line, piped
from chatlora.chat.screens import Piped, PipedJson, Terminal, thought_and_answer
from chatlora.chat.session import COMMANDS, Session, interruptible
from chatlora.chat.talk import Talk, fitted, save
from chatlora.config import Source
from chatlora.distributed.runtime import start
from chatlora.distributed.signals import StopSignals
from chatlora.errors import ChatError, ConfigError
from chatlora.reading.conversation import Message, reply, split_reasoning
from chatlora.reading.sources import read_conversations
from tests.chats import SYSTEM, make_chat_world
from tests.runs import noted
from tests.tiny_tokenizers import QWEN3

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_world(tmp_path_factory.mktemp("model")) / "model"


@pytest.fixture(scope="module")
def answering(model: Path) -> Answering:
    words = ["--run.precision", "fp32", "--run.cpu_threads", "1", "--max_new_tokens", str(NEW_TOKENS)]
    asked = parse([str(model), *words])
    return open_chat(asked, start(asked.config, StopSignals()), pytest.fail)


class Told(PipedJson):
    """What was said beside the answers, too."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def session(answering: Answering) -> Session:
    return Session(answering, Told(), SYSTEM, can_interrupt=False)


def lines_of(session: Session) -> list[str]:
    assert isinstance(session.screen, Told)
    return session.screen.lines


def last(session: Session) -> str:
    return session.talk.messages[-1].content


# ---- commands


def test_undo_reset_system_and_retry(session: Session) -> None:
    session.take("Where is Oslo?")
    first = session.talk
    session.take("Where is Rome?")
    second = session.talk
    assert [message.role for message in second.messages] == ["user", "assistant"] * 2
    session.take("/retry")
    assert session.talk == second  # greedy text is the same again
    session.take("/undo")
    assert session.talk == first
    session.take("/system")
    session.take("/retry")
    assert (session.talk.system, session.talk.num_exchanges) == (None, 1)
    assert last(session) != first.messages[-1].content
    session.take(f"/system {SYSTEM}")
    session.take("/reset")
    assert session.talk == Talk(SYSTEM)
    session.take("/system two\nlines")
    assert session.talk.system == "two\nlines"
    assert not session.take("/exit")


def test_a_message_may_begin_with_a_slash(session: Session) -> None:
    session.take("//etc")
    session.take("/reset", is_message=True)
    assert [message.content for message in session.talk.messages[::2]] == ["/etc", "/reset"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/sytem x", "there is no command /sytem; did you mean '/system'?"),
        ("/undo", "/undo: nothing has been said yet"),
        ("/retry", "/retry: nothing has been said yet"),
        ("/save a.jsonl", "/save: nothing has been said yet"),
        ("/save", "/save needs FILE"),
        ("/reset now", "/reset takes nothing behind it, but there is 'now'"),
        ("/both", "there is a model alone"),
        ("x " * 3000, "the message takes 6,0"),
        ("\U000f0000", "private planes"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(session: Session, line: str, told: str) -> None:
    before = session.talk
    with pytest.raises(ChatError, match=told.replace("?", r"\?")):
        session.take(line)
    assert session.talk == before


def test_a_message_that_the_template_drops_is_told(answering: Answering) -> None:
    """Gemma's, for one, has no place for a system message; some leave it out without a word."""
    deaf = QWEN3.replace("for message in messages", "for message in messages if message.role != 'system'", 1)
    session = Session(replace(answering, renderer=answering.renderer.under(deaf)), Told(), SYSTEM, can_interrupt=False)
    with pytest.raises(ChatError, match="system"):
        session.take("hi")
    session.take("/system")
    session.take("hi")
    assert session.talk.num_exchanges == 1


def test_help_lists_every_command(session: Session) -> None:
    session.take("/help")
    assert [line.split()[0] for line in lines_of(session)[:-1]] == list(COMMANDS)


# ---- room


def test_the_oldest_exchanges_leave_whole_and_the_system_message_stays(answering: Answering) -> None:
    session = Session(replace(answering, limit=90), Told(), SYSTEM, can_interrupt=False)
    prompts: list[int] = []
    for number in range(6):
        session.take(f"{number}. Where is Oslo?")
        prompts.append(len(answering.prompt_ids(session.talk.with_message(Message("user", "")).conversation)))
        assert session.talk.system == SYSTEM
        assert [message.role for message in session.talk.messages] == ["user", "assistant"] * session.talk.num_exchanges
        assert session.talk.left + session.talk.num_exchanges == number + 1
    assert session.talk.left > 1
    assert session.talk.messages[0].content == f"{session.talk.left}. Where is Oslo?"
    told = [line for line in lines_of(session) if "oldest" in line]
    assert sum(int(line.split()[0]) for line in told) == session.talk.left


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), limit=st.integers(1, 60), longest=st.integers(1, 20)
)
def test_no_more_leaves_than_must(lengths: list[int], limit: int, longest: int) -> None:
    """A template of one token a character."""
    messages = [Message("user" if number % 2 == 0 else "assistant", "x" * size) for number, size in enumerate(lengths)]
    talk = Talk("s", tuple(messages[: len(messages) - 1 + len(messages) % 2]))

    def ids(conversation: object) -> list[int]:
        assert hasattr(conversation, "messages")
        return [0] * sum(len(message.content) for message in conversation.messages)

    if limit <= 1 + len(talk.messages[-1].content):
        with pytest.raises(ChatError, match="say it shorter"):
            fitted(talk, ids, limit, longest)
        return
    found = fitted(talk, ids, limit, longest)
    assert found.prompt == ids(found.talk.conversation)
    assert found.talk.messages == talk.messages[2 * found.talk.left :]
    assert 1 <= found.room <= min(longest, limit - len(found.prompt))
    if found.talk.left:
        more = replace(talk, messages=talk.messages[2 * (found.talk.left - 1) :])
        assert len(ids(more.conversation)) + longest > limit
    assert fitted(talk, ids, None, longest) == (talk, ids(talk.conversation), longest)


# ---- rows


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
REPLY = st.builds(
    lambda *parts: "".join(parts),
    st.sampled_from(["", "<think>", " <think>\n"]),
    TEXT,
    st.sampled_from(["", "</think>\n\n"]),
    TEXT,
)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, REPLY, st.booleans()), min_size=1, max_size=3), st.none() | TEXT)
def test_a_saved_talk_is_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str, bool]], system: str | None
) -> None:
    talk = Talk(system)
    for question, text, whole in said:
        answer = Answer("adapter", text, "stop" if whole else "length")
        talk = talk.with_message(Message("user", question)).with_message(answer.message)
    path = tmp_path_factory.mktemp("saved") / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}', encoding="utf-8")  # whose last line is open
    save(talk, path)
    save(talk, path)
    _, *read = read_conversations(Source(path=str(path)))
    assert [each.messages for each in read] == [talk.conversation.messages] * 2


def test_what_did_not_end_by_itself_is_no_target(session: Session, tmp_path: Path) -> None:
    session.take("Where?")
    session.answering = replace(session.answering, settings=deepcopy(session.answering.settings))
    session.answering.settings.max_new_tokens = 300
    session.take("And now?")
    session.take(f"/save {tmp_path}/rows.jsonl")
    (read,) = read_conversations(Source(path=str(tmp_path / "rows.jsonl")))
    cut = [message.loss for message in read.messages if message.role == "assistant"]
    assert cut == [False, None]
    assert f"{cut.count(False)} answers that did not end by themselves are no targets" in lines_of(session)[-1]


@pytest.mark.parametrize("name", ["rows.txt", "rows.json", "no/such.jsonl"])
def test_where_no_row_can_be_saved_nothing_is_written(session: Session, tmp_path: Path, name: str) -> None:
    session.take("hi")
    with pytest.raises(ChatError, match=r"must end with \.jsonl|cannot be written: No such file"):
        session.take(f"/save {tmp_path / name}")
    assert not list(tmp_path.iterdir())


# ---- drawing


def test_the_same_seed_draws_the_same_text(model: Path) -> None:
    def drawn(seed: int) -> list[str]:
        words = ["--run.precision", "fp32", "--temperature", "1.5", "--top_p", "0.9", "--seed", str(seed)]
        asked = parse([str(model), *words, "--max_new_tokens", "8"])
        told: list[str] = []
        opened = open_chat(asked, start(asked.config, StopSignals()), told.append)
        assert told == [f"tokens are drawn; --seed {seed} draws the same ones again"]
        assert (opened.settings.top_k, opened.settings.top_p, opened.settings.temperature) == (0, 0.9, 1.5)
        prompt = opened.prompt_ids(Talk(None, (Message("user", "hi"),)).conversation)
        return [opened.answer(prompt, 8, "model").text for _ in range(3)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 1


# ---- text as it comes


def test_text_grows_up_to_the_answer(answering: Answering) -> None:
    seen: list[str] = []
    prompt = answering.prompt_ids(Talk(None, (Message("user", "Where is Oslo?"),)).conversation)
    answer = answering.answer(prompt, 30, "model", lambda text: noted(seen, text) is None)
    assert len(seen) > 5
    assert all(later.startswith(earlier) for earlier, later in zip(seen, [*seen[1:], answer.text], strict=True))
    stopped = answering.answer(prompt, 30, "model", lambda text: len(text) > 2)
    assert stopped.stop_reason == "interrupted"
    assert answer.text.startswith(stopped.text.rstrip("\ufffd"))
    assert stopped.message.loss is False


TAGGED = [
    "<think>\nab\n\nc\n</think>\n\nde\n",
    " <think></think>x",
    "<think>a",
    "<thin",
    "a<think>b</think>c",
    "",
    "\n a",
    "<think>a</thi",
]


@pytest.mark.parametrize("text", TAGGED)
def test_thought_and_answer_only_grow(text: str) -> None:
    parts = [thought_and_answer(text[:end]) for end in range(len(text) + 1)]
    for earlier, later in pairwise(parts):
        assert later[0].startswith(earlier[0])
        assert later[1].startswith(earlier[1])
    said = split_reasoning(text)
    if said.reasoning is not None:
        assert parts[-1] == (said.reasoning, said.content)


def test_a_thought_that_the_prompt_begins_is_one() -> None:
    message = Answer("model", "so\n</think>\n\nIn Norway.", "stop", opening="<think>\n").message
    assert message == reply("<think>\nso\n</think>\n\nIn Norway.")
    assert (message.reasoning, message.content) == ("so", "In Norway.")


def shown(text: str, *, by: str = "model", width: int = 100) -> str:
    """What a terminal gets of an answer that comes a letter at a time, with its colours."""
    screen, out = Terminal(), io.StringIO()
    screen.console = Console(file=out, force_terminal=True, color_system="standard", width=width, highlight=False)
    with screen.asking([by]):
        for end in range(len(text)):
            screen.show(by, text[:end])
        screen.end(Answer(by, text, "stop"))
    return out.getvalue()


def unstyled(raw: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", raw)


def test_a_thought_is_dim_and_stands_apart() -> None:
    raw = shown("<think>\nab\n</think>\n\nde <b> [x]")
    assert unstyled(raw) == "ab\n\nde <b> [x]\n"
    assert re.findall(r"\x1b\[2m(.*?)\x1b\[0m", raw) == ["a", "b"]
    assert unstyled(shown("<think>\nnever ends </th")) == "never ends </th\n"
    assert unstyled(shown("<thin")) == "<thin\n"


def test_what_a_terminal_would_obey_is_spelled() -> None:
    assert unstyled(shown("a\x1b]0;title\x07b")) == "a\\x1b]0;title\\x07b\n"


def test_in_a_pipe_a_thought_is_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    Piped().end(Answer("adapter", "<think>\nab\n</think>\n\nde\x1b", "stop"))
    assert capsys.readouterr() == ("de\x1b\n", "adapter thought: ab\n")


def test_only_a_second_ctrl_c_breaks_an_answer_off() -> None:
    with interruptible(True) as is_enough:
        assert not is_enough()
        signal.raise_signal(signal.SIGINT)
        assert is_enough()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with interruptible(False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ---- the command line, and lines


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["one run, adapter or model at a time; nothing was named"]),
        (["a", "b"], ["one run, adapter or model at a time; 2 were given: a, b"]),
        (["m", "--temprature", "1"], ["--temprature is not a setting; did you mean 'temperature'?"]),
        (["m", "--temperature", "-1"], ["--temperature is '-1': 0 or more is needed"]),
        (["m", "--temperature", "nan"], ["--temperature is 'nan': 0 or more is needed"]),
        (["m", "--temperature", "1", "--top_p", "2"], ["--top_p is '2': more than 0, 1 at most is needed"]),
        (["m", "--seed", "x", "--top_p", "1"], ["--seed is 'x'", "--top_p needs --temp", "--seed needs --temp"]),
        (["m", "--max_new_tokens", "0"], ["--evaluation.max_new_tokens is '0'"]),
        (["m", "--max_new_tokens", "1", "--evaluation.max_new_tokens", "1"], ["are one setting"]),
        (["m", "--optim.epochs", "1"], ["--optim.epochs has no use with chat"]),
        (["m", "--model.name_or_path", "n"], ["m and --model.name_or_path n are both models"]),
    ],
)
def test_mistakes_on_the_command_line_are_told_at_once(words: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    for problem, part in zip(caught.value.problems, expected, strict=True):
        assert part in problem


def test_a_run_an_adapter_in_it_and_an_adapter_alone(tmp_path: Path) -> None:
    for name in ("run/adapter", "run/adapter-best", "alone"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text('{"base_model_name_or_path": "b"}')
    (tmp_path / "run/config.yaml").write_text("model: {name_or_path: m}\ndata: {system: s}\n")
    run = parse([str(tmp_path / "run")])
    assert (run.adapter, run.of_run, run.config.data.system) == (tmp_path / "run/adapter", True, "s")
    assert parse([str(tmp_path / "run/adapter")]) == run
    best = parse([str(tmp_path / "run"), "--adapter", str(tmp_path / "run/adapter-best")])
    assert parse([str(tmp_path / "run/adapter-best")]) == best
    alone = parse([str(tmp_path / "alone"), "--temperature", "0.7", "--json"])
    assert (alone.adapter, alone.of_run, alone.config.model.name_or_path) == (tmp_path / "alone", False, "b")
    assert (alone.sampling, alone.json) == (Sampling(0.7), True)
    assert parse([str(tmp_path / "alone"), "--model.name_or_path", "c"]).config.model.name_or_path == "c"
    with pytest.raises(ConfigError, match="is an adapter, and so is"):
        parse([str(tmp_path / "alone"), "--adapter", "x"])
    for named in ('{"base_model_name_or_path": null}', "{}"):  # as other makers may leave it
        (tmp_path / "alone/adapter_config.json").write_text(named)
        with pytest.raises(ConfigError, match=r"does not name a base model; name it with --model.name_or_path"):
            parse([str(tmp_path / "alone")])
        assert parse([str(tmp_path / "alone"), "--model.name_or_path", "c"]).config.model.name_or_path == "c"
    assert "--temperature" in help_text()


def lines(raw: bytes, *, as_json: bool = False) -> Iterator[Line]:
    return piped(io.BytesIO(raw), as_json=as_json)


def test_lines_of_a_pipe() -> None:
    assert [line.text for line in lines("  a\r\n\n \nb\u2028c".encode())] == ["  a", "b\u2028c"]
    asked = [*lines(b'"/a\\nb"\n/reset\n', as_json=True)]
    assert [(line.text, line.is_message) for line in asked] == [("/a\nb", True), ("/reset", False)]
    for raw, told in (
        (b"a\n\xff\n", "line 2: not UTF-8"),
        (b"[1]", "line 1: a message is a JSON string"),
        (b"a", "no JSON"),
    ):
        with pytest.raises(ChatError, match=told):
            list(lines(raw, as_json=raw[:1] != b"a" or len(raw) == 1))


def test_json_is_one_line_an_answer(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.take("hi")
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "by": "model",
        "prediction": last(session),
        "reasoning_content": None,
        "content": last(session),
        "stop_reason": "length",
    }
