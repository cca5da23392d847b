"""How long a chat template may compute, and how much memory it may take: a template is code from a stranger.

Both bounds are the operating system's: a timer of the processor time that this process spends, and a ceiling on its
address space. They grow with the conversation and are far beyond what real templates need. Too long stops the run:
which rows are trained on must not depend on how fast a machine is. Too much sets the row aside.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from chatlora.errors import ModelError, SetAside
from chatlora.reading.conversation import Conversation

SECONDS = 20.0  # of processor time, plus one for each message and for each 50,000 characters
MEMORY = 2 * 1024**3  # bytes beyond what the process has, plus 2,000 for each character
OUTPUT = 1_000_000  # characters that one rendering may have, plus 100 for each character that went in
TOO_MUCH = "the chat template renders too much"


class _TookTooLong(BaseException):
    """No Exception: Jinja turns some of those into undefined values."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the rendering of one conversation may take: seconds of processor time, bytes."""

    seconds: float
    memory: int


PROBE = Bounds(SECONDS, MEMORY)  # for a template alone, or with a conversation made up to look at it


def bounds_for(conversation: Conversation) -> Bounds:
    characters = characters_in(conversation.as_template_input()) + characters_in(conversation.tools)
    return Bounds(SECONDS + len(conversation.messages) + characters / 50_000, MEMORY + 2_000 * characters)


def characters_in(value: Any) -> int:
    """How many characters the strings of a JSON value have together."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters_in, value)) + sum(map(characters_in, value.values()))
    return sum(map(characters_in, value)) if isinstance(value, list | tuple) else 0


def check_output(text: str, messages: Any, tools: Any) -> None:
    """Raises SetAside where a rendering is out of all proportion to its conversation."""
    if len(text) > OUTPUT and len(text) > OUTPUT + 100 * (characters_in(messages) + characters_in(tools)):
        raise SetAside(TOO_MUCH, f"{len(text):,} characters")


@contextmanager
def bounded(bounds: Bounds, place: str | None = None) -> Iterator[None]:
    """Within, too much time raises ModelError (which names the row's place), too much memory SetAside.

    The time is bounded in a process's main thread only, the memory on Linux only.
    """
    try:
        with _memory(bounds.memory), _time(bounds.seconds):
            yield
    except MemoryError:
        raise SetAside(TOO_MUCH, f"more than {bounds.memory / 1024**3:.0f} GiB of memory") from None
    except _TookTooLong:
        where = f"{place}: " if place else ""
        raise ModelError(
            f"{where}the chat template computed for {bounds.seconds:.0f} seconds and was not at its end; "
            "look for a loop in it that never ends, or set model.chat_template to another Jinja file"
        ) from None


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    # The timer of processor time: that of real time is often taken (pytest-timeout), and a busy machine is no mistake.
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _interrupt(_signal: int, _frame: object) -> None:
    raise _TookTooLong


@contextmanager
def _memory(memory: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123  (a few microseconds, for every row)
        ceiling = int(file.read().split()[0]) * resource.getpagesize() + memory
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([ceiling, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
