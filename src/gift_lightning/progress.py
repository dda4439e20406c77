"""How an ablation shows where it stands: a live table on a terminal, else a line per event."""

import time
from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gift_lightning.experiment import Run


class Progress:
    """Counts runs by arm and stage. Give it every event, and `refresh` it now and then."""

    def __init__(self, console: Console, runs: Sequence[Run], waiting: Sequence[Run]) -> None:
        """
        Args:
            console: where it prints.
            runs: all of them.
            waiting: those that have not finished before.
        """
        self.console, self.runs = console, runs
        self._state = dict.fromkeys(runs, "done") | dict.fromkeys(waiting, "waiting")
        self._since: dict[Run, float] = {}
        self._seconds: dict[str, list[float]] = {}
        self._started = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=False)
        finished = len(runs) - len(waiting)
        console.print(f"{len(runs)} runs, {finished} of them finished before.")

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live.start()
            self.refresh()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.refresh()
            self._live.stop()

    def started(self, run: Run) -> None:
        self._state[run], self._since[run] = "running", time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"{run}: started", highlight=False)

    def done(self, run: Run, seconds: float) -> None:
        self._state[run] = "done"
        self._seconds.setdefault(run.name, []).append(seconds)
        count = f"{self._counts()['done']} of {len(self.runs)}"
        self.console.print(f"{run}: done in {seconds:.0f} s ({count})", highlight=False)

    def failed(self, run: Run, why: str) -> None:
        self._state[run] = "failed"
        self.console.print(Text(f"{run}: failed: {why}", style="red"))

    def skipped(self, run: Run) -> None:
        self._state[run] = "not started"

    def refresh(self) -> None:
        """Draws the table again; nothing where there is no terminal."""
        if self.console.is_terminal:
            self._live.update(Group(self._table(), Text(self._summary())), refresh=True)

    def _counts(self) -> Counter[str]:
        return Counter(self._state.values())

    def _table(self) -> Table:
        stages = [x.name for x in sorted({r.stage for r in self.runs}, key=lambda x: x.position)]
        table = Table("arm", *stages, box=SIMPLE)
        for arm in dict.fromkeys(run.arm for run in self.runs):
            table.add_row(arm or "(all)", *(self._cell(arm, stage) for stage in stages))
        return table

    def _cell(self, arm: str | None, stage: str) -> Text:
        mine = [run for run in self.runs if (run.arm, run.name) == (arm, stage)]
        counts = Counter(self._state[run] for run in mine)
        cell = Text(f"{counts['done']} of {len(mine)}" if mine else "–")
        if mine and counts["done"] == len(mine):
            cell.stylize("green")
        for run in mine:
            if self._state[run] == "running":
                cell.append(f"  {time.monotonic() - self._since[run]:.0f} s", style="cyan")
        for state in ("failed", "not started"):
            if counts[state]:
                cell.append(f"  {counts[state]} {state}", style="red")
        return cell

    def _summary(self) -> str:
        counts = self._counts()
        said = f"{counts['done']} of {len(self.runs)} done, {counts['running']} running"
        if self._seconds and (counts["waiting"] or counts["running"]):
            typical = {stage: sum(x) / len(x) for stage, x in self._seconds.items()}
            other = sum(typical.values()) / len(typical)
            work = sum(
                typical.get(run.name, other) / (2 if state == "running" else 1)
                for run, state in self._state.items()
                if state in ("waiting", "running")
            )
            said += f", about {_minutes(work / max(1, counts['running']))} left"
        return f"{said}, {_minutes(time.monotonic() - self._started)} so far"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
