"""The child's half of `workers.RewardPool`: ``python -m gift_lightning.worker FD``.

One zygote for each pool imports the rewards once, then forks a worker whenever the pool asks for
one, kills those that the pool gives up, and ends whatever they left behind. A worker scores one
call at a time. Everything is said in frames of JSON: text of a model is data, never unpickled.
"""

import ctypes
import gc
import json
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from gift_lightning.rewards import Reward, needs, rebuild

_LENGTH = struct.Struct(">I")
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_TICK = 1.0  # seconds between two looks for what ran away
_PATIENCE = 10.0  # seconds to wait for killed processes at the end


def frame(message: Any) -> bytes:
    """ASCII, so that lone surrogates survive; NaN is written as Python reads it."""
    return frame_text(json.dumps(message))


def frame_text(text: str) -> bytes:
    body = text.encode()
    return _LENGTH.pack(len(body)) + body


def unframe(data: bytes | bytearray) -> tuple[Any, int] | None:
    """The first message of some bytes and its length with the head; None if there is more to come.

    Raises:
        ValueError: it is no JSON.
    """
    if len(data) < _LENGTH.size:
        return None
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    return None if len(data) < end else (json.loads(bytes(data[_LENGTH.size : end])), end)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message and the file descriptors that came with it; EOFError at the end."""
    data, passed = bytearray(), []
    while True:
        part, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
        if not part:
            raise EOFError
        data += part
        passed += fds
        if found := unframe(data):
            assert found[1] == len(data), "one message at a time"
            return found[0], passed


# The zygote


def main() -> None:
    """Sets up the rewards, says so, and serves the pool until it hangs up."""
    control = socket.socket(fileno=int(sys.argv[1]))
    parent = os.getppid()
    setup, _ = receive(control)
    for name, value in setup["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        rewards = [rebuild(spec) for spec in setup["specs"]]
        for reward in rewards:
            reward.prepare()
    except Exception as error:
        own = isinstance(error, ValueError)
        control.sendall(frame({"error": str(error) if own else f"{type(error).__name__}: {error}"}))
        return
    gc.collect()
    gc.freeze()  # so that collections in the workers copy no pages
    zygote = _Zygote(control, rewards, int(setup["memory"]))
    control.sendall(frame({"ready": os.getpid()}))
    try:
        zygote.serve(parent)
    finally:
        zygote.end()


class _Zygote:
    def __init__(self, control: socket.socket, rewards: Sequence[Reward], memory: int) -> None:
        self.control, self.rewards, self.memory = control, rewards, memory
        self.workers: set[int] = set()
        self.dying: set[int] = set()  # killed, not yet reaped
        self.kept = _children()  # that a reward's `prepare` started

    def serve(self, parent: int) -> None:
        next_look = 0.0
        while os.getppid() == parent:
            if select.select([self.control], [], [], _TICK)[0]:
                try:
                    message, fds = receive(self.control)
                except (EOFError, OSError):
                    return
                for pid in self.workers & set(message["kill"]):
                    self.kill(pid)
                self.control.sendall(frame({"forked": [self.fork(fd) for fd in fds]}))
            if time.monotonic() > next_look:
                self.sweep()
                next_look = time.monotonic() + _TICK

    def fork(self, fd: int) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that rewards started
            pid = os.fork()
        if pid == 0:
            try:
                self.control.close()
                work(socket.socket(fileno=fd), self.rewards, self.memory)
            finally:
                os._exit(1)
        os.close(fd)
        self.workers.add(pid)
        return pid

    def kill(self, pid: int) -> None:
        """The child and its process group; it is reaped here alone, so the number is still its."""
        self.workers.discard(pid)
        self.kept.discard(pid)
        self.dying.add(pid)
        for kill in os.kill, os.killpg:
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)

    def sweep(self) -> bool:
        """Kills what dead workers left behind and reaps the dead; whether any of them is left."""
        for pid in _children() - self.workers - self.kept:
            self.kill(pid)
        for pid in sorted(self.dying):
            try:
                gone = os.waitpid(pid, os.WNOHANG)[0] != 0
            except ChildProcessError:
                gone = True
            if gone:
                self.dying.discard(pid)
        return bool(self.dying or _children() - self.workers - self.kept)

    def end(self) -> None:
        for pid in self.workers | self.kept:
            self.kill(pid)
        deadline = time.monotonic() + _PATIENCE
        while self.sweep() and time.monotonic() < deadline:
            time.sleep(0.005)


def _children() -> set[int]:
    """Our children, those included whose own parent died; none where there is no /proc."""
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children") as file:
            return {int(pid) for pid in file.read().split()}
    except OSError:  # a kernel without that file
        found = set()
        with suppress(OSError):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with suppress(OSError), open(f"/proc/{pid}/stat") as file:
                    if int(file.read().rpartition(")")[2].split()[1]) == me:
                        found.add(int(pid))
        return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# A worker


def work(connection: socket.socket, rewards: Sequence[Reward], memory: int) -> NoReturn:
    """Answers calls {id, reward, request} until the pool hangs up."""
    zygote, me = os.getppid(), os.getpid()
    os.setsid()
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:  # it died before that
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in 0, 1, 2:
        os.dup2(nothing, fd)
    base = _size()
    _limit(base + memory)
    needed = [needs(reward) for reward in rewards]
    connection.sendall(frame({"id": None}))
    while True:
        call, _ = receive(connection)
        request = call["request"]
        columns = {**request["columns"], "completion_ids": request["completion_ids"]}
        columns.pop("completion", None)  # a name that `score` has taken
        i = call["reward"]
        if missing := sorted(needed[i] - columns.keys()):
            answer = _Verdict("not_scorable", why=f"the problem has no column {missing[0]!r}")
        else:
            answer = judge(rewards[i], request["completion"], columns)
        if os.getpid() != me:  # a fork that a reward made, and let run on
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm left behind would kill the next call
        grown = _size() - base > memory // 4
        left = threading.active_count() > 1 or bool(_children())
        worn = answer.reason == "memory" or grown or left
        connection.sendall(frame({"id": call["id"], "worn": worn, **vars(answer)}))


class _Verdict:
    """What became of a call: a value, or None with whether the completion is to blame."""

    def __init__(
        self, reason: str, value: float | None = None, failed: bool = False, why: str = ""
    ) -> None:
        self.reason, self.value, self.failed, self.why = reason, value, failed, why


def judge(reward: Reward, completion: str, columns: dict[str, Any]) -> _Verdict:
    """Scores a completion and tells its faults from the problem's and the reward's.

    A column that is missing, a module that does not import and a score that is no number are the
    completion's fault unless an empty completion meets the same: so no text can have itself left
    out of the baseline, and a broken reward does not look like wrong answers. Any other exception
    is the completion's fault.
    """
    verdict = _judged(reward, completion, columns)
    if verdict.reason == "bad_value" or verdict.why.startswith(_SUSPECT):
        neutral = _judged(reward, "", {**columns, "completion_ids": []})
        if verdict.reason == "bad_value":
            verdict.failed = neutral.reason != "bad_value"
        elif neutral.why == verdict.why:
            return _Verdict("not_scorable", why=verdict.why)
    return verdict


_SUSPECT = ("KeyError:", "ImportError:", "ModuleNotFoundError:")


def _judged(reward: Reward, completion: str, columns: dict[str, Any]) -> _Verdict:
    try:
        score: Any = reward.score(completion, **columns)
        if score is None:
            return _Verdict("not_scorable")
        if isinstance(score, str | bytes):
            return _Verdict("bad_value", why=f"the score is {score!r:.80}")
    except MemoryError:
        return _Verdict("memory", failed=True)
    except BaseException as error:  # SystemExit is one way to leave early
        with suppress(Exception):
            return _Verdict("error", failed=True, why=f"{type(error).__name__}: {error}"[:200])
        return _Verdict("error", failed=True)
    try:
        value = float(score)
    except Exception:
        return _Verdict("bad_value", why=f"the score is a {type(score).__name__}")
    if not math.isfinite(value):
        return _Verdict("bad_value", why=f"the score is {value}")
    return _Verdict("scored", value)


def _size() -> int:
    """Bytes of address space; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _limit(address_space: int) -> None:
    for kind, most in (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, address_space):
        with suppress(ValueError, OSError):  # not every system has every limit
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # rather a worker than the run


if __name__ == "__main__":
    main()
