"""The runner of experiments: order, failures, changes and kills; nothing is lost."""

import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import test_cli
from gift_lightning.ablate import ablate, main, refuse_changed, write_plan
from gift_lightning.comparison import compare
from gift_lightning.experiment_file import read_experiment
from gift_lightning.results import read_results

FAKE = """
import csv, json, os, pathlib, sys, time, zlib

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(flags["trainer.default_root_dir"])
assert not folder.exists()
folder.mkdir()
(folder / "half-written").touch()
with open("started.txt", "a") as file:
    file.write(f"{folder} {time.monotonic()} {os.environ['OMP_NUM_THREADS']}\\n")
time.sleep(float(flags.get("sleep", 0)))
if pathlib.Path("broken").exists() and flags.get("breaks"):
    sys.exit("this one is broken\\nfor good")
source = flags.get("pretrained")
start = float(pathlib.Path(source, "value").read_text()) if source else 0.0
gain = zlib.crc32(f"{flags['seed_everything']} {flags.get('beta')}".encode()) % 1000 / 1000
with open(folder / "metrics.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerows([["step", "val/in/nll"], [0, start], [9, start + gain]])
if not flags.get("forgets"):
    (folder / "hf").mkdir()
    (folder / "hf" / "value").write_text(str(start + gain))
with open("ended.txt", "a") as file:
    file.write(f"{folder} {time.monotonic()}\\n")
"""
EXPERIMENT = {
    "output": "runs/lab",
    "seeds": [0, 1, 2],
    "stages": {
        "sft": {"config": "sft.yaml", "overrides": {"data.seed": "{seed}"}},
        "rl": {"config": "rl.yaml", "overrides": {"pretrained": "{sft}/hf"}},
    },
    "arms": {
        "base": {"sft": "skip", "rl": {"pretrained": "start"}},
        "sft": {},
        "gift": {"sft": {"beta": 3}},
    },
}
TINY = test_cli.TINY + "  enable_checkpointing: false\n"
REAL = """
output: runs/real
seeds: [0]
stages:
  sft: {config: tiny.yaml, overrides: {data.seed: "{seed}"}}
  more:
    config: tiny.yaml
    overrides: {model.model: gift_lightning.models.causal_lm, model.model.pretrained: "{sft}/hf"}
arms:
  sft: {sft: {model.target: OneHot}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a fake `gift`, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    Path("fake.py").write_text(FAKE)
    Path("sft.yaml").write_text("trainer: {max_epochs: 19}\n")
    Path("rl.yaml").write_text("trainer: {max_steps: 200}\n")
    Path("start").mkdir()
    Path("start/value").write_text("0.5")
    return tmp_path


def write(path="lab.yaml", **changes) -> str:
    Path(path).write_text(yaml.safe_dump({**EXPERIMENT, **changes}, sort_keys=False))
    return path


def run(path="lab.yaml", jobs=2, only=()) -> int:
    """Everything that `gift ablate` does, with the fake instead of `gift fit`."""
    experiment = read_experiment(path)
    runs = experiment.runs(only)
    refuse_changed(runs)
    write_plan(experiment)
    return ablate(runs, jobs, [sys.executable, "fake.py"])


def lines(name: str) -> list[list[str]]:
    return [line.split() for line in Path(name).read_text().splitlines()]


def started() -> list[str]:
    return [place.removeprefix("runs/lab/") for place, *_ in lines("started.txt")]


def finished() -> set[str]:
    return {str(x.parent.relative_to("runs/lab")) for x in Path("runs/lab").rglob("done.json")}


def table(folder="runs/lab") -> str:
    return compare(read_results([folder]), None).markdown()


def test_every_run_is_made_once_behind_what_it_reads(here, capsys):
    assert run(write()) == 0
    assert len(started()) == len(set(started())) == 15
    ended = {place: float(when) for place, when in lines("ended.txt")}
    for place, when, _ in lines("started.txt"):
        if place.endswith("rl") and "base" not in place:
            assert ended[place.replace("/rl", "/sft")] < float(when)
    done = json.loads(Path("runs/lab/gift/seed-1/sft/done.json").read_text())
    assert (done["arm"], done["seed"], done["stage"], done["exit_code"]) == ("gift", 1, "sft", 0)
    assert done["command"][:3] == [sys.executable, "fake.py", "fit"]
    assert "--beta=3" in done["command"] and done["seconds"] > 0
    assert {"python", "torch", "lightning", "gift-lightning"} <= set(done["versions"])
    assert Path(done["command"][4]).read_text() == Path("sft.yaml").read_text()
    assert "15 of 15" in capsys.readouterr().out
    assert run() == 0
    assert len(started()) == 15, "a finished run was made again"


def test_jobs_share_the_cores(here, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    slow = {"sft": {"config": "sft.yaml", "overrides": {"sleep": 0.3}}}
    assert run(write(stages=slow, arms={"a": {}, "b": {}}), jobs=2) == 0
    events = [(float(when), 1, int(n)) for _, when, n in lines("started.txt")]
    assert {n for *_, n in events} == {max(1, cores // 2)}
    spans = [(when, change) for when, change, _ in events]
    spans += [(float(when), -1) for _, when in lines("ended.txt")]
    running = [sum(x for _, x in sorted(spans)[: i + 1]) for i in range(len(spans))]
    assert max(running) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(write(output="runs/other", stages=slow, arms={"a": {}})) == 0
    assert lines("started.txt")[-1][2] == "7"


def test_a_failure_stops_only_what_reads_it_and_is_tried_again(here, capsys):
    write(arms={"bad": {"sft": {"breaks": 1}}, "good": {}}, seeds=[0, 1])
    Path("broken").touch()
    assert run() == 1
    said = capsys.readouterr().err
    assert "bad seed 0 sft: exit code 1" in said and "for good" in said
    assert "2 of 8 runs failed, 2 that need them were not started" in said
    assert finished() == {f"good/seed-{s}/{x}" for s in (0, 1) for x in ("sft", "rl")}
    assert Path("runs/lab/bad/seed-0/sft/half-written").exists()
    Path("broken").unlink()
    assert run() == 0
    assert len(finished()) == 8 and len(started()) == 6 + 4


def test_success_without_a_model_is_a_failure(here, capsys):
    assert run(write(arms={"a": {"sft": {"forgets": 1}}}, seeds=[0])) == 1
    assert "ended before its model was written" in capsys.readouterr().err
    assert not finished()


def test_what_has_changed_since_is_refused_by_name(here):
    run(write(seeds=[0]))
    count = len(started())
    arms = {**EXPERIMENT["arms"], "gift": {"sft": {"beta": 5}}}
    write(seeds=[0], arms=arms)
    with pytest.raises(ValueError, match=r"gift/seed-0/sft is finished.*beta was 3 and is 5"):
        run()
    assert run(only=["sft", "base"]) == 0
    with pytest.raises(ValueError, match=r"beta was 3.*1 more run.*--only"):
        run(only=["gift"])
    write(seeds=[0, 1])
    Path("sft.yaml").write_text("# only a remark\ntrainer:\n  max_epochs: 19\n")
    assert run() == 0, "seeds may be added, remarks may change"
    assert len(started()) == count + 5
    Path("rl.yaml").write_text("trainer: {max_steps: 100}\n")
    with pytest.raises(ValueError, match=r"trainer\.max_steps was 200 and is 100"):
        run()


def test_a_stage_that_was_trained_anew_makes_the_next_one_stale(here):
    run(write(seeds=[0]))
    for file in Path("runs/lab/gift/seed-0/sft").rglob("done.json"):
        file.unlink()
    write(seeds=[0], arms={**EXPERIMENT["arms"], "gift": {"sft": {"beta": 5}}})
    with pytest.raises(
        ValueError, match=r"gift/seed-0/rl .*stage sft, which it reads, has changed"
    ):
        run()


def test_finished_runs_may_be_moved(here):
    run(write(seeds=[0]))
    count = len(started())
    Path("runs/lab").rename("elsewhere")
    assert run(write(seeds=[0], output="elsewhere")) == 0
    assert len(started()) == count


def test_a_folder_of_somebody_else_is_left_alone(here, capsys):
    write(seeds=[0], arms={"a": {}})
    Path("runs/lab/a/seed-0/sft").mkdir(parents=True)
    Path("runs/lab/a/seed-0/sft/thesis.tex").touch()
    for _ in range(2):
        assert run() == 1
        assert "is no run of an ablation: move it away" in capsys.readouterr().err
    assert Path("runs/lab/a/seed-0/sft/thesis.tex").exists()


# Kills.

fork = multiprocessing.get_context("fork")


def logs() -> list[Path]:
    """Logs of the runs that have been started and are not done."""
    every = Path("runs").rglob("*.log")
    return [x for x in every if not (x.with_suffix("") / "done.json").exists()]


def children() -> list[int]:
    """Process ids of the runs that somebody still writes the log of."""
    found = [re.match(r"# process (\d+)", x.read_text()) for x in logs() if held(x)]
    return [int(x[1]) for x in found if x]


def held(log: Path) -> bool:
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def kill_children() -> None:
    """Kills what a killed runner has left behind, and waits for its end."""

    def ended() -> bool:
        for pid in children():
            kill_group(pid)
        return not any(map(held, logs()))

    until(ended)


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def gone(pid: int) -> bool:
    """Whether a process has ended; an orphan's remains are not ours to collect."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def killed(path: str, after: float) -> bool:
    """Whether a run in a process of its own was killed, with its children, before it was done."""
    runner = fork.Process(target=run, args=(path,))
    runner.start()
    runner.join(after)
    if runner.exitcode is not None:
        return False
    os.kill(runner.pid, signal.SIGKILL)
    runner.join()
    kill_children()
    return True


def test_killed_at_any_moment_it_ends_with_the_same_table(here):
    slow = {
        name: {**stage, "overrides": {**stage["overrides"], "sleep": 0.1}}
        for name, stage in EXPERIMENT["stages"].items()
    }
    write(stages=slow, output="runs/whole")
    assert run() == 0
    whole = table("runs/whole")
    write(stages=slow)
    kills, before, after = 0, {}, 0.06
    while killed("lab.yaml", after):
        kills, after = kills + 1, 1.3 * after  # from killed at once to time for all of it
        before = {x: Path("runs/lab", x, "done.json").stat().st_mtime_ns for x in finished()}
    assert kills >= 5 and before
    assert run() == 0
    assert table() == whole and "3 | " in whole
    assert all(Path("runs/lab", x, "done.json").stat().st_mtime_ns == t for x, t in before.items())
    assert not list(Path("runs").rglob(".*")), "a file was left half-written"


def test_a_run_whose_runner_was_killed_is_not_started_twice(here, capsys):
    write(stages={"sft": {"config": "sft.yaml", "overrides": {"sleep": 30}}}, arms={"a": {}})
    runner = fork.Process(target=run, args=("lab.yaml", 1))
    runner.start()
    until(lambda: Path("started.txt").exists() and children())
    os.kill(runner.pid, signal.SIGKILL)
    runner.join()
    (orphan,) = children()
    try:
        read = read_experiment("lab.yaml").runs()[:1]
        assert ablate(read, 1, [sys.executable, "fake.py"]) == 1
        assert f"process {orphan} of an earlier command still writes" in capsys.readouterr().err
        assert len(started()) == 1 and not gone(orphan)
    finally:
        kill_group(orphan)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_children_and_keeps_what_is_done(here, number):
    stages = {"sft": {"config": "sft.yaml"}}
    arms = {"quick": {}, "slow": {"sft": {"sleep": 60}}}
    write(stages=stages, arms=arms, seeds=[0])
    runner = fork.Process(target=lambda: sys.exit(run(jobs=1)))
    runner.start()
    until(lambda: len(lines("started.txt")) == 2 if Path("started.txt").exists() else False)
    (pid,) = children()
    os.kill(runner.pid, number)
    runner.join(10)
    assert runner.exitcode == 128 + number
    assert gone(pid) and finished() == {"quick/seed-0/sft"}


def test_real_runs_killed_and_restarted_end_with_the_same_table(here):
    """SIGKILL of the runner and its child in the second stage, then the same command again."""
    Path("tiny.yaml").write_text(TINY)
    Path("real.yaml").write_text(REAL.replace("runs/real", "runs/whole"))
    with pytest.raises(SystemExit) as stopped:
        main(["real.yaml"])
    assert stopped.value.code == 0
    Path("real.yaml").write_text(REAL)
    gift = [sys.executable, "-m", "gift_lightning", "ablate", "real.yaml"]
    runner = subprocess.Popen(gift, stdout=subprocess.DEVNULL)
    try:
        log = Path("runs/real/sft/seed-0/more.log")
        until(lambda: log.exists() and "Data" in log.read_text(), 120)
    finally:
        runner.kill()
        runner.wait()
        count = len(children())
        kill_children()
    assert count == 1
    assert [x.parent.name for x in Path("runs/real").rglob("done.json")] == ["sft"]
    with pytest.raises(SystemExit) as stopped:
        main(["real.yaml"])
    assert stopped.value.code == 0
    assert table("runs/real") == table("runs/whole")
    assert table("runs/real").count("| sft |") == 6  # two stages of three sets each
