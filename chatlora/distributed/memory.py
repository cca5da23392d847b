"""A machine that runs out of memory, as a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from chatlora.distributed.runtime import Runtime
from chatlora.errors import OutOfMemoryError

OF_OTHER_DEVICES = ("out of memory", "can't allocate memory")  # MPS, XPU and the CPU's allocator: plain RuntimeErrors

NOT_SAVED = (
    "memory ran out while the adapter and its optimizer's state were gathered for a checkpoint. Lower "
    "optim.max_tokens_per_micro_batch, which leaves room beside a step: the same command then goes on from the "
    "checkpoint before"
)
NOT_EXPORTED = (
    "memory ran out while the trained adapter was gathered, written and checked. The last checkpoint is whole: end "
    "what else runs on the machine, or start fewer processes on it, and the same command exports the adapter"
)


def not_loaded(name: str, runtime: Runtime) -> str:
    """What to do where memory runs out while a model is loaded, looked at and handed to the engine."""
    whole = "each process holds it whole until it is sharded" if runtime.is_sharded else "each process holds it whole"
    ways = {
        "run.precision bf16, which takes half": runtime.precision == "fp32",
        "fewer processes on a machine": runtime.num_processes > 1,
        "several GPUs under accelerate_configs/zero3.yaml or fsdp2.yaml": not runtime.is_sharded,
        "a machine with more memory": runtime.is_sharded,
        "a smaller model": True,
    }
    return (
        f"{name} in {runtime.precision} does not fit while it is loaded ({whole}). Ways on: "
        f"{'; '.join(way for way, is_open in ways.items() if is_open)}"
    )


@contextmanager
def out_of_memory_told(sentence: str) -> Iterator[None]:
    """Within, being out of memory becomes an OutOfMemoryError: `sentence` says what did not fit and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(words in reason for words in OF_OTHER_DEVICES):
            raise
        raise OutOfMemoryError(sentence, reason[:300]) from error
