"""A chat template is code from a stranger: it ends, it stays small, and it reaches nothing.

Run: pytest tests/rendering/test_limits.py
"""

import re
import resource
import signal
import sys
from pathlib import Path

import pytest

from chatlora.config import OverLength
from chatlora.data import workers
from chatlora.data.workers import Effort, Work, outcomes
from chatlora.errors import DataError, ModelError, SetAside
from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering import limits, template
from chatlora.rendering import renderer as rendering
from chatlora.rendering.limits import Bounds, bounded
from chatlora.rendering.renderer import Renderer
from tests.tiny_tokenizers import CHATML, tiny_tokenizer

FOREVER = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}"
)
SHORT = Bounds(seconds=0.3, memory=limits.MEMORY)
GIB = 1024**3


def on_demand(what: str) -> str:
    """A ChatML template that does this where the last message of the conversation says so."""
    return "{% if messages[-1].content == 'go' %}" + what + "{% endif %}" + CHATML


def conversation(answer: str) -> Conversation:
    return Conversation((Message("user", "Hello"), Message("assistant", answer)), place="train.jsonl:7")


def test_a_template_that_never_ends_is_refused_before_any_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "PROBE", SHORT)
    monkeypatch.setattr(template, "PROBE", SHORT)
    for text in (FOREVER + CHATML, "{{ 9 ** (9 ** 9) }}" + CHATML):
        with pytest.raises(ModelError, match=r"the chat template computed for 0 seconds .* model\.chat_template"):
            Renderer(tiny_tokenizer(chat_template=text))


def test_one_that_never_ends_for_one_row_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", -1.5)
    renderer = Renderer(tiny_tokenizer(chat_template=on_demand(FOREVER)))
    assert renderer.render(conversation("stay"), max_length=99).turns == 1
    with pytest.raises(ModelError, match=r"train\.jsonl:7: the chat template computed"):
        renderer.render(conversation("go"), max_length=99)
    with pytest.raises(ModelError, match=r"train\.jsonl:7: the chat template computed"):
        renderer.render_for_evaluation(conversation("go"), max_prompt_length=None, max_new_tokens=9)
    assert renderer.render(conversation("stay"), max_length=99).turns == 1


@pytest.mark.parametrize(
    "what",
    [
        "{{ 'x' * 100000000 }}",
        pytest.param(
            "{{ 'x' * 100000000000 }}", marks=pytest.mark.skipif(sys.platform != "linux", reason="no memory bound")
        ),
        "{% set ns = namespace(x='xxxxxxxxxx') %}{% for a in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' | center(100000000000) }}",
        "{{ '%99999999999d' % 1 }}",
    ],
)
def test_one_that_renders_too_much_sets_the_row_aside(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMORY", GIB // 2)
    renderer = Renderer(tiny_tokenizer(chat_template=on_demand(what)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SetAside) as refused:
        renderer.render(conversation("go"), max_length=99)
    assert refused.value.reason in ("the chat template renders too much", "the chat template raises an error")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB
    assert renderer.render(conversation("stay"), max_length=99).turns == 1


@pytest.mark.parametrize(
    "what",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{{ lipsum.__globals__['os'].system('touch canary') }}",
        "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
        "{{ messages[0].update({'content': 'other'}) }}",
        "{% include '/etc/passwd' %}",
        "{{ strftime_now.__globals__['os'] }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_one_that_reaches_out_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    renderer = Renderer(tiny_tokenizer(chat_template=on_demand(what)))
    row = conversation("go")
    with pytest.raises(SetAside, match="the chat template raises an error"):
        renderer.render(row, max_length=99)
    assert not list(tmp_path.iterdir())
    assert row == conversation("go")


def test_bounds_leave_nothing_behind() -> None:
    def state() -> tuple[object, ...]:
        return (
            signal.getsignal(signal.SIGVTALRM),
            signal.getitimer(signal.ITIMER_VIRTUAL),
            resource.getrlimit(resource.RLIMIT_AS),
            signal.getitimer(signal.ITIMER_REAL)[0] > 0,  # pytest-timeout's
        )

    before = state()
    with bounded(SHORT):
        assert state() != before
    assert state() == before
    with pytest.raises(ModelError):
        spin()
    assert state() == before


def spin() -> None:
    with bounded(SHORT):
        while True:
            pass


def test_time_grows_with_the_conversation() -> None:
    long = Conversation(tuple(Message("user", "x" * 50_000) for _ in range(300)))
    assert limits.bounds_for(long).seconds > 600
    assert limits.bounds_for(long).memory > 30_000_000_000
    assert limits.bounds_for(conversation("a")).seconds < 25


@pytest.mark.parametrize("over_length", ["fit", "cut", "drop", "error"])
def test_a_row_of_megabytes_that_cannot_fit_is_not_rendered(
    over_length: OverLength, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(tiny_tokenizer())
    row = Conversation((Message("user", "word " * 2_000_000), Message("assistant", "yes")), place="train.jsonl:7")
    monkeypatch.setattr(
        template.ChatTemplate, "render", lambda *given, **named: pytest.fail("that takes half a minute")
    )
    with pytest.raises((SetAside, DataError), match=r"max_length`? is 2048"):
        renderer.render(row, max_length=2048, over_length=over_length)


def test_conversations_that_take_long_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    work = Work(Renderer(tiny_tokenizer()), 99, "fit", "all")
    rows = [(0, conversation(answer)) for answer in ("one", "two", "three")]
    assert len(list(outcomes(rows, work, 0, Effort(), said.append))) == 3
    assert said == []
    monkeypatch.setattr(workers, "SLOW_SECONDS", 0.0)
    assert len(list(outcomes(rows, work, 0, Effort(), said.append))) == 3
    (line,) = said
    assert re.match(r"train\.jsonl:7: rendering took \d+ seconds \(2 messages\)", line)
