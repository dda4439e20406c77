"""What finished runs have left behind: their metrics, by arm, seed and stage."""

import csv
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from gift_lightning.receipt import read_receipt

Key = tuple[str, int, str]
"""Arm, seed, stage."""

Curves = dict[str, list[tuple[int, float]]]
"""Metric → (step, value), in the order of logging."""

_STAGE = "run"  # of a run that no ablation has made


@dataclass(frozen=True)
class Result:
    """One finished run."""

    folder: Path
    curves: Curves
    before: dict[str, float]
    """Metric → value before the first step; a resumed run has none."""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def value(self, metric: str, first: bool = False) -> float | None:
        """The value at the end, or before training; None if there is no finite one."""
        value = (self.before if first else self._after).get(metric, math.nan)
        return value if math.isfinite(value) else None

    @cached_property
    def _after(self) -> dict[str, float]:
        """What was measured in training and not before it."""
        rest = {k: curve[k in self.before :] for k, curve in self.curves.items()}
        measured = {k: curve for k, curve in rest.items() if curve}
        trained = {k: x[-1][1] for k, x in measured.items() if not k.startswith("val/")}
        return trained | last_validation(measured)

    @property
    def start(self) -> int:
        """The first step that the log covers; above 0 if the run was resumed."""
        behind = _behind(self.curves)
        return 0 if behind is None else behind + 1


@dataclass
class Results:
    """Finished runs, and what there should be besides."""

    runs: dict[Key, Result] = field(default_factory=dict)
    arms: list[str] = field(default_factory=list)
    """In the order of the ablation's file, or of the command line."""
    stages: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """A sentence for each run that should be there and is not."""
    unfinished: set[Key] = field(default_factory=set)
    """Runs that an ablation has planned; they have their sentence."""

    def of(self, arm: str, stage: str) -> dict[int, Result]:
        """Results by seed."""
        return {k[1]: x for k, x in sorted(self.runs.items()) if (k[0], k[2]) == (arm, stage)}

    def present(self, stage: str) -> list[str]:
        """Arms with a finished run of a stage."""
        return [arm for arm in self.arms if self.of(arm, stage)]

    def stages_of(self, arm: str) -> list[str]:
        """Stages with a finished run of an arm."""
        return [stage for stage in self.stages if self.of(arm, stage)]

    def metrics(self, stage: str) -> list[str]:
        """All that any run of a stage has logged."""
        runs = [x for k, x in self.runs.items() if k[2] == stage]
        return sorted({name for run in runs for name in run.curves}, key=_natural)

    def add(self, key: Key, folder: Path, receipt: dict[str, Any] | None) -> None:
        if key in self.runs:
            raise ValueError(
                f"{folder} and {self.runs[key].folder} are both arm {key[0]}, seed {key[1]}: name "
                "one of them another arm (NAME=FOLDER) or drop it."
            )
        words = (receipt or {}).get("command", [])
        words = words[words.index("fit") :] if "fit" in words else words
        command = shlex.join(["gift", *words]) if words else ""
        versions = (receipt or {}).get("versions", {})
        self.runs[key] = Result(folder, *read_metrics(folder), command, versions)
        for name, names in ((key[0], self.arms), (key[2], self.stages)):
            if name not in names:
                names.append(name)


def read_results(given: Sequence[str]) -> Results:
    """The runs under ablations' output folders, and single runs as FOLDER or ARM=FOLDER.

    Raises:
        ValueError: a folder holds neither, or two runs claim the same arm, seed and stage.
    """
    results = Results()
    for said in given:
        name, equals, path = said.rpartition("=")
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{path} is no folder: give a run's, or an ablation's output.")
        if (folder / "plan.json").is_file():
            if equals:
                raise ValueError(f"{said}: an ablation names its own arms; drop {name}=.")
            _read_ablation(folder, results)
        else:
            _read_run(folder, name, results)
    if not results.runs:
        raise ValueError(f"no finished run to compare in {', '.join(given)}.")
    return results


def _read_ablation(folder: Path, results: Results) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    results.arms += [arm for arm in plan["arms"] if arm not in results.arms]
    results.stages += [stage for stage in plan["stages"] if stage not in results.stages]
    planned = [
        (arm, seed, stage)
        for arm, stages in plan["arms"].items()
        for stage in stages
        for seed in plan["seeds"]
    ]
    for place in sorted(folder.glob("*/seed-*/*/done.json")):
        receipt = read_receipt(place.parent)
        if receipt is not None:
            key = (receipt["arm"], receipt["seed"], receipt["stage"])
            if (place.parent / "metrics.csv").is_file():
                results.add(key, place.parent, receipt)
            else:
                results.missing.append(f"{_say(key)}: no metrics.csv (trainer.logger writes it)")
            planned = [other for other in planned if other != key]
    results.unfinished |= set(planned)
    seeds: dict[tuple[str, str], list[str]] = {}
    for arm, seed, stage in planned:
        seeds.setdefault((arm, stage), []).append(str(seed))
    results.missing += [
        f"{arm} {stage}: not finished for seed {', '.join(which)}"
        for (arm, stage), which in seeds.items()
    ]


def _read_run(folder: Path, name: str, results: Results) -> None:
    if not (folder / "metrics.csv").is_file():
        raise ValueError(
            f"{folder} is no run: it has no metrics.csv, which trainer.logger writes, nor the "
            "plan.json of an ablation."
        )
    receipt = read_receipt(folder)
    if receipt is not None and receipt["arm"] is not None:
        results.add((name or receipt["arm"], receipt["seed"], receipt["stage"]), folder, receipt)
        return
    config: Any = {}
    if (folder / "config.yaml").is_file():
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    seed = config.get("seed_everything", 0)
    key = (name or folder.resolve().name, seed if type(seed) is int else 0, _STAGE)
    if (folder / "hf").is_dir():
        results.add(key, folder, receipt)
    else:
        results.missing.append(f"{_say(key)}: {folder} has not finished (no hf/ in it)")


def read_metrics(folder: Path) -> tuple[Curves, dict[str, float]]:
    """What a run has logged, and of that the values before training."""
    curves: Curves = {}
    before: dict[str, float] = {}
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            # The first step is step 0 as well, but what is logged in training has an epoch.
            untrained = step == 0 and not row.get("epoch")
            for name, text in row.items():
                if text and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((step, float(text)))
                    if untrained:
                        before.setdefault(name, float(text))
    return {**curves, **_derived(curves)}, before


def last_validation(curves: Curves) -> dict[str, float]:
    """What the last validation has logged: not every validation needs to measure everything."""
    ends = {k: curve[-1] for k, curve in curves.items() if k.startswith("val/")}
    last = max((step for step, _ in ends.values()), default=0)
    return {k: value for k, (step, value) in ends.items() if step == last}


def _behind(curves: Curves) -> int | None:
    """The step behind which the log of training starts: -1, or where a run was resumed.

    Every n-th step is logged, so a log starts n steps before its first entry; None if a single
    entry does not say what n is.
    """
    if any(curve[0][0] == 0 for curve in curves.values()):
        return -1
    trained = (curve for name, curve in curves.items() if name.startswith("train/"))
    steps = sorted({step for curve in trained for step, _ in curve})
    if len(steps) < 2:
        return None
    return max(-1, steps[0] - max(b - a for a, b in pairwise(steps)))


def _derived(curves: Curves) -> Curves:
    """Of all steps that a run has logged, at the last one: the area under the KL over steps
    (trapezoids, nats × steps) and the number of steps at which μ changed much."""
    found = {}
    kl, large = (
        [point for point in curves.get(name, []) if math.isfinite(point[1])]
        for name in ("train/kl", "train/mix/large_changes")
    )
    if len(kl) > 1:
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(kl))
        found["train/kl_area"] = [(kl[-1][0], area)]
    behind = _behind(curves)
    if large and behind is not None:  # a share of the steps since the entry before
        steps = [b - a for a, b in pairwise([behind, *(step for step, _ in large)])]
        total = sum(x * n for (_, x), n in zip(large, steps, strict=True))
        found["train/mix/num_large_changes"] = [(large[-1][0], total)]
    return found


def _say(key: Key) -> str:
    return f"{key[0]} seed {key[1]} {key[2]}"


def _natural(name: str) -> list[int | str]:
    """pass@2 comes before pass@16."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]
