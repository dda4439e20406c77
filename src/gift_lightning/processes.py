"""The child processes of an ablation: none runs twice, none is left behind."""

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gift_lightning.experiment import Run
from gift_lightning.receipt import write_receipt

_GRACE = 5.0  # seconds that a child has to end its own children
_TICK = 0.1
# The child says its own id before anything else: its parent may be killed before it could.
_NAMED = ("/bin/sh", "-c", 'printf \'# process %s: %s\\n\' $$ "$0"; exec "$@"')


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    command: list[str]
    log: BinaryIO
    started: float


class _RefusedError(Exception):
    pass


class Processes:
    """At most `jobs` runs side by side, each in a session of its own.

    A run's log is locked by whoever writes it, and a child inherits the lock with its output: a run
    whose parent was killed is not started a second time as long as it lives.
    """

    def __init__(self, program: Sequence[str], jobs: int) -> None:
        """
        Args:
            program: what stands before a run's words on its command line.
            jobs: how many side by side; they share the cores.
        """
        self.program, self.jobs = list(program), jobs
        self.running: dict[Run, _Child] = {}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (cores or 1) // jobs))
        self.environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def have_room(self) -> bool:
        return len(self.running) < self.jobs

    def start(self, run: Run) -> str | None:
        """Starts a run in an empty folder; says why if it cannot."""
        ours = run.log.exists()
        try:
            run.log.parent.mkdir(parents=True, exist_ok=True)
            log = run.log.open("ab")
            try:
                self._start(run, log, ours)
            except (OSError, _RefusedError):
                log.close()
                if not ours:
                    run.log.unlink()
                raise
        except (OSError, _RefusedError) as error:
            return str(error)
        return None

    def _start(self, run: Run, log: BinaryIO, ours: bool) -> None:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            writer = f"process {_writer(run.log)} of an earlier command still writes to it"
            raise _RefusedError(f"{writer}: wait for it or end it") from None
        if run.folder.exists():
            if not ours:
                raise _RefusedError(f"{run.folder} is no run of an ablation: move it away")
            shutil.rmtree(run.folder)
        log.truncate(0)
        command = [*self.program, *run.words()]
        process = subprocess.Popen(
            [*_NAMED, shlex.join(command), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        self.running[run] = _Child(process, command, log, time.monotonic())

    def finished(self) -> list[tuple[Run, float, str | None]]:
        """Runs that have ended, with their seconds and what went wrong; waits a moment if none."""
        ended = [run for run, child in self.running.items() if child.process.poll() is not None]
        if not ended:
            time.sleep(_TICK)
        return [self._end(run) for run in ended]

    def _end(self, run: Run) -> tuple[Run, float, str | None]:
        child = self.running.pop(run)
        child.log.close()
        seconds = time.monotonic() - child.started
        if code := child.process.returncode:
            how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            return run, seconds, how
        if not (run.folder / "hf").is_dir():
            # Lightning's exit code after SIGTERM in mid-training is 0.
            return run, seconds, "ended before its model was written"
        write_receipt(run, child.command, seconds, self.environment["OMP_NUM_THREADS"])
        return run, seconds, None

    def kill(self) -> None:
        """Ends all children and theirs: asked first, so that they can clean up, then by force."""
        for child in self.running.values():
            _signal(child, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for child in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            _signal(child, signal.SIGKILL)
            child.process.wait()
            child.log.close()
        self.running.clear()


def _signal(child: _Child, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody of the group is left
        os.killpg(child.process.pid, number)


def _writer(log: Path) -> str:
    with log.open("rb") as file:
        found = re.match(rb"# process (\d+)", file.readline(100))
    return found[1].decode() if found else "?"
