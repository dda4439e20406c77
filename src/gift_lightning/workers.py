"""Rewards in worker processes that can be killed: no completion can hang, crash or starve a run.

What a call comes to, by reason:

- ``scored``: the reward's score.
- ``timeout``, ``crash``, ``memory``, ``error`` (an exception): the completion's own fault. It
  scores the reward's `minimum`, or the batch's lowest score of that reward if that is lower: a
  failure is never worth more than an honest wrong answer.
- ``not_scorable``: None, a column that the problem lacks, or a module that is missing: NaN.
- ``bad_value``: no finite number. NaN if the reward gives none for an empty completion either;
  otherwise this completion is to blame, and has failed.

This is no sandbox: a worker has the rights of the run. A reward that executes a model's code must
shut it off itself.
"""

import json
import math
import os
import selectors
import signal
import socket
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gift_lightning.rewards import WeightedReward
from gift_lightning.worker import frame_text, unframe
from gift_lightning.zygote import REPLY, LostError, Zygote

FAULTS = ("timeout", "crash", "memory", "error", "bad_value", "not_scorable")
"""Every reason but `scored`."""
_ANSWERS = ("scored", "not_scorable", "bad_value", "error", "memory")
_MAX_DEATHS = 8  # of zygotes in a row, without an answer in between
_MAX_ANSWER = 1 << 16


@dataclass(frozen=True)
class Request:
    """What is scored: `columns` are the problem's, with `prompt` and `max_completion_length`."""

    completion: str
    completion_ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """A value and a reason for each reward; NaN is not scorable."""

    values: list[float]
    reasons: list[str]


class RewardPool:
    """Scores completions side by side, each call in a process of its own and with a deadline.

    The parent keeps the deadlines: it needs no signal, so any thread may call it, one at a time.

    Attributes:
        counts: ``<name of the reward>/<reason>`` of all calls so far.
    """

    def __init__(
        self,
        rewards: Sequence[WeightedReward],
        num_workers: int | None = None,
        timeout: float = 5.0,
        memory_gib: float = 2.0,
    ) -> None:
        """
        Args:
            rewards: of `build_rewards`; they are built anew in the workers.
            num_workers: processes; None is one for each core that is this rank's, at most 8.
            timeout: seconds that a reward may take for one completion.
            memory_gib: address space that a worker may add to what it starts with.

        Raises:
            ValueError: there is no reward, one cannot run here, or an argument is out of range.
            RuntimeError: the process that imports the rewards died.
        """
        if not rewards:
            raise ValueError("rewards is empty: name at least one.")
        for name, value in {"timeout": timeout, "memory_gib": memory_gib}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"RewardPool.{name} must be above 0 and finite, got {value}.")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"RewardPool.num_workers must be at least 1, got {num_workers}.")
        self.rewards, self.timeout = list(rewards), timeout
        self.num_workers = num_workers or _cores()
        self.counts: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._lock = threading.RLock()  # a signal handler may close it
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._deaths = 0
        self._pid = os.getpid()
        specs = [weighted.spec for weighted in self.rewards]
        self._zygote = Zygote({"specs": specs, "memory": int(memory_gib * (1 << 30))})
        self._stop = weakref.finalize(self, Zygote.stop, self._zygote)
        self._start()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes, those that rewards started included."""
        with self._lock:
            # A fork of this process shares the sockets; it must not hang up.
            if self._stop.alive and os.getpid() == self._pid:
                for worker in list(self._workers):
                    self._forget(worker)
                self._selector.close()
                self._stop()

    def total(self, scored: Scored) -> float:
        """The weighted sum of the scorable values; NaN if none that weighs anything is."""
        terms = [
            weighted.weight * value
            for weighted, value in zip(self.rewards, scored.values, strict=True)
            if weighted.weight and not math.isnan(value)
        ]
        return math.fsum(terms) if terms else math.nan

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """The scores of each completion, in order.

        Raises:
            ValueError: a column is no JSON.
            RuntimeError: the pool is closed or of another process, or its processes keep dying.
        """
        with self._lock:
            self._refuse_closed()
            bodies = [_body(request) for request in requests]
            self._queue = deque(
                _Call(i, k, body) for i, body in enumerate(bodies) for k in range(len(self.rewards))
            )
            self._alone: deque[_Call] = deque()  # one of them may have killed a zygote
            self._again: deque[_Call] = deque()  # for workers that have served nobody
            self._found: dict[tuple[int, int], _Outcome] = {}
            num_calls = len(self._queue)
            try:
                while len(self._found) < num_calls:
                    self._refuse_closed()
                    self._step()
            except BaseException as error:  # answers to these must not be taken for later ones'
                pids = [worker.pid for worker in self._workers]
                for worker in list(self._workers):
                    self._forget(worker)
                with suppress(LostError):
                    self._zygote.ask(pids)
                if isinstance(error, Exception):
                    self._refuse_closed()  # by a signal handler, in the middle of it
                raise
            return self._scored(len(requests))

    def _refuse_closed(self) -> None:
        if not self._stop.alive or os.getpid() != self._pid:
            raise RuntimeError("this reward pool is closed or another process's: make one.")

    def _scored(self, num_requests: int) -> list[Scored]:
        lowest = [
            min(
                weighted.reward.minimum,
                *(self._found[i, k].value for i in range(num_requests) if self._found[i, k].scored),
                math.inf,
            )
            for k, weighted in enumerate(self.rewards)
        ]
        scored = []
        for i in range(num_requests):
            row = [self._found[i, k] for k in range(len(self.rewards))]
            for weighted, outcome in zip(self.rewards, row, strict=True):
                key = f"{weighted.name}/{outcome.reason}"
                self.counts[key] += 1
                if outcome.why and key not in self._warned:
                    self._warned.add(key)
                    warnings.warn(f"reward {key}: {outcome.why} (said once)", stacklevel=3)
            values = [
                least if outcome.failed else outcome.value
                for outcome, least in zip(row, lowest, strict=True)
            ]
            scored.append(Scored(values, [outcome.reason for outcome in row]))
        return scored

    # One turn: people the pool, hand out calls, hear answers, keep deadlines

    def _step(self) -> None:
        try:
            self._hire()
            for worker in self._workers.copy():
                if worker.ready and worker.call is None and (call := self._next(worker)):
                    self._send(worker, call)
            now = time.monotonic()
            limits = [x for w in self._workers if (x := self._limit(w)) is not None]
            pause = max(0.0, min(limits) - now) if limits else 0.0
            for key, _ in self._selector.select(pause):
                self._hear(key.data)
            now = time.monotonic()
            for worker in self._workers.copy():
                limit = self._limit(worker)
                if limit is not None and limit <= now:
                    self._give_up(worker, "timeout")
        except LostError:
            self._restart()

    def _limit(self, worker: "_Worker") -> float | None:
        return worker.call.deadline if worker.call else None if worker.ready else worker.hello_by

    def _hire(self) -> None:
        waiting = len(self._queue) + len(self._alone) + len(self._again)
        wanted = min(self.num_workers, waiting + sum(w.call is not None for w in self._workers))
        while len(self._workers) < wanted or (
            self._again and not any(w.call is None and not w.served for w in self._workers)
        ):
            pid, connection = self._zygote.fork()
            connection.settimeout(REPLY)
            worker = _Worker(pid, connection, time.monotonic() + REPLY)
            self._selector.register(connection, selectors.EVENT_READ, worker)
            self._workers.append(worker)

    def _next(self, worker: "_Worker") -> "_Call | None":
        if self._again and not worker.served:
            return self._again.popleft()
        if self._alone:
            busy = any(w.call for w in self._workers)
            return None if busy else self._alone.popleft()
        return self._queue.popleft() if self._queue else None

    def _send(self, worker: "_Worker", call: "_Call") -> None:
        if call.deadline is None:
            call.deadline = time.monotonic() + self.timeout
        worker.call = call
        worker.turn += 1
        head = f'{{"id": {worker.turn}, "reward": {call.reward}, "request": '
        try:
            worker.connection.sendall(frame_text(head + call.body + "}"))
        except OSError:
            self._give_up(worker, "crash")

    def _hear(self, worker: "_Worker") -> None:
        try:
            part = worker.connection.recv(_MAX_ANSWER)
            worker.inbox += part
            found = unframe(worker.inbox)
        except (OSError, ValueError):
            part, found = b"", None
        if found is None:
            if not part or len(worker.inbox) > _MAX_ANSWER:
                self._give_up(worker, "crash")
            return
        answer, length = found
        call = worker.call
        if length != len(worker.inbox) or not isinstance(answer, dict):
            self._give_up(worker, "crash")
            return
        worker.inbox.clear()
        if not worker.ready:
            worker.ready = True
            return
        outcome = _outcome(answer)
        if call is None or outcome is None or answer.get("id") != worker.turn:  # out of turn
            self._give_up(worker, "crash")
            return
        worker.call = None
        self._deaths = 0
        if outcome.reason == "memory" and worker.served and not call.again:
            call.again = True
            self._again.append(call)
        else:
            self._found[call.request, call.reward] = outcome
        worker.served += 1
        if answer.get("worn"):
            self._end(worker)

    def _give_up(self, worker: "_Worker", reason: str) -> None:
        """Of a worker that died or has to."""
        self._end(worker)  # first: if the zygote is gone too, the call was perhaps not to blame
        call = worker.call
        if call is None:
            self._count_death()
        elif reason == "crash" and not call.again:
            # What others left in the worker may have killed it, or somebody outside.
            call.again = True
            self._again.append(call)
        else:
            self._found[call.request, call.reward] = _Outcome(reason, math.nan, True, "")

    def _end(self, worker: "_Worker") -> None:
        self._zygote.ask([worker.pid])
        self._forget(worker)

    def _forget(self, worker: "_Worker") -> None:
        self._selector.unregister(worker.connection)
        worker.connection.close()
        self._workers.remove(worker)

    def _restart(self) -> None:
        """A new zygote. A call during which two of them died has failed."""
        self._count_death()
        for worker in self._workers.copy():
            self._forget(worker)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
            if (call := worker.call) is None:
                continue
            if call.alone:
                outcome = _Outcome("crash", math.nan, True, "")
                self._found[call.request, call.reward] = outcome
            else:
                call.alone, call.deadline = True, None
                self._alone.append(call)
        self._start()

    def _start(self) -> None:
        while True:
            try:
                self._zygote.start()
                return
            except LostError:
                self._count_death()

    def _count_death(self) -> None:
        self._deaths += 1
        if self._deaths > _MAX_DEATHS:
            raise RuntimeError(
                f"the reward workers died {self._deaths} times in a row: look at what they "
                "printed, and whether the machine has memory and processes to spare."
            )


@dataclass(frozen=True)
class _Outcome:
    reason: str
    value: float
    failed: bool
    why: str

    @property
    def scored(self) -> bool:
        return self.reason == "scored"


def _outcome(answer: dict[str, Any]) -> _Outcome | None:
    """What a worker said of a call; None if no worker of ours speaks like that."""
    reason, value, why = answer.get("reason"), answer.get("value"), answer.get("why")
    value = value if isinstance(value, float) else math.nan
    finite = math.isfinite(value)
    if reason not in _ANSWERS or not isinstance(why, str) or finite != (reason == "scored"):
        return None
    return _Outcome(reason, value, answer.get("failed") is True, why)


@dataclass(eq=False)
class _Call:
    request: int
    reward: int
    body: str  # of the request, as JSON
    deadline: float | None = None
    alone: bool = False  # a zygote died during it
    again: bool = False  # a worker died of it, perhaps of what others had left there


@dataclass(eq=False)
class _Worker:
    pid: int
    connection: socket.socket
    hello_by: float
    ready: bool = False
    call: _Call | None = None
    turn: int = 0
    served: int = 0
    inbox: bytearray = field(default_factory=bytearray)


def _cores() -> int:
    here = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if here else (os.cpu_count() or 1)
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _body(request: Request) -> str:
    try:
        return json.dumps(vars(request))
    except (TypeError, ValueError) as error:
        for name, value in request.columns.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"the column {name!r} cannot be sent to a reward, as it is no JSON ({error}): "
                    "convert it."
                ) from None
        raise
