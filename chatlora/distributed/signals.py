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
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from chatlora.errors import Stopped

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch, by torchrun
PR_SET_PDEATHSIG = 1  # prctl(2)
AGAIN = 0.01  # seconds after which a stop that was dropped is sent again


class StopSignals:
    """Within, this process stops when it is told to; `requested` is what the loop asks. After it, all is as before."""

    def __init__(self) -> None:
        self.requested = False
        self.noted_only = False
        self.name = ""  # of the first signal
        self._before: dict[signal.Signals, Any] = {}
        self._hook_before = sys.unraisablehook

    def __enter__(self) -> Self:
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._dropped
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has neither SIGUSR1 nor SIGHUP
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                continue
            self._before[number] = signal.signal(number, self._arrived)
        if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
            # `accelerate launch` with one process does not pass SIGTERM on, but dies of it.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook_before

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, a signal only sets `requested`; one that came too late to be obeyed is obeyed at the end."""
        self.noted_only = True
        try:
            yield
        finally:
            self.noted_only = False
        if self.requested:
            raise Stopped("stopped after the last step, which is saved: the same command exports the adapter")

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one leaves at once
        if self.requested:  # launchers repeat themselves; what the first signal began is not to be interrupted
            return
        self.requested = True
        self.name = self.name or signal.Signals(number).name
        if not self.noted_only:
            raise Stopped(f"stopped on {self.name}")
        print(f"\n{self.name}: stopping after this step", file=sys.stderr, flush=True)

    def _dropped(self, dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, Stopped):
            sys.__unraisablehook__(dropped)
            return
        self.requested = False
        # By another thread and a little later: what is raised within this hook is dropped as well.
        threading.Timer(AGAIN, signal.raise_signal, [signal.SIGTERM]).start()
