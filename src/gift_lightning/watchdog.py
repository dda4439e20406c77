"""Runs a command until it ends, or until whoever holds this process's stdin lets go of it.

Started by its path, ``python -I watchdog.py COMMAND...``: the command and its children do not
outlive their owner, however that ends.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

_TICK = 0.1  # seconds between two looks
_GRACE = 5.0  # seconds to end by themselves


def main(command: list[str]) -> int:
    """The command's exit code, 0 if the owner ended it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            if select.select([sys.stdin], [], [], _TICK)[0]:  # its end: nothing is ever written
                return 0
        return process.returncode
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends all of the command's session: asked first, so that it can clean up, then by force."""
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(_TICK)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
