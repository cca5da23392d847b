"""`accelerate launch` that leaves it to the processes to say how they ended.

processes.py runs this file by its path, and imports nothing of it.
"""

import ctypes
import logging
import signal
import subprocess
import sys


def main() -> None:
    logging.disable(logging.CRITICAL)  # in this process: torchrun's account of exit statuses and signals
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no launcher without who asked for it
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        leave(f"rank {rank}", first.exitcode)
    except subprocess.CalledProcessError as error:
        leave("the process", error.returncode)
    except SignalException:
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:  # its settings, a port that is taken, DeepSpeed not installed
        print(f"\naccelerate launch cannot start: {error}", file=sys.stderr)
        sys.exit(2)


def leave(who: str, status: int) -> None:
    """Only a process that was killed could not say why."""
    if status < 0:
        name = signal.Signals(-status).name
        memory = "; the kernel does so where memory runs out (`dmesg` tells)" if name == "SIGKILL" else ""
        print(f"\n{who} was ended by {name}{memory}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
