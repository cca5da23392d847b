"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask a run to stop; nothing finished is lost.

Inside the loop the request is noted, and all ranks act on it at the same step. Elsewhere (data building, loading,
generation) nothing half done is worth keeping: Stopped is raised where the signal arrives; and once more where Python
dropped it, as it drops whatever is raised within `__del__` or a weakref's callback.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Self

from chatlora.errors import Stopped

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
# Set by torchrun, and by `accelerate launch` with one process. The first of the latter is also what users export.
LAUNCHED = (("TORCHELASTIC_RUN_ID",), ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"))
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2  # prctl(2)
AGAIN = 0.01  # seconds after which a stop that was dropped is sent again


class StopSignals:
    """Within, this process stops when it is told to; `requested` is what the loop asks. After it, all is as before."""

    def __init__(self) -> None:
        self.requested = False
        self.noted_only = False
        self.name = ""  # of the first signal
        self._news: SimpleQueue[str | None] = SimpleQueue()  # its `put` may interrupt another one
        self._before: dict[signal.Signals, Any] = {}
        self._hook_before = sys.unraisablehook
        self._death_signal_before: int | None = None
        self._parent = os.getppid()
        self._terminals: list[int] = []

    def __enter__(self) -> Self:
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._dropped
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has neither SIGUSR1 nor SIGHUP
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                continue
            self._before[number] = signal.signal(number, self._arrived)
        if is_launched():
            # `accelerate launch` with one process does not pass SIGTERM on, but dies of it.
            self._death_signal_before = swap_death_signal(signal.SIGTERM)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook_before
        if self._death_signal_before is not None:
            swap_death_signal(self._death_signal_before)

    @contextmanager
    def noted(self, doing: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
        """Within, a signal only sets `requested`; one that came after all ranks last asked is obeyed at the end.

        `say` tells what `doing` says is being finished, at once and again and again, from a thread of its own: the
        handler may have interrupted the one that holds the console.
        """
        teller = threading.Thread(target=self._tell, args=(doing, say), daemon=True)
        teller.start()
        self.noted_only = True
        try:
            yield
        finally:
            self.noted_only = False
            self._news.put(None)
            teller.join()
        if self.requested:
            raise Stopped("stopped after the last step, which is saved: the same command exports the adapter")

    def _tell(self, doing: Callable[[], str], say: Callable[[str], None]) -> None:
        name, waited = self._news.get(), 0.0
        while name is not None:
            # Where the launcher has gone, the shell reads the keyboard again.
            again = name == "SIGINT" and os.getppid() == self._parent
            say(f"{name}: {doing()}" + ("; once more leaves it unsaved" if again else ", then it is saved"))
            pause = max(1.0, waited / 10)
            try:
                name = self._news.get(timeout=pause)
            except Empty:
                waited += pause

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one leaves at once
        elif number == getattr(signal, "SIGHUP", None):
            self._leave_terminals()
        if self.requested:  # launchers repeat themselves; what the first signal began is not to be interrupted
            return
        self.requested = True
        self.name = self.name or signal.Signals(number).name
        if not self.noted_only:
            raise Stopped(f"stopped on {self.name}")
        self._news.put(self.name)

    def _leave_terminals(self) -> None:
        """Output that went to a terminal which was closed goes nowhere: an error in its place would end the run."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    def _dropped(self, dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, Stopped):
            sys.__unraisablehook__(dropped)
            return
        self.requested = False
        # By another thread and a little later: what is raised within this hook is dropped as well.
        threading.Timer(AGAIN, signal.raise_signal, [signal.SIGTERM]).start()


def is_launched() -> bool:
    return any(all(name in os.environ for name in names) for names in LAUNCHED)


def swap_death_signal(number: int) -> int | None:
    """Ask for this signal when the parent dies, 0 for none, and return what was asked before. Linux alone has that."""
    if sys.platform != "linux":
        return None
    before, prctl = ctypes.c_int(), ctypes.CDLL(None).prctl
    prctl(PR_GET_PDEATHSIG, ctypes.byref(before))
    prctl(PR_SET_PDEATHSIG, number)
    return before.value
