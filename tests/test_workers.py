"""The reward pool against everything that a completion may do to it."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from gift_lightning.rewards import build_rewards
from gift_lightning.workers import Request, RewardPool

TIMEOUT = 0.4

HOSTILE = r'''
import math, os, signal, sys, threading, time
from gift_lightning.rewards import Reward


def loop():
    while True:
        pass


def sleep():
    time.sleep(1000)


def power():
    return 9 ** 9 ** 9 ** 9  # one instruction, which no signal handler interrupts


def memory():
    return bytearray(1 << 42)


def hoard():
    kept = []
    while True:
        kept.append(bytearray(1 << 22))


def abort():
    os.abort()


def leave():
    os._exit(0)


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def quit():
    sys.exit()


def error():
    raise RuntimeError("no")


def recursion():
    recursion()


def flood():
    while True:
        print("x" * 100_000, flush=True)
        print("x" * 100_000, file=sys.stderr, flush=True)


def deaf():
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(1)
    loop()


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def forks():
    for _ in range(40):
        if os.fork() == 0:
            time.sleep(1000)
    time.sleep(1000)


def escape():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
        os._exit(0)
    time.sleep(1000)


def subprocesses():
    import subprocess
    subprocess.run(["sleep", "1000"])


def zygote():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


# These return, and leave something behind.


def fork():
    os.fork()


def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(1000)


def thread():
    threading.Thread(target=loop, daemon=True).start()


def alarm():
    signal.alarm(1)


def leak():
    leak.kept = bytearray(300 << 20)


def forge():
    for text in b"{}", b"[1]", b"\xff{", b'{"id": 1}', b'{"id": 1, "reason": "scored"}':
        for fd in range(3, 64):
            try:
                os.write(fd, len(text).to_bytes(4, "big") + text)
            except OSError:
                pass


def act(text):
    if text.startswith("do "):
        globals()[text[3:]]()


def scored(completions, **columns):
    """1 for `right`, 0 for anything else, but for what does harm."""
    for text in completions:
        act(text)
    return [float(text == "right") for text in completions]


def signed(completions, **columns):
    return [2 * score - 1 for score in scored(completions)]


def returns(completions, **columns):
    said = completions[0]
    return {
        "none": [None],
        "nan": [math.nan],
        "inf": [math.inf],
        "text": ["1"],
        "complex": [1j],
        "list": [[1.0]],
        "empty": [],
        "two": [1.0, 1.0],
        "bare": 0.25,
        "nothing": None,
        "bool": [True],
        "int": [3],
        "huge": [10**400],
        "low": [-7.0],
    }.get(said, [0.0])


def always_nan(completions, **columns):
    return [math.nan]


def always_text(completions, **columns):
    return ["good"]


def needs_answer(completions, answer):
    return [float(completions[0] == answer[0])]


def looks_up(completions, **columns):
    return [float(completions[0] == columns["solution"][0])]


def looks_up_text(completions, **columns):
    return [{"": 0.0, "right": 1.0}[completions[0]]]


def imports(completions, **columns):
    import a_module_that_is_missing


def imports_text(completions, **columns):
    if completions[0]:
        __import__(completions[0])
    return [0.0]


def echo(completions, **columns):
    return [float(completions[0] == "\ud800 \U0001f600 é\0" and math.isnan(columns["gold"][0]))]


def shouts(completions, **columns):
    print("a reward speaks")
    return [1.0]


def interrupts(completions, **columns):
    if completions[0] == "slow":
        time.sleep(0.3)
    return [float(len(completions[0]))]


class Args(Reward):
    def __init__(self, power: float, names: list[str], table: dict[str, int] | None = None):
        self.args = [power, names, table]

    def score(self, completion, **columns):
        return float(self.args == columns["args"])


class Fails(Reward):
    def prepare(self):
        raise ValueError("Fails needs a licence: buy one.")

    def score(self, completion, **columns):
        return 0.0


class Dies(Fails):
    def prepare(self):
        os._exit(3)
'''


@pytest.fixture(scope="module")
def mark():
    """In the environment of everything that these tests start."""
    name = f"gift_test_{uuid.uuid4().hex}"
    os.environ["GIFT_TEST_MARK"] = name
    yield name
    del os.environ["GIFT_TEST_MARK"]


def survivors(mark: str) -> list[int]:
    """Living processes that were started under this mark."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory, mark):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "hostile.py").write_text(HOSTILE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("hostile", None)
    assert survivors(mark) == []


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"reward .* \(said once\)")
        yield


def pool(*names: str | dict, workers: int = 2, **options) -> RewardPool:
    specs = [f"hostile.{x}" if isinstance(x, str) and x.islower() else x for x in names]
    return RewardPool(build_rewards(specs), workers, **{"timeout": TIMEOUT, **options})


def ask(text: str, **columns) -> Request:
    return Request(text, [1, 2], {"prompt": "?", "max_completion_length": 8, **columns})


def scores(pool, *texts, **columns):
    """Values and reasons of the first reward."""
    found = pool.score([ask(text, **columns) for text in texts])
    return [x.values[0] for x in found], [x.reasons[0] for x in found]


FAULTS = {
    "loop": "timeout",
    "sleep": "timeout",
    "power": "timeout",
    "memory": "memory",
    "abort": "crash",
    "leave": "crash",
    "segfault": "crash",
    "quit": "error",
    "error": "error",
    "recursion": "error",
    "flood": "timeout",
    "deaf": "timeout",
    "stop": "timeout",
    "forks": "timeout",
    "escape": "timeout",
    "subprocesses": "timeout",
}


@pytest.fixture(scope="module")
def shared_pool(module):
    with pool("scored", "signed") as shared:
        yield shared


@pytest.mark.parametrize("what", FAULTS)
def test_harm_costs_that_completion_its_reward(shared_pool, what, capfd):
    texts = ["right", f"do {what}", "wrong", "right"]
    start = time.monotonic()
    found = shared_pool.score([ask(text) for text in texts])
    elapsed = time.monotonic() - start
    # Two calls of it, one for each reward, and two workers: side by side.
    assert elapsed < TIMEOUT + 0.5
    assert [x.values for x in found] == [[1, 1], [0, -1], [0, -1], [1, 1]]
    assert found[1].reasons == [FAULTS[what]] * 2
    assert all(x.reasons == ["scored"] * 2 for x in (found[0], *found[2:]))
    assert capfd.readouterr() == ("", "")


def test_hoarding_memory_is_stopped(module):
    with pool("scored", timeout=20.0, memory_gib=0.25) as small:
        assert scores(small, "right", "do hoard", "right") == (
            [1, 0, 1],
            ["scored", "memory", "scored"],
        )


def test_symbolic_bombs(module):
    """`sympy` evaluates the tower for longer than anybody waits; the brackets are not parsed."""
    with pool("MathAnswer", timeout=1.0) as math_pool:
        texts = ["\\boxed{9^{9^{9^9}}}", "\\boxed{%s}" % ("(" * 60 + "2" + ")" * 60)]
        texts += ["\\boxed{1000000000!}", "\\boxed{\\sqrt{2}}", "\\boxed{\\frac{2}{\\sqrt{2}}}"]
        start = time.monotonic()
        values, reasons = scores(math_pool, *texts, answer="\\sqrt{2}")
        assert time.monotonic() - start < 2.5
        assert values == [0, 0, 0, 1, 1]
        assert reasons[0] == "timeout"
        assert [reasons[i] for i in (1, 3, 4)] == ["scored"] * 3
        values, reasons = scores(math_pool, *texts[:3], "\\boxed{18}", answer="18")
        assert values == [0, 0, 0, 1]
        assert (reasons[0], reasons[3]) == ("timeout", "scored")


def test_a_thousand_calls_with_a_tenth_hostile(module, monkeypatch):
    mark = f"gift_own_{uuid.uuid4().hex}"
    monkeypatch.setenv("GIFT_OWN_MARK", mark)
    kinds = ["loop", "sleep", "power", "deaf", "forks", "escape"] * 4
    kinds += ["abort", "leave", "segfault", "memory", "error", "quit", "recursion"] * 10
    kinds += ["flood", "stop", "subprocesses", "fork", "thread", "daemon"]
    texts = [f"do {kind}" for kind in kinds]
    assert len(texts) == 100
    texts += ["right", "wrong"] * 450
    random.Random(0).shuffle(texts)
    expected = [{"right": 1.0}.get(text, 0.0) for text in texts]
    reasons = [FAULTS.get(text.removeprefix("do "), "scored") for text in texts]
    with pool("scored") as many:
        start = time.monotonic()
        assert scores(many, *texts) == (expected, reasons)
        elapsed = time.monotonic() - start
        assert many.counts == {f"scored/{x}": reasons.count(x) for x in set(reasons)}
        hanging = reasons.count("timeout")
        assert elapsed < hanging / 2 * TIMEOUT + 5
        assert scores(many, "right") == ([1], ["scored"])
    assert survivors(mark) == []


def test_a_thousand_healthy_calls_take_no_second(module):
    with pool("scored", timeout=5.0) as healthy:
        took = []
        for _ in range(3):  # the best: others may want the cores too
            start = time.monotonic()
            values, _ = scores(healthy, *["right", "wrong"] * 500)
            took.append(time.monotonic() - start)
            assert values == [1, 0] * 500
        assert min(took) < 1


# What a call leaves behind


@pytest.mark.parametrize("what", ["fork", "daemon", "thread", "alarm", "leak", "forge"])
def test_what_is_left_behind_harms_nobody(module, what):
    """One worker, so that the next completion is scored where the last one was."""
    with pool("scored", workers=1, timeout=3.0, memory_gib=0.5) as one:
        for _ in range(3):
            values, reasons = scores(one, f"do {what}", "right", "wrong", "right")
            assert values[1:] == [1, 0, 1]
            assert reasons[1:] == ["scored"] * 3
            assert values[0] == 0
        if what == "alarm":
            time.sleep(1.2)
            assert scores(one, "right") == ([1], ["scored"])


def test_no_child_is_left(module, monkeypatch):
    mark = f"gift_own_{uuid.uuid4().hex}"
    monkeypatch.setenv("GIFT_OWN_MARK", mark)
    kinds = ("escape", "forks", "daemon", "subprocesses", "fork", "thread")
    with pool("scored") as busy:
        scores(busy, *(f"do {kind}" for kind in kinds), "right")
        assert survivors(mark)
    assert survivors(mark) == []
    busy.close()  # again
    with pytest.raises(RuntimeError, match="is closed or another process's: make one"):
        busy.score([ask("right")])


# Whose fault


@pytest.mark.parametrize(
    "said, value, reason",
    [
        ("bool", 1, "scored"),
        ("int", 3, "scored"),
        ("low", -7, "scored"),
        ("bare", 0.25, "scored"),
        ("none", None, "not_scorable"),
        ("nothing", None, "not_scorable"),
        # An empty completion gets a number, so the text is to blame.
        ("nan", 0, "bad_value"),
        ("inf", 0, "bad_value"),
        ("text", 0, "bad_value"),
        ("complex", 0, "bad_value"),
        ("list", 0, "bad_value"),
        ("empty", 0, "bad_value"),
        ("two", 0, "bad_value"),
        ("huge", 0, "bad_value"),
    ],
)
def test_return_values(module, shared_returns, said, value, reason):
    values, reasons = scores(shared_returns, said)
    assert reasons == [reason]
    assert math.isnan(values[0]) if value is None else values == [value]


@pytest.fixture(scope="module")
def shared_returns(module):
    with pool("returns") as shared:
        yield shared


@pytest.mark.parametrize(
    "name, reason, why",
    [
        ("always_nan", "bad_value", "the score is nan"),
        ("always_text", "bad_value", "the score is 'good'"),
        ("needs_answer", "not_scorable", "the problem has no column 'answer'"),
        ("looks_up", "not_scorable", "KeyError: 'solution'"),
        ("imports", "not_scorable", "No module named 'a_module_that_is_missing'"),
        ("MathAnswer", "not_scorable", "the problem has no column 'answer'"),
        ("LengthPenalty", "not_scorable", "KeyError: 'max_completion_length'"),
    ],
)
def test_a_fault_of_the_run_is_no_wrong_answer(module, name, reason, why):
    """It is left out of the baseline, counted by its reason and said."""
    spec = {"class_path": name, "init_args": {"cache": 1}} if name == "LengthPenalty" else name
    with pool(spec) as faulty, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            found = faulty.score([Request(text, [], {"prompt": "?"}) for text in ("right", "")])
            assert all(math.isnan(x.values[0]) and x.reasons == [reason] for x in found)
            assert all(math.isnan(faulty.total(x)) for x in found)
    assert faulty.counts == {f"{name}/{reason}": 4}
    assert len(said) == 1
    assert why in str(said[0].message)


def test_no_text_leaves_itself_out(module):
    """Faults that look like the run's, but come of the completion."""
    with pool("looks_up_text") as table:
        assert scores(table, "right", "solution", "answer") == (
            [1, 0, 0],
            ["scored", "error", "error"],
        )
    with pool("imports_text") as imports:
        assert scores(imports, "json", "no_such_module") == ([0, 0], ["scored", "error"])


def test_a_failure_is_never_worth_more_than_a_wrong_answer(module):
    """`signed` scores -1 for wrong answers and declares no minimum."""
    rng = random.Random(0)
    with pool("scored", "signed", timeout=0.2, workers=4) as mixed:
        requests, kinds = [], []
        for _ in range(40):
            group = ["right", "wrong", f"do {rng.choice(('abort', 'error', 'memory', 'leave'))}"]
            requests += [ask(text) for text in group]
            kinds += group
        found = mixed.score(requests)
        totals = [mixed.total(x) for x in found]
        for i in range(0, len(found), 3):
            assert totals[i] == 2
            assert totals[i + 1] == totals[i + 2] == -1


def test_columns_with_the_names_of_arguments(module):
    with pool("ExactMatch") as exact:
        found = exact.score([ask("right", answer="right", completion="x", completion_ids=[9])])
        assert found[0].values == [1]


def test_text_and_numbers_survive_the_way(module):
    with pool("echo") as echo:
        assert scores(echo, "\ud800 \U0001f600 é\0", gold=math.nan) == ([1], ["scored"])
        assert scores(echo, "x" * 3_000_000, gold=math.nan) == ([0], ["scored"])
    with pool("ExactMatch") as exact:
        request = ask("a", answer="a", other={1, 2})
        with pytest.raises(ValueError, match="the column 'other' cannot be sent to a reward"):
            exact.score([request])
        assert scores(exact, "a", answer="a") == ([1], ["scored"])


def test_a_worker_rebuilds_the_same_reward(module):
    args = {"power": 3, "names": ["a", "b"], "table": {"x": 1}}
    spec = {"class_path": "hostile.Args", "init_args": args}
    with pool(spec) as same:
        assert scores(same, "", args=[3.0, ["a", "b"], {"x": 1}]) == ([1], ["scored"])


def test_weights_and_totals(module):
    specs = [
        {"class_path": "hostile.scored", "weight": 2},
        {"class_path": "ExactMatch", "weight": 0.5},
        {"class_path": "LengthPenalty", "init_args": {"cache": 2}, "weight": 0},
    ]
    with RewardPool(build_rewards(specs), 2, TIMEOUT) as weighted:
        found = weighted.score([ask("right", answer=a) for a in ("right", "left", "")])
        assert [x.values[:2] for x in found][:2] == [[1, 1], [1, 0]]
        assert [weighted.total(x) for x in found] == [2.5, 2, 2]
        unknown = weighted.score([ask("x", answer="x")])[0]
        values = [math.nan, math.nan, 0.0]
        assert math.isnan(weighted.total(type(unknown)(values, ["not_scorable"] * 3)))
        assert weighted.score([]) == []


# The pool itself


def test_the_zygote_may_die(module):
    with pool("scored", timeout=2.0) as tough:
        assert scores(tough, "right") == ([1], ["scored"])
        os.kill(tough._zygote.process.pid, signal.SIGKILL)
        assert scores(tough, *["right", "wrong"] * 20) == ([1, 0] * 20, ["scored"] * 40)
        # A completion that kills it is found out, and its neighbours are scored.
        values, reasons = scores(tough, "right", "do zygote", "wrong", "right", "do zygote")
        assert values == [1, 0, 0, 1, 0]
        assert reasons == ["scored", "crash", "scored", "scored", "crash"]


def test_a_worker_that_somebody_kills_costs_no_completion(module):
    with pool("interrupts", timeout=5.0) as killed:
        while not all(worker.served for worker in killed._workers):  # a second death would count
            scores(killed, "a", "a", "a", "a")
        for worker in killed._workers:
            os.kill(worker.pid, signal.SIGKILL)
        assert scores(killed, *["abc"] * 9) == ([3] * 9, ["scored"] * 9)
        shot = threading.Timer(0.1, lambda: os.kill(killed._workers[0].pid, signal.SIGKILL))
        shot.start()
        assert scores(killed, "slow", "slow") == ([4] * 2, ["scored"] * 2)
        shot.join()


def test_a_zygote_that_keeps_dying_is_an_error(module, monkeypatch):
    with pool("scored", timeout=2.0) as doomed:
        start = doomed._zygote.start

        def start_and_kill():
            start()
            os.kill(doomed._zygote.process.pid, signal.SIGKILL)

        monkeypatch.setattr(doomed._zygote, "start", start_and_kill)
        os.kill(doomed._zygote.process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="the reward workers died 9 times in a row"):
            scores(doomed, *["right"] * 40)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"timeout": 0.0}, "RewardPool.timeout must be above 0 and finite, got 0.0"),
        ({"timeout": math.inf}, "RewardPool.timeout must be above 0 and finite, got inf"),
        ({"memory_gib": -1.0}, "RewardPool.memory_gib must be above 0"),
        ({"workers": 0}, "RewardPool.num_workers must be at least 1, got 0"),
    ],
)
def test_bad_options(module, options, said):
    with pytest.raises(ValueError, match=said):
        pool("scored", **options)


def test_a_reward_that_cannot_run_is_refused_at_once(module):
    with pytest.raises(ValueError, match="rewards is empty"):
        RewardPool([])
    with pytest.raises(ValueError, match="rewards: Fails needs a licence: buy one"):
        pool("hostile.Fails")
    unknown = {"class_path": "ReasoningGym", "init_args": {"task": "chain_sun"}}
    with pytest.raises(ValueError, match="reasoning-gym has no task 'chain_sun'"):
        pool(unknown, timeout=60.0)


def test_a_reward_that_dies_at_the_start_is_an_error(module):
    with pytest.raises(RuntimeError, match="the reward workers died 9 times in a row"):
        pool("hostile.Dies")


def test_off_the_main_thread(module):
    """From two threads at once, as signals would not have it."""
    found = {}
    with pool("scored") as threads:

        def run(name, texts):
            found[name] = scores(threads, *texts)

        jobs = [
            threading.Thread(target=run, args=("a", ["right", "do loop"] * 2)),
            threading.Thread(target=run, args=("b", ["wrong", "right"] * 50)),
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    assert found["a"] == ([1, 0] * 2, ["scored", "timeout"] * 2)
    assert found["b"] == ([0, 1] * 50, ["scored"] * 100)


def test_an_interrupted_batch_leaves_the_pool_usable(module):
    class InterruptError(Exception):
        pass

    def interrupt(*_):
        raise InterruptError

    with pool("interrupts", timeout=5.0) as interrupted:
        scores(interrupted, "a")
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(InterruptError):
                scores(interrupted, "slow", "slow", "slow", "slow")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert scores(interrupted, "ab", "abc") == ([2, 3], ["scored"] * 2)


def test_a_signal_handler_may_close_the_pool(module):
    closing = pool("interrupts", timeout=5.0)
    before = signal.signal(signal.SIGALRM, lambda *_: closing.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(RuntimeError, match="is closed"):
            scores(closing, "slow", "slow", "slow", "slow")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(RuntimeError, match="is closed"):
        scores(closing, "a")


def test_a_pool_is_not_another_process_s(module):
    with pool("scored") as mine:
        assert scores(mine, "right") == ([1], ["scored"])
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(BaseException):
                try:
                    mine.score([ask("right")])
                except RuntimeError as error:
                    code = 0 if "another process's" in str(error) else 2
                mine.close()
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert scores(mine, "right") == ([1], ["scored"])


SCRIPT = """
import os, signal, sys, threading
from gift_lightning.rewards import build_rewards
from gift_lightning.workers import Request, RewardPool
pool = RewardPool(build_rewards(["local_rewards.one"]), 2, 0.5)
print(pool.score([Request("a", [], {"prompt": "?"})])[0].values, flush=True)
"""


def run(folder, script, mark):
    (folder / "script.py").write_text(SCRIPT + textwrap.dedent(script))
    (folder / "local_rewards.py").write_text("def one(completions, **kwargs):\n    return [1.0]\n")
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "GIFT_OWN_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit", "del pool"])
def test_a_script_without_a_guard_that_never_closes(tmp_path, end):
    """Rewards in the script's own folder; at its end nothing is left and nothing is said."""
    mark = f"gift_own_{uuid.uuid4().hex}"
    process = run(tmp_path, end, mark)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("[1.0]\n", "", 0)
    assert survivors(mark) == []


def test_nothing_outlives_a_killed_run(tmp_path):
    mark = f"gift_own_{uuid.uuid4().hex}"
    process = run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", mark)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 5
    while survivors(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert survivors(mark) == []


def test_what_a_reward_prints_is_not_shown(module, capfd):
    with pool("shouts") as loud:
        assert scores(loud, "a") == ([1], ["scored"])
    assert capfd.readouterr().out == ""


def test_workers_know_nothing_of_the_path_they_came_by(module, monkeypatch, tmp_path):
    """A program that a reward starts gets the user's own PYTHONPATH."""
    (tmp_path / "paths.py").write_text(
        "import json, os\n"
        "def seen(completions, **columns):\n"
        "    return [float(os.environ.get('PYTHONPATH', '') == completions[0])]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for value in ("/some/where", ""):
        monkeypatch.setenv("PYTHONPATH", value)
        with RewardPool(build_rewards(["paths.seen"]), 1) as here:
            assert json.dumps(scores(here, value)[0]) == "[1.0]"
