"""The server of the tests' runs: no signal to the tests reaches it; killed, it costs one test and comes back."""

import os
from pathlib import Path

import pytest

from tests.fork_server import ForkServer, ServerEndedError
from tests.runs import is_alive, wait_until


def test_a_server_that_is_killed_costs_the_run_under_way_and_comes_back(tmp_path: Path) -> None:
    with ForkServer(tmp_path / "log", warm=False) as own:
        assert os.getpgid(own.process.pid) != os.getpgrp()
        (pid,) = own.start(["--help"], tmp_path, broken="import time; time.sleep(9999)")
        own.process.terminate()
        with pytest.raises(ServerEndedError, match="the fork server ended with -15, and its runs with it"):
            own.wait([pid])
        wait_until(lambda: not is_alive(pid))
        assert own.run(["--help"], tmp_path) == [0]
