"""Conversations -> what rendering makes of them, in order: in this process, and in several once that is sooner done."""

import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process

from chatlora.config import OverLength, Supervise
from chatlora.errors import DataError, SetAside
from chatlora.reading.conversation import Conversation
from chatlora.reading.likeness import Likeness, likeness_of
from chatlora.rendering.examples import NothingFits, Rendered
from chatlora.rendering.remedies import lifted_by
from chatlora.rendering.renderer import Renderer

START_SECONDS = 2.0  # of processor time, to start a worker, which imports, compiles and reads the tokenizer
LOOK_SECONDS = 1.0  # of work: from then on what the rows take is known well enough
MAX_WORKERS = 16  # one process feeds them all
SLOW_SECONDS = 5.0  # for one conversation; most take milliseconds
PR_SET_PDEATHSIG = 1  # prctl(2)
CHUNK = 64  # conversations handed over at a time
CHUNKS_AHEAD = 8  # for each worker: it never waits for more, and memory holds no more


@dataclass(frozen=True, slots=True)
class Outcome:
    """One of three: rendered; set aside, with what SourceAccount.put_aside takes; or a mistake that the user must mend.

    too_long: the `max_length` that each reply takes which is lost or cut; None: nobody measured it. seconds: what
    that took. likeness: of what is rendered.
    """

    rendered: Rendered | None = None
    set_aside: tuple[str, str, str] | None = None
    problems: tuple[str, ...] = ()
    too_long: tuple[int | None, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    likeness: Likeness | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A renderer and how it is asked. Picklable."""

    renderer: Renderer
    max_length: int
    over_length: OverLength
    supervise: Supervise
    given_system: str | None = None

    def timed_outcome(self, conversation: Conversation) -> Outcome:
        began = time.perf_counter()
        return replace(self.outcome(conversation), seconds=time.perf_counter() - began)

    def outcome(self, conversation: Conversation) -> Outcome:
        try:
            rendered = self.renderer.render(
                conversation, max_length=self.max_length, over_length=self.over_length, supervise=self.supervise
            )
        except NothingFits as reason:
            return Outcome(set_aside=(reason.reason, reason.detail, ""), too_long=reason.too_long)
        except SetAside as reason:
            lifted = lifted_by(self.renderer, conversation, reason, self.supervise)
            return Outcome(set_aside=(reason.reason, reason.detail, lifted))
        except DataError as error:  # over_length: error
            return Outcome(problems=error.problems)
        likeness = likeness_of(conversation, self.given_system)
        return Outcome(rendered, too_long=rendered.too_long, likeness=likeness)


@dataclass(slots=True)
class Effort:
    """Seconds of work, over all processes, and those of them that were spent in proofs."""

    seconds: float = 0.0
    proof_seconds: float = 0.0


Done = tuple[list[Outcome], float, float]  # with seconds, and those spent in proofs


def outcomes(
    conversations: Iterable[tuple[int, Conversation]],
    work: Work,
    num_rows: int,
    effort: Effort,
    say: Callable[[str], None],
) -> Iterator[tuple[int, Conversation, Outcome]]:
    """(source, conversation, outcome), in the order of `conversations`, which are `num_rows`.

    A conversation that takes seconds is said, once.
    """
    said = False
    for source, conversation, outcome in _outcomes(conversations, work, num_rows, effort):
        if outcome.seconds > SLOW_SECONDS and not said:
            said = True
            size = f"{len(conversation.messages):,} messages"
            say(f"{conversation.place}: rendering took {outcome.seconds:.0f} seconds ({size}); others may as well")
        yield source, conversation, outcome


def _outcomes(
    conversations: Iterable[tuple[int, Conversation]], work: Work, num_rows: int, effort: Effort
) -> Iterator[tuple[int, Conversation, Outcome]]:
    left, workers, seconds = iter(conversations), 0, 0.0
    for done, row in enumerate(left, start=1):
        began = time.process_time()  # on a busy machine the clock would say that rows cost more, and workers would too
        found = _run(work, [row[1]])
        seconds += time.process_time() - began
        yield from _counted([row], found, effort)
        workers = num_workers(seconds / done * (num_rows - done)) if seconds >= LOOK_SECONDS else 0
        if workers:
            break
    if workers:
        yield from _outcomes_of_workers(left, work, workers, effort)


def _outcomes_of_workers(
    conversations: Iterator[tuple[int, Conversation]], work: Work, workers: int, effort: Effort
) -> Iterator[tuple[int, Conversation, Outcome]]:
    # Not forked: a process that has started threads or a GPU cannot be.
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (work,)) as pool:
        waiting: deque[tuple[list[tuple[int, Conversation]], Future[Done]]] = deque()
        for chunk in _chunks(conversations):
            waiting.append((chunk, pool.submit(_run_here, [conversation for _, conversation in chunk])))
            if len(waiting) > CHUNKS_AHEAD * workers:
                oldest, future = waiting.popleft()
                yield from _counted(oldest, future.result(), effort)
        for chunk, future in waiting:
            yield from _counted(chunk, future.result(), effort)


def num_workers(seconds: float) -> int:
    """How many processes are worth starting for so many seconds of work; none, where this one is as soon done.

    Each must save more seconds than its start takes: the second one half of all, the third a sixth, and so on. This
    process then parses and writes, which is little beside rendering: it has no core of its own.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    worth = 1
    while worth < min(cores, MAX_WORKERS) and seconds / (worth * (worth + 1)) > START_SECONDS:
        worth += 1
    return worth if worth > 1 else 0


def _chunks(items: Iterable[tuple[int, Conversation]]) -> Iterator[list[tuple[int, Conversation]]]:
    chunk: list[tuple[int, Conversation]] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _counted(
    chunk: Sequence[tuple[int, Conversation]], done: Done, effort: Effort
) -> Iterator[tuple[int, Conversation, Outcome]]:
    found, seconds, proof_seconds = done
    effort.seconds += seconds
    effort.proof_seconds += proof_seconds
    for (source, conversation), outcome in zip(chunk, found, strict=True):
        yield source, conversation, outcome


def _run(work: Work, conversations: Sequence[Conversation]) -> Done:
    began, proof_began = time.perf_counter(), work.renderer.proof_seconds
    found = [work.timed_outcome(conversation) for conversation in conversations]
    return found, time.perf_counter() - began, work.renderer.proof_seconds - proof_began


# ---- in a worker

_work: list[Work] = []  # set once, when the process begins: a renderer is too large to be sent with every chunk


def _begin(work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and stops this one
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    if parent is None or not parent.is_alive():  # it was killed while this process was starting
        os._exit(1)
    _work.append(work)


def _run_here(conversations: Sequence[Conversation]) -> Done:
    return _run(_work[0], conversations)
