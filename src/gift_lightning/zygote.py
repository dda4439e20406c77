"""The process that imports the rewards and forks their workers, as its parent sees it."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

from gift_lightning.worker import frame, receive

START = 300.0  # seconds to import the rewards
REPLY = 30.0  # seconds to fork, and for a fork to say hello


class LostError(Exception):
    """The zygote no longer answers."""


class Zygote:
    """`worker.main` in a session of its own; it can be started again."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup = setup
        self.owner = os.getpid()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """
        Raises:
            ValueError: a reward cannot run.
            LostError: it died.
        """
        self.stop()
        self.control, theirs = socket.socketpair()
        # It finds what this process found, by the same names; its own children do not.
        found = [os.path.abspath(folder) for folder in sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(found),
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        }
        restored = {"environment": {"PYTHONPATH": os.environ.get("PYTHONPATH")}}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gift_lightning.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        theirs.close()
        self.control.settimeout(START)
        message, _ = self._talk(frame({**self.setup, **restored}))
        if "error" in message:
            self.stop()
            raise ValueError(f"rewards: {message['error']}")
        self.control.settimeout(REPLY)

    def fork(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            message, _ = self._talk(frame({"kill": []}), theirs.fileno())
        return message["forked"][0], ours

    def ask(self, kill: list[int]) -> None:
        self._talk(frame({"kill": kill}))

    def _talk(self, data: bytes, *fds: int) -> tuple[Any, list[int]]:
        try:
            socket.send_fds(self.control, [data], fds) if fds else self.control.sendall(data)
            return receive(self.control)
        except (OSError, EOFError) as error:
            self.control.close()
            raise LostError from error
        except BaseException:  # an answer nobody waits for any more
            self.control.close()
            raise

    def stop(self) -> None:
        """Hangs up, upon which it ends its children and itself."""
        if self.process is None or os.getpid() != self.owner:
            return
        with suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        self.control.close()
        try:
            self.process.wait(2 * REPLY)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None
