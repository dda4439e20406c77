"""Pictures of a comparison: pass@k, learning curves, entropy and divergence, with seed bands."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill
from typing import Any

import numpy as np

from gift_lightning.intervals import mean
from gift_lightning.results import Result, Results

_PASS = re.compile(r"val/(?:(.+)/)?pass@(\d+)")
_CURVES = {
    "reward": ("reward during training", r"train/reward"),
    "pass": ("pass@{k} on validation problems", r"val/(.+/)?pass@{k}"),
    "entropy": ("entropy of the policy (nats per token)", r"(train|val(/.+)?)/entropy"),
    "mix": (
        "weight of the demonstrations, and what it is made of",
        r"train/mix/(mu|mu_raw|prior|alpha|sigma_r2|sigma_s2|delta2)",
    ),
    "branches": ("loss and gradient norm by branch", r"train/(loss|grad_norm)/.+"),
    "kl": ("divergence from the reference (nats)", r"(train|val(/.+)?)/kl(_reference)?"),
}
_OF_HYBRIDS = {"mix", "branches"}  # other arms lack them by nature
_PER_ROW = 5  # arms whose bands can be told apart in one panel, besides the one in black


@dataclass(frozen=True)
class Band:
    """A mean over seeds with its 95 % interval, NaN for one seed; all [points]."""

    x: np.ndarray
    mean: np.ndarray
    half: np.ndarray


Panel = dict[str, Band]
"""By arm."""


def pictures(results: Results, against: str, missing: list[str]) -> dict[str, bytes]:
    """PNG files by name; `missing` gets a sentence for each arm that a panel lacks.

    Raises:
        ImportError: without matplotlib.
    """
    drawn = {}
    others = [arm for arm in results.arms if arm != against]
    for stage in results.stages:
        arms = results.present(stage)
        lines = {arm: list(results.of(arm, stage).values()) for arm in arms}
        names = results.metrics(stage)
        for moment in ("before", "after"):
            if panels := _coverage(lines, names, first=moment == "before"):
                title = f"{stage}: pass@k {moment} training"
                file = f"{stage}-pass_at_k-{moment}.png"
                drawn[file] = _draw(title, "k", panels, others, against)
        smallest = min((int(x[2]) for name in names if (x := _PASS.fullmatch(name))), default=1)
        for kind, (title, pattern) in _CURVES.items():
            pattern = pattern.replace("{k}", str(smallest))
            panels = {}
            for name in (x for x in names if re.fullmatch(pattern, x)):
                bands = _bands(lines, partial(_curve, name=name))
                if any(len(band.x) > 1 for band in bands.values()):
                    panels[name] = bands
                    lacking = [arm for arm in arms if arm not in bands]
                    if lacking and kind not in _OF_HYBRIDS:
                        missing.append(f"{stage}: no {name} of {', '.join(lacking)} to draw")
            if panels:
                title = f"{stage}: {title.replace('{k}', str(smallest))}"
                file = f"{stage}-{kind}.png"
                drawn[file] = _draw(title, "optimizer step", panels, others, against)
    return drawn


def _coverage(
    lines: dict[str, list[Result]], names: Sequence[str], first: bool
) -> dict[str, Panel]:
    """pass@k over k for every set; nothing for a start that all arms share."""
    sets: dict[str, dict[int, str]] = {}
    for name in names:
        if found := _PASS.fullmatch(name):
            sets.setdefault(found[1] or "all", {})[int(found[2])] = name
    panels = {}
    for name, metrics in sets.items():
        bands = _bands(lines, partial(_solved, metrics=metrics, first=first))
        shared = len({tuple(band.mean) for band in bands.values()}) == 1
        if len(metrics) > 1 and bands and not (first and shared):
            panels[name] = bands
    return panels


def _solved(run: Result, metrics: dict[int, str], first: bool) -> dict[float, float]:
    values = {k: run.value(metric, first) for k, metric in metrics.items()}
    return {k: x for k, x in values.items() if x is not None}


def _curve(run: Result, name: str) -> dict[float, float]:
    return {step: x for step, x in run.curves.get(name, []) if np.isfinite(x)}


def _bands(
    lines: dict[str, list[Result]], points: Callable[[Result], dict[float, float]]
) -> dict[str, Band]:
    """By arm, at the places that all its seeds have; no band for an arm without any."""
    bands = {}
    for arm, runs in lines.items():
        curves = [found for run in runs if (found := points(run))]
        if not curves:
            continue
        xs = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [mean([curve[x] for curve in curves]) for x in xs]
        halves = np.array([m.half for m in means])
        bands[arm] = Band(np.array(xs), np.array([m.mean for m in means]), halves)
    return {arm: band for arm, band in bands.items() if len(band.x)}


def _draw(
    title: str, x_label: str, panels: dict[str, Panel], others: Sequence[str], against: str
) -> bytes:
    """A column for each panel; a row for every few arms, all with `against` in black. PNG."""
    from matplotlib.figure import Figure  # the only place that needs it

    per_row = -(-len(others) // max(1, -(-len(others) // _PER_ROW))) or 1  # evenly filled rows
    chunks = [others[i : i + per_row] for i in range(0, len(others), per_row)]
    seen = {arm for panel in panels.values() for arm in panel}
    rows = [chunk for chunk in chunks if seen & set(chunk)] or [[]]
    size = (1.8 + 3.2 * len(panels), 0.8 + 2.6 * len(rows))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    share: Any = "all" if x_label == "k" else "col"
    grid: Any = figure.subplots(len(rows), len(panels), squeeze=False, sharex="col", sharey=share)
    for axes_of_row, chunk in zip(grid, rows, strict=True):
        shown: dict[str, Any] = {}
        for axes, (name, panel) in zip(axes_of_row, panels.items(), strict=True):
            for arm in (against, *chunk):
                if arm in panel:
                    color = "black" if arm == against else f"C{chunk.index(arm)}"
                    shown[arm] = _line(axes, panel[arm], color)
            axes.set_title(name, fontsize=10)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        names = [arm for arm in (against, *chunk) if arm in shown]
        axes_of_row[-1].legend(
            [shown[arm] for arm in names], names, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    bands = [band for panel in panels.values() for band in panel.values()]
    ticks = sorted({int(x) for band in bands for x in band.x})
    for axes in grid.flat:
        if x_label == "k":
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(k) for k in ticks])
            axes.set_ylim(0, min(1.02, axes.get_ylim()[1]))
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
            if all((band.mean >= 0).all() for band in bands):  # only the band reaches below 0
                axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    banded = any(np.isfinite(band.half).any() for band in bands)
    title += "; bands: 95 % interval over seeds" if banded else ""
    figure.suptitle(fill(title, int(size[0] * 11)), fontsize=11)  # characters of that size
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _line(axes: Any, band: Band, color: str) -> Any:
    marker = "o" if len(band.x) <= 12 else None
    (line,) = axes.plot(band.x, band.mean, marker=marker, markersize=3, linewidth=1.5, color=color)
    if np.isfinite(band.half).any():
        low, high = band.mean - band.half, band.mean + band.half
        axes.fill_between(band.x, low, high, color=color, alpha=0.15, linewidth=0)
    return line
