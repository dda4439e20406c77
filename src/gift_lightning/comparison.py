"""Arms compared over seeds: means, paired differences, and what is missing for them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from gift_lightning.intervals import LEVEL, difference, holm, mean
from gift_lightning.results import Result, Results
from gift_lightning.tables import Cell, Table, chance, plus_minus

Moment = Literal["before", "after"]

_PASS, _NLL = re.compile(r"val/(.+/)?pass@\d+"), re.compile(r"val/(.+/)?nll")
LEGEND = (
    "Mean ± half-width of its 95 % interval (Student's t over seeds). Differences are paired by "
    "seed, their intervals not corrected; p is of a paired t test, corrected after Holm over the "
    "arms of a column. **Bold: p < 0.05.**"
)


@dataclass
class Comparison:
    """All tables of all stages, and what is missing in them."""

    against: str
    tables: dict[str, list[Table]] = field(default_factory=dict)
    """By stage."""
    missing: list[str] = field(default_factory=list)
    """Sentences: runs, metrics and seeds that should be there and are not."""

    def markdown(self) -> str:
        """All tables, for a RESULTS.md."""
        parts = [x.markdown() for tables in self.tables.values() for x in tables] + [LEGEND]
        if self.missing:
            parts.append("\n".join(f"- missing: {sentence}" for sentence in self.missing))
        return "\n\n".join(parts) + "\n"


def compare(results: Results, against: str | None, patterns: Sequence[str] = ()) -> Comparison:
    """Compares all arms of every stage.

    Args:
        results: of all runs.
        against: the arm that the others are compared with; by default the first in all stages.
        patterns: of the metrics' names; by default pass@k and nll of every validation set.

    Raises:
        ValueError: if there is no such arm or metric.
    """
    if against is None:
        # The first of those with the most stages: max keeps the first of equals.
        against = max(results.arms, key=lambda arm: len(results.stages_of(arm)))
    if against not in results.arms:
        raise ValueError(f"--against {against}: no such arm; there are {', '.join(results.arms)}.")
    every = {name for stage in results.stages for name in results.metrics(stage)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            names = ", ".join(sorted(every))
            raise ValueError(f"--metric {pattern}: no run has logged it; there are {names}.")
    comparison = Comparison(against, missing=list(results.missing))
    for stage in results.stages:
        if results.present(stage):
            comparison.tables[stage] = _Stage(results, stage, patterns).tables(comparison)
    versions = {tuple(run.versions.items()) for run in results.runs.values() if run.versions}
    if len(versions) > 1:
        changed = sorted({item[0] for a in versions for b in versions for item in set(a) - set(b)})
        comparison.missing.append(f"equal versions: the runs differ in {', '.join(changed)}")
    return comparison


class _Stage:
    """The tables of one stage."""

    def __init__(self, results: Results, stage: str, patterns: Sequence[str]) -> None:
        self.results, self.stage = results, stage
        self.arms = results.present(stage)
        every = results.metrics(stage)
        self.metrics = [x for x in every if any(fnmatchcase(x, y) for y in patterns)]
        if not patterns:
            self.metrics = [x for x in every if _PASS.fullmatch(x)]
            self.metrics += [x for x in every if _NLL.fullmatch(x)]

    def tables(self, comparison: Comparison) -> list[Table]:
        self._note_missing(comparison)
        against = comparison.against
        if against not in self.arms:
            comparison.missing.append(f"differences in {self.stage}: {against} has no run there")
        sets: dict[str, list[str]] = {}
        for name in self.metrics:
            sets.setdefault(name.rpartition("/")[0], []).append(name)
        tables = []
        for name, metrics in sets.items():
            moments: list[Moment] = ["before", "after"]
            if self._start(metrics) is not None or not self._have_start(metrics):
                moments = ["after"]
            for moment in moments:
                tables.append(self._means(name, metrics, moment))
                if against in self.arms and len(self.arms) > 1:
                    tables.append(self._differences(name, metrics, moment, against))
        return tables

    def values(self, arm: str, metric: str, moment: Moment = "after") -> dict[int, float]:
        """By seed; the values before are those of the validation at step 0."""
        found = {}
        for seed, result in self.results.of(arm, self.stage).items():
            value = result.value(metric, first=moment == "before")
            if value is not None:
                found[seed] = value
        return found

    def _have_start(self, metrics: list[str]) -> bool:
        """Whether anything was validated before training."""
        return any(name in run.before for run in self._runs() for name in metrics)

    def _runs(self) -> list[Result]:
        return [x for arm in self.arms for x in self.results.of(arm, self.stage).values()]

    def _start(self, metrics: list[str]) -> list[float] | None:
        """The values before training if all runs share them, else None."""
        if not all(run.before for run in self._runs()):
            return None
        shared = []
        for name in metrics:
            values = [x for arm in self.arms for x in self.values(arm, name, "before").values()]
            if not values or max(values) - min(values) > 1e-9 * max(1.0, abs(max(values))):
                return None
            shared.append(values[0])
        return shared

    def _title(self, name: str, moment: Moment) -> str:
        return f"{self.stage}, {name or 'all'}, {moment} training"

    def _means(self, name: str, metrics: list[str], moment: Moment) -> Table:
        heads = [metric.rpartition("/")[2] for metric in metrics]
        table = Table(self._title(name, moment), ["arm", "seeds", *heads])
        if moment == "after" and (start := self._start(metrics)) is not None:
            table.add("(all arms before)", "", *(plus_minus(x) for x in start))
        for arm in self.arms:
            seeds = len(self.results.of(arm, self.stage))
            cells = []
            for metric in metrics:
                values = list(self.values(arm, metric, moment).values())
                found = mean(values) if values else None
                fewer = f" (n={len(values)})" if len(values) != seeds else ""
                cells.append(plus_minus(found.mean, found.half) + fewer if found else "–")
            table.add(arm, str(seeds), *cells)
        return table

    def _differences(self, name: str, metrics: list[str], moment: Moment, against: str) -> Table:
        heads = [metric.rpartition("/")[2] for metric in metrics]
        title = f"{self._title(name, moment)}: difference from {against}"
        table = Table(title, ["arm", "pairs", *heads])
        others = [arm for arm in self.arms if arm != against]
        columns: list[list[Cell]] = []
        here = set(self.results.of(against, self.stage))
        pairs = {arm: len(here & set(self.results.of(arm, self.stage))) for arm in others}
        for metric in metrics:
            base = self.values(against, metric, moment)
            found = []
            for arm in others:
                own = self.values(arm, metric, moment)
                common = sorted(set(own) & set(base))
                pairs_of = [own[s] for s in common], [base[s] for s in common]
                found.append(difference(*pairs_of) if common else None)
            adjusted = holm([x.p if x else float("nan") for x in found])
            cells = []
            for arm, x, p in zip(others, found, adjusted, strict=True):
                if x is None:
                    cells.append(Cell("–"))
                    continue
                fewer = f" (n={x.n})" if x.n != pairs[arm] else ""
                text = f"{plus_minus(x.mean, x.half, sign=True)}, {chance(p)}{fewer}"
                cells.append(Cell(text, real=p < 1 - LEVEL))
            columns.append(cells)
        for i, arm in enumerate(others):
            table.add(arm, str(pairs[arm]), *(column[i] for column in columns))
        return table

    def _note_missing(self, comparison: Comparison) -> None:
        every = {seed for arm in self.results.arms for seed in self.results.of(arm, self.stage)}
        for arm in self.arms:
            have = set(self.results.of(arm, self.stage))
            for metric in self.metrics:
                end = " by the last validation" if metric.startswith("val/") else ""
                if lacking := sorted(have - set(self.values(arm, metric))):
                    comparison.missing.append(
                        f"{arm} {self.stage}: {metric} was not logged, or not as a finite number, "
                        f"for seed {_list(lacking)}{end}"
                    )
            for seed in sorted(every - have):
                if (arm, seed, self.stage) not in self.results.unfinished:
                    comparison.missing.append(
                        f"{arm} {self.stage}: no run of seed {seed}, which other arms have"
                    )
            if len(have) == 1:
                comparison.missing.append(f"{arm} {self.stage}: one seed only, so no interval")
        if not self.metrics:
            comparison.missing.append(f"{self.stage}: none of the metrics was logged")
        self._note_starts(comparison)

    def _note_starts(self, comparison: Comparison) -> None:
        """Runs that were not validated before training, or resumed, or both."""
        why = "resumed, or trainer.num_sanity_val_steps is 0"
        validated = any(name.startswith("val/") for name in self.metrics)
        if validated and not any(run.before for run in self._runs()):
            comparison.missing.append(f"{self.stage}: no run has values before training ({why})")
            validated = False
        for arm in self.arms:
            runs = self.results.of(arm, self.stage)
            lacking = [seed for seed, run in runs.items() if not run.before]
            if validated and lacking:
                comparison.missing.append(
                    f"{arm} {self.stage}: no values before training for seed {_list(lacking)} "
                    f"({why})"
                )
            for seed, run in runs.items():
                if run.start > 0:
                    comparison.missing.append(
                        f"{arm} {self.stage}: seed {seed} was resumed; its log starts at step "
                        f"{run.start}, and train/ metrics cover no step before"
                    )


def _list(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))
