"""A machine that runs out of memory, as a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from chatlora.errors import OutOfMemoryError

OF_OTHER_DEVICES = ("out of memory", "can't allocate memory")  # MPS, XPU and the CPU's allocator: plain RuntimeErrors


@contextmanager
def out_of_memory_told(sentence: str) -> Iterator[None]:
    """Within, being out of memory becomes an OutOfMemoryError: `sentence` says what did not fit and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if type(error) is RuntimeError and not any(words in reason for words in OF_OTHER_DEVICES):
            raise
        raise OutOfMemoryError(sentence, reason[:300]) from error
