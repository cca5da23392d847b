"""A function in a process of its own, watched at the system calls that change files, and killed at one of them.

    calls = trace(save)                     # [Call("openat", "/.../x"), Call("write", "/.../x"), ...]
    trace(save, kill_at=3)                  # the process dies at the third of them, before it happens

ptrace(2) on Linux, x86-64 and arm64: no tool, no compiler, and nothing of what is watched is replaced.
"""

import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
SYSCALL_GOOD, EXIT_KILL = 1, 0x100000  # PTRACE_O_TRACESYSGOOD, PTRACE_O_EXITKILL
ENTRY = 1
CHANGES_OPENED = os.O_WRONLY | os.O_RDWR | os.O_CREAT

# number -> (name, which argument is the path; None: the first one is a file descriptor)
X86_64 = {
    1: ("write", None),
    18: ("pwrite64", None),
    26: ("msync", None),
    74: ("fsync", None),
    75: ("fdatasync", None),
    77: ("ftruncate", None),
    82: ("rename", 0),
    83: ("mkdir", 0),
    84: ("rmdir", 0),
    87: ("unlink", 0),
    257: ("openat", 1),
    258: ("mkdirat", 1),
    263: ("unlinkat", 1),
    264: ("renameat", 1),
    316: ("renameat2", 1),
}
ARM64 = {
    34: ("mkdirat", 1),
    35: ("unlinkat", 1),
    38: ("renameat", 1),
    46: ("ftruncate", None),
    56: ("openat", 1),
    64: ("write", None),
    68: ("pwrite64", None),
    82: ("fsync", None),
    83: ("fdatasync", None),
    227: ("msync", None),
    276: ("renameat2", 1),
}
TABLE: dict[int, tuple[str, int | None]] = {"x86_64": X86_64, "aarch64": ARM64}.get(platform.machine(), {})
AVAILABLE = sys.platform == "linux" and bool(TABLE)


class Call(NamedTuple):
    """A system call that changes a file under the folder that is watched. path: of the file, at that moment."""

    name: str
    path: str


def trace(function: Callable[[], object], folder: Path, *, kill_at: int | None = None) -> list[Call]:
    """The calls of `function` that change something under `folder`, up to the `kill_at`-th (from 1), which kills it.

    Raises AssertionError where the function itself fails.
    """
    pid = os.fork()
    if pid == 0:
        _play(function)
    os.waitpid(pid, 0)  # it has stopped itself
    _ptrace(SETOPTIONS, pid, 0, SYSCALL_GOOD | EXIT_KILL)
    calls: list[Call] = []
    passed_on = 0
    while True:
        _ptrace(SYSCALL, pid, 0, passed_on)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, "what is watched failed by itself"
            return calls
        stopped_by = os.WSTOPSIG(status)
        passed_on = 0 if stopped_by & 0x80 else stopped_by
        call = _entered(pid) if stopped_by & 0x80 else None
        if call is None or not call.path.startswith(str(folder)):
            continue
        calls.append(call)
        if len(calls) == kill_at:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return calls


def _play(function: Callable[[], object]) -> None:
    status = 1
    try:
        _ptrace(TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        function()
        status = 0
    finally:
        os._exit(status)


def _entered(pid: int) -> Call | None:
    """The call that a process stopped at is about to make, if it changes a file."""
    info = ctypes.create_string_buffer(88)
    _ptrace(GET_SYSCALL_INFO, pid, len(info), ctypes.addressof(info))
    if info.raw[0] != ENTRY:
        return None
    number, *arguments = struct.unpack_from("<7Q", info.raw, 24)
    if number not in TABLE:
        return None
    name, path_at = TABLE[number]
    if name == "openat" and not arguments[2] & CHANGES_OPENED:
        return None
    if path_at is None:
        return Call(name, str(Path(f"/proc/{pid}/fd/{arguments[0]}").readlink()))
    path = _string(pid, arguments[path_at])
    if path.startswith("/"):
        return Call(name, path)
    relative_to = ctypes.c_int(arguments[0]).value if path_at else -100  # AT_FDCWD
    base = f"/proc/{pid}/cwd" if relative_to < 0 else f"/proc/{pid}/fd/{relative_to}"
    return Call(name, f"{Path(base).readlink()}/{path}")


def _string(pid: int, address: int) -> str:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(512).split(b"\0")[0].decode()


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, address, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace request {request:#x}")
