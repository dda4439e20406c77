"""`gift ablate FILE`: every arm over every seed and stage, each in a process of its own."""

import contextlib
import io
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gift_lightning.cli import fit_parser
from gift_lightning.errors import CommandParser
from gift_lightning.experiment import Experiment, Run
from gift_lightning.experiment_file import read_experiment
from gift_lightning.processes import Processes
from gift_lightning.progress import Progress
from gift_lightning.receipt import changes, read_receipt, write_json, write_text

GIFT = (sys.executable, "-m", "gift_lightning")


def main(words: Sequence[str]) -> None:
    """`gift ablate`; exit code 1 if a run failed, 130 or 143 if it was stopped."""
    parser = CommandParser(
        "gift ablate",
        description="Run arms × seeds × stages of an ablation file. Finished runs are kept, a "
        "stopped or failed one is started again from the beginning: give the same command.",
    )
    parser.add_argument("file", help="the ablation, as docs/ablations.md describes it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ARM", help="only this arm; can be repeated"
    )
    given = parser.parse_args(list(words))
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    experiment = read_experiment(given.file)
    runs = experiment.runs(given.only)
    refuse_changed(runs)
    parse_all(runs, given.file)
    write_plan(experiment)
    code = ablate(runs, given.jobs)
    if code == 0:
        print(f"All done. Next: gift compare {experiment.output}")
    sys.exit(code)


def parse_all(runs: Iterable[Run], path: str) -> None:
    """Parses the command line of every stage and arm, as `gift fit` will.

    Raises:
        ValueError: in one sentence, of the first that does not parse.
    """
    parser, seen = fit_parser(), set()
    for run in runs:
        if (run.arm, run.name) in seen:
            continue
        seen.add((run.arm, run.name))
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                parser.parse_args(run.words(run.stage.config))
        except SystemExit:
            why = said.getvalue().strip().rpartition("gift: error: ")[2]
            arm = f" of arm {run.arm}" if run.arm else ""
            raise ValueError(f"{path}: stage {run.name}{arm}: {why}") from None


def refuse_changed(runs: Iterable[Run]) -> None:
    """Raises ValueError if a finished run was made with other settings than the file now says."""
    stale = [(run, done) for run in runs if (done := changes(run, read_receipt(run.folder)))]
    if stale:
        run, changed = stale[0]
        more = f" (and {len(stale) - 1} more runs)" if len(stale) > 1 else ""
        raise ValueError(
            f"{run.folder} is finished, but not with what the file says now: {'; '.join(changed)}"
            f"{more}; delete its folder to train it again, take the change back, or choose other "
            "arms with --only."
        )


def write_plan(experiment: Experiment) -> None:
    """Leaves what should be there for `gift compare`, and the configs that the runs read."""
    plan: dict[str, Any] = {"arms": {}, "seeds": experiment.seeds}
    plan["stages"] = [stage.name for stage in experiment.stages.values() if not stage.once]
    for name, arm in experiment.arms.items():
        plan["arms"][name] = [x for x in plan["stages"] if arm.get(x, {}) is not None]
    try:
        (experiment.output / "configs").mkdir(parents=True, exist_ok=True)
        for run in experiment.runs():
            if not run.config.exists():
                write_text(run.config, run.stage.text)
        write_json(experiment.output / "plan.json", plan)
    except OSError as error:
        raise ValueError(
            f"output: {experiment.output} cannot be written: {error.strerror}; choose another."
        ) from error


def ablate(runs: list[Run], jobs: int = 1, program: Sequence[str] = GIFT) -> int:
    """Runs what is not finished yet; what fails stops nothing but the stages that read it.

    Args:
        runs: each behind those that it needs.
        jobs: how many side by side.
        program: what stands before a run's words on its command line.

    Returns:
        The exit code: 0, 1 if a run failed, 128 + the number of the signal that stopped it.
    """
    waiting = [run for run in runs if read_receipt(run.folder) is None]
    console = Console()
    progress = Progress(console, runs, waiting)
    processes = Processes(program, jobs)
    failed: dict[Run, str] = {}
    skipped: list[Run] = []
    done = set(runs) - set(waiting)
    with _signals() as caught, progress, processes:
        while (waiting or processes.running) and not caught:
            for run in list(waiting):
                needs = set(run.needs.values())
                if needs & {*failed, *skipped}:
                    waiting.remove(run)
                    skipped.append(run)
                    progress.skipped(run)
                elif needs <= done and processes.have_room:
                    waiting.remove(run)
                    if why := processes.start(run):
                        failed[run] = why
                        progress.failed(run, why)
                    else:
                        progress.started(run)
            for run, seconds, why_failed in processes.finished():
                if why_failed is None:
                    done.add(run)
                    progress.done(run, seconds)
                else:
                    failed[run] = why_failed
                    progress.failed(run, why_failed)
            progress.refresh()
    if caught:
        print(
            f"gift: error: stopped with {len(done)} of {len(runs)} runs done; the same command "
            "goes on from here.",
            file=sys.stderr,
        )
        return 128 + caught[0]
    for run, why in failed.items():
        print(f"\n{run}: {why}, see {run.log}\n{log_end(run.log)}", file=sys.stderr)
    if failed:
        unable = f", {len(skipped)} that need them were not started" if skipped else ""
        print(
            f"gift: error: {len(failed)} of {len(runs)} runs failed{unable}; the others are kept, "
            "and the same command tries these again.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def log_end(log: Path, lines: int = 6) -> str:
    """The last lines of a log that the run itself has written, indented."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    said = [
        line for line in text.splitlines() if line.strip() and not line.startswith("# process ")
    ]
    return "\n".join(f"    {line}" for line in said[-lines:])


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP instead of dying of them between two lines."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
