"""Statistics against hand-computed values, and tables and pages that drop nothing in silence."""

import base64
import csv
import importlib
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from gift_lightning.comparison import compare
from gift_lightning.intervals import difference, holm, mean, quantile, tail
from gift_lightning.plots import _bands, _curve, _solved, pictures
from gift_lightning.results import Results, read_results
from gift_lightning.tables import Table, plus_minus

# Statistics.


@pytest.mark.parametrize(
    ("dof", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_the_printed_tables(dof, t):
    assert quantile(dof) == pytest.approx(t, abs=6e-4)


def test_tails_are_the_closed_forms_of_whole_degrees_of_freedom():
    """Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    for t in (0.0, 0.3, 1.0, 2.5, 8.0, 60.0):
        angle = [math.atan(t / math.sqrt(dof)) for dof in (1, 2, 3, 4)]
        sin, cos = [*map(math.sin, angle)], [*map(math.cos, angle)]
        inside = [
            2 * angle[0] / math.pi,
            sin[1],
            2 / math.pi * (angle[2] + sin[2] * cos[2]),
            sin[3] * (1 + cos[3] ** 2 / 2),
        ]
        for dof, area in enumerate(inside, 1):
            assert tail(t, dof) == pytest.approx(1 - area, abs=1e-12)


def test_a_paired_difference_by_hand():
    """0.1 ... 0.5: mean 0.3, s = √0.025, error √0.005, t = √18, p = 0.01324 (4 dof)."""
    against = [0.2, 0.7, 0.4, 0.3, 0.1]
    found = difference([x + 0.1 * (i + 1) for i, x in enumerate(against)], against)
    assert (found.n, found.mean) == (5, pytest.approx(0.3))
    assert found.half == pytest.approx(2.776445 * math.sqrt(0.005), abs=1e-7)
    sin, cos2 = math.sqrt(18 / 22), 4 / 22
    assert found.p == pytest.approx(1 - sin * (1 + cos2 / 2), abs=1e-12)
    assert found.p == pytest.approx(0.01324, abs=5e-6)
    alone = mean([1.0, 2.0, 6.0])
    assert (alone.mean, alone.half) == (3.0, pytest.approx(4.302653 * math.sqrt(7 / 3), abs=1e-5))


def test_statistics_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 8, 40):
        a, b = rng.normal(size=n), rng.normal(0.4, 2, size=n)
        theirs = stats.ttest_rel(a, b)
        found = difference(a.tolist(), b.tolist())
        low, high = theirs.confidence_interval(0.95)
        assert found.p == pytest.approx(theirs.pvalue, abs=1e-12)
        assert found.mean - found.half == pytest.approx(low, abs=1e-9)
        assert found.mean + found.half == pytest.approx(high, abs=1e-9)


def test_intervals_cover_the_mean_95_times_of_100():
    rng = np.random.default_rng(1)
    found = [mean(x.tolist()) for x in rng.normal(3.0, 2.0, size=(4000, 5))]
    covered = np.mean([abs(x.mean - 3.0) < x.half for x in found])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))


def test_holm_by_hand():
    """0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 not below its predecessor."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    with_gap = holm([0.02, float("nan"), 0.03])
    assert with_gap[::2] == pytest.approx([0.04, 0.04]) and math.isnan(with_gap[1])
    assert holm([]) == []


def test_pairs_that_cannot_be_tested_are_not_called_real():
    assert difference([0.5, 0.6], [0.5, 0.6]).p == 1.0
    equal = difference([0.1 + 0.2, 0.4], [0.2, 0.3])  # both 0.1, but for the last bit
    assert math.isnan(equal.p) and equal.half == 0.0
    single = difference([0.5], [0.1])
    assert math.isnan(single.p) and math.isnan(single.half) and single.mean == 0.4


def test_numbers_are_readable():
    assert plus_minus(0.25, 0.0123) == "0.250 ± 0.012"
    assert plus_minus(-0.25, 0.0123, sign=True) == "−0.250 ± 0.012"
    assert plus_minus(-1e-9, 0.01, sign=True) == "+0.000 ± 0.010"
    assert plus_minus(1.234e-5, 2e-6) == "1.2e−05 ± 2.0e−06"
    assert plus_minus(0.5) == "0.500" and plus_minus(0.0, 0.0) == "0.000 ± 0.000"
    assert plus_minus(-469523.4, 156.8, sign=True) == "−469,523 ± 157"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_cut_to_fit_the_terminal(width, capsys):
    table = Table("rl", ["arm", "seeds", *(f"pass@{k}" for k in range(8))])
    table.add("gac_shuffled", "5", *(f"0.{k}11 ± 0.012, p = 0.{k}99" for k in range(8)))
    table.show(Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(lines).split()
    assert all(len(line) <= width for line in lines) and "…" not in " ".join(said)
    for k in range(8):
        assert all(said.count(x) == 1 for x in (f"pass@{k}", f"0.{k}11", f"0.{k}99"))
    assert (
        said.count("gac_shuffled") == said.count("arm") == (1 if width == 200 else said.count("rl"))
    )


# Runs.


def lay(folder: Path, rows: list[dict], receipt: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "hf").mkdir()
    names = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    if receipt is not None:
        words = ["python", "-m", "gift_lightning", "fit", "--model.target=GIFT"]
        done = {"inputs": {}, "command": words, "versions": {"torch": "2.13"}}
        (folder / "done.json").write_text(json.dumps({**done, **receipt}))
    return folder


SEEDS = {"sft": [0.20, 0.22, 0.21, 0.19, 0.23], "gift": [0.30, 0.31, 0.33, 0.28, 0.34]}


def lab(folder: Path, arms: dict[str, list[float]] = SEEDS, **more) -> Path:
    """An ablation's output: pass@1 as given, pass@4 twice that, entropy and reward curves."""
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            if math.isnan(value):
                continue
            rows = [{"step": 0, "val/in/pass@1": 0.1, "val/in/pass@4": 0.2, "val/in/nll": 1.0}]
            rows += [
                {"step": 9 + 10 * i, "train/reward": value + i / 10, "train/entropy": 1 / (i + 1)}
                for i in range(3)
            ]
            rows.append({"step": 29, "val/in/pass@1": value, "val/in/pass@4": 2 * value})
            rows[-1]["val/in/nll"] = 1 - value
            receipt = {"arm": arm, "seed": seed, "stage": "sft"}
            lay(folder / arm / f"seed-{seed}" / "sft", rows, receipt)
    plan = {"arms": {arm: ["sft"] for arm in arms}, "seeds": [0, 1, 2, 3, 4], "stages": ["sft"]}
    (folder / "plan.json").write_text(json.dumps({**plan, **more}))
    return folder


def rows(markdown: str) -> list[list[str]]:
    table = [x.strip("| ") for x in markdown.splitlines() if x.startswith("| ")]
    return [[cell.strip() for cell in x.split("|")] for x in table]


def test_a_table_by_hand(tmp_path):
    """gift − sft is 0.10, 0.09, 0.12, 0.09, 0.11: mean 0.102, s = 0.01304, t = 17.49 (4 dof)."""
    comparison = compare(read_results([str(lab(tmp_path / "lab"))]), "sft")
    assert not comparison.missing
    means, differences = comparison.tables["sft"]
    assert means.title == "sft, val/in, after training"
    assert rows(means.markdown()) == [
        ["arm", "seeds", "pass@1", "pass@4", "nll"],
        ["---", "---:", "---:", "---:", "---:"],
        ["(all arms before)", "", "0.100", "0.200", "1.000"],
        ["sft", "5", "0.210 ± 0.020", "0.420 ± 0.039", "0.790 ± 0.020"],
        ["gift", "5", "0.312 ± 0.030", "0.624 ± 0.059", "0.688 ± 0.030"],
    ]
    assert rows(differences.markdown())[2] == [
        "gift",
        "5",
        "**+0.102 ± 0.016, p < 0.001**",
        "**+0.204 ± 0.032, p < 0.001**",
        "**−0.102 ± 0.016, p < 0.001**",
    ]


def test_chance_is_not_called_real_and_holm_counts_the_arms(tmp_path):
    """t = 2.95 of 4 dof, p = 0.042 alone; with two arms that differ by chance, times three."""
    base, noise = [0.2] * 5, [0.01, -0.02, 0.015, -0.01, 0.004]
    near = [0.2 + x for x in (0.01, 0.03, 0.005, 0.04, 0.03)]
    other = [0.2 + x for x in noise]
    alone = compare(read_results([str(lab(tmp_path / "a", {"base": base, "near": near}))]), "base")
    cell = alone.tables["sft"][1].rows[0][2]
    exact = difference(near, base).p
    assert 0.01 < exact < 0.05 and cell.real and f"p = {exact:.3f}" in cell.text
    arms = {"base": base, "near": near, "x": other, "y": other[::-1]}
    three = compare(read_results([str(lab(tmp_path / "b", arms))]), "base")
    cells = [row[2] for row in three.tables["sft"][1].rows]
    assert f"p = {3 * exact:.3f}" in cells[0].text and not any(cell.real for cell in cells)


def test_the_start_has_its_table_where_arms_differ(tmp_path):
    folder = lab(tmp_path / "lab")
    first = folder / "gift" / "seed-0" / "sft" / "metrics.csv"
    first.write_text(first.read_text().replace(",0.1,0.2,1.0", ",0.15,0.2,1.0"))
    titles = [table.title for table in compare(read_results([str(folder)]), None).tables["sft"]]
    assert titles == [
        "sft, val/in, before training",
        "sft, val/in, before training: difference from sft",
        "sft, val/in, after training",
        "sft, val/in, after training: difference from sft",
    ]


def test_a_single_validation_is_the_end(tmp_path):
    rows = [{"step": 9, "val/in/pass@1": 0.3, "val/in/pass@4": 0.6}]
    results = read_results([str(lay(tmp_path / "one", rows)), str(lay(tmp_path / "two", rows))])
    tables = compare(results, None).tables["run"]
    assert [x.title for x in tables] == [
        "run, val/in, after training",
        "run, val/in, after training: difference from one",
    ]
    assert [cell.text for cell in tables[0].rows[0]] == ["one", "1", "0.300", "0.600"]
    assert list(pictures(results, "one", [])) == ["run-pass_at_k-after.png"]


def test_a_resumed_run_has_no_start(tmp_path):
    """Its first validation is one of training, its log of its own steps: 20 at a share of 0.1."""
    name, share = "val/in/nll", "train/mix/large_changes"
    whole = [{"step": 0, name: 3.0}, {"step": 999, name: 2.0}, {"step": 1999, name: 1.0}]
    resumed = [{"step": step, share: 0.1, "train/kl": 0.2} for step in (1009, 1019)]
    resumed += [{"step": 1499, name: 1.5}, {"step": 1999, name: 0.9}]
    given = [str(lay(tmp_path / key, x)) for key, x in (("a", whole), ("b", resumed))]
    results = read_results(given)
    curves = results.of("b", "run")[0].curves
    assert curves["train/mix/num_large_changes"] == [(1019, pytest.approx(2.0))]
    assert curves["train/kl_area"] == [(1019, pytest.approx(2.0))]
    comparison = compare(results, "a")
    before, between, after, _ = comparison.tables["run"]
    assert [[x.text for x in row] for row in before.rows] == [["a", "1", "3.000"], ["b", "1", "–"]]
    assert [x.text for x in between.rows[0]] == ["b", "1", "–"]
    assert [row[2].text for row in after.rows] == ["1.000", "0.900"]
    said = [x for x in comparison.missing if "one seed only" not in x]
    assert said == [
        "b run: no values before training for seed 0 (resumed, or trainer.num_sanity_val_steps is "
        "0)",
        "b run: seed 0 was resumed; its log starts at step 1000, and train/ metrics cover no step "
        "before",
    ]
    assert not any("before" in picture for picture in pictures(results, "a", []))
    alone = compare(read_results(given[1:]), None)
    assert [x.title for x in alone.tables["run"]] == ["run, val/in, after training"]
    assert "run: no run has values before training" in "\n".join(alone.missing)


def test_a_validation_after_the_first_step_is_none_before_training(tmp_path):
    """Both are step 0 of the log, and only what the Trainer logs in training has an epoch."""
    rows = [{"step": i, "epoch": 0, "val/in/nll": 2.0 - i} for i in range(2)]
    start = {"step": 0, "val/in/nll": 3.0}
    lay(tmp_path / "whole", [start, *rows])
    lay(tmp_path / "late", rows)
    results = read_results([str(tmp_path / name) for name in ("whole", "late")])
    found = [results.of(arm, "run")[0] for arm in results.arms]
    assert [x.value("val/in/nll", first=True) for x in found] == [3.0, None]
    assert [x.value("val/in/nll") for x in found] == [1.0, 1.0]
    assert [x.start for x in found] == [0, 0]


@pytest.mark.parametrize(
    ("steps", "start", "number"),
    [((9, 19, 29), 0, 3.0), ((4, 24), 0, 2.5), ((1, 2), 1, 0.2), ((1009,), 0, None)],
)
def test_where_a_log_starts(tmp_path, steps, start, number):
    """A log has every n-th step; of a single entry nobody knows for how many steps it stands."""
    rows = [{"step": step, "train/mix/large_changes": 0.1} for step in steps]
    run = read_results([str(lay(tmp_path / "run", rows))]).of("run", "run")[0]
    assert run.start == start
    found = run.value("train/mix/num_large_changes")
    assert found is None if number is None else found == pytest.approx(number)


def test_numbers_of_an_earlier_validation_are_not_those_of_the_end(tmp_path):
    rows = [{"step": 0, "val/in/pass@1": 0.1, "val/in/distinct": 1.0, "val/in/nll": 2.0}]
    rows += [{"step": 4, "val/in/pass@1": 0.3, "val/in/nll": 1.5}, {"step": 9, "val/in/nll": 1.0}]
    results = read_results([str(lay(tmp_path / "one", rows))])
    comparison = compare(results, None, ["val/*"])
    (table,) = comparison.tables["run"]
    assert [[x.text for x in row] for row in table.rows] == [
        ["(all arms before)", "", "1.000", "2.000", "0.100"],
        ["one", "1", "–", "1.000", "–"],
    ]
    for name in ("distinct", "pass@1"):
        assert (
            f"one run: val/in/{name} was not logged, or not as a finite number, for seed 0 by the "
            "last validation" in comparison.missing
        )


def test_what_is_missing_is_named(tmp_path):
    nan = float("nan")
    arms = {"base": [0.2] * 5, "gift": [0.3, nan, 0.4, nan, 0.35], "one": [0.1, *[nan] * 4]}
    folder = lab(tmp_path / "lab", {**arms, "none": [nan] * 5})
    lacking = folder / "gift" / "seed-2" / "sft" / "metrics.csv"
    lacking.write_text(lacking.read_text().replace("0.4,0.8,0.6", ",nan,0.6"))
    comparison = compare(read_results([str(folder)]), None)
    said = "\n".join(comparison.missing)
    for part in (
        "gift sft: not finished for seed 1, 3",
        "none sft: not finished for seed 0, 1, 2, 3, 4",
        "gift sft: val/in/pass@4 was not logged, or not as a finite number, for seed 2",
        "one sft: one seed only, so no interval",
    ):
        assert part in said, said
    means, differences = comparison.tables["sft"]
    gift, one = (x for x in rows(means.markdown()) if x[0] in ("gift", "one"))
    assert gift[1] == "3" and gift[3].endswith("(n=2)") and one[2] == "0.100"
    assert [x[:2] for x in rows(differences.markdown())[2:]] == [["gift", "3"], ["one", "1"]]
    assert "no test" in rows(differences.markdown())[3][2]
    assert all(f"- missing: {x}" in comparison.markdown() for x in comparison.missing)


def test_an_arm_without_the_stage_of_the_other_is_named(tmp_path):
    folder = lab(tmp_path / "lab", stages=["sft", "rl"])
    rows = [{"step": 0, "val/in/nll": 1.0}, {"step": 9, "val/in/nll": 0.5}]
    receipt = {"arm": "base", "seed": 0, "stage": "rl", "versions": {"torch": "2.14"}}
    lay(folder / "base" / "seed-0" / "rl", rows, receipt)
    comparison = compare(read_results([str(folder)]), "base")
    assert "differences in sft: base has no run there" in comparison.missing
    assert "equal versions: the runs differ in torch" in comparison.missing
    assert len(comparison.tables["sft"]) == 1


def test_single_runs_are_named_by_folder_or_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"step": 0, "val/in/nll": 1.0}, {"step": 9, "val/in/nll": 0.5}]
    for name, seed in (("a", 0), ("a-1", 1), ("b", 0)):
        run = lay(tmp_path / name, rows)
        (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed}))
    results = read_results(["a", "a=a-1", "b"])
    assert set(results.runs) == {("a", 0, "run"), ("a", 1, "run"), ("b", 0, "run")}
    with pytest.raises(ValueError, match="both arm a, seed 0"):
        read_results(["a", "a=b"])
    with pytest.raises(ValueError, match="gone is no folder"):
        read_results(["gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no run: it has no metrics\.csv"):
        read_results(["empty"])
    (tmp_path / "b" / "hf").rmdir()
    assert read_results(["a", "b"]).missing == ["b seed 0 run: b has not finished (no hf/ in it)"]
    with pytest.raises(ValueError, match="no finished run"):
        read_results(["b"])


def test_metrics_can_be_chosen_and_wrong_names_are_refused(tmp_path):
    results = read_results([str(lab(tmp_path / "lab"))])
    (means, _) = compare(results, "sft", ["train/*"]).tables["sft"]
    assert means.heads[2:] == ["entropy", "reward"]
    with pytest.raises(ValueError, match=r"--metric tain/\*: no run has logged it.*train/reward"):
        compare(results, "sft", ["tain/*"])
    with pytest.raises(ValueError, match="--against gem: no such arm; there are sft, gift"):
        compare(results, "gem")


# Pictures and the page.


def test_bands_are_means_over_the_points_that_all_seeds_have(tmp_path):
    folder = lab(tmp_path / "lab", {"gift": [0.2, 0.4]}, seeds=[0, 1])
    short = folder / "gift" / "seed-1" / "sft" / "metrics.csv"
    short.write_text("\n".join(x for x in short.read_text().splitlines() if x[:3] != "19,"))
    results = read_results([str(folder)])
    lines = {"gift": list(results.of("gift", "sft").values()), "none": []}
    bands = _bands(lines, lambda run: _curve(run, "train/reward"))
    assert set(bands) == {"gift"} and bands["gift"].x.tolist() == [9, 29]
    assert bands["gift"].mean == pytest.approx([0.3, 0.5])
    assert bands["gift"].half == pytest.approx([12.7062 * 0.1] * 2, rel=1e-5)
    metrics = {1: "val/in/pass@1", 4: "val/in/pass@4"}
    after = _bands(lines, lambda run: _solved(run, metrics, first=False))["gift"]
    assert after.mean == pytest.approx([0.3, 0.6]) and after.x.tolist() == [1, 4]


def drawn_lines(monkeypatch, results: Results, against: str) -> dict[str, list[str]]:
    """Legend entries of each picture."""
    from matplotlib.axes import Axes

    seen: list[list[str]] = []
    legend = Axes.legend

    def spy(self, handles, names, **more):
        seen.append(names)
        return legend(self, handles, names, **more)

    monkeypatch.setattr(Axes, "legend", spy)
    found = list(pictures(results, against, []))
    return dict(zip(found, seen, strict=True))


def test_pictures_show_every_arm(tmp_path, monkeypatch):
    missing: list[str] = []
    results = read_results([str(lab(tmp_path / "lab"))])
    drawn = pictures(results, "sft", missing)
    assert list(drawn) == [
        "sft-pass_at_k-after.png",
        "sft-reward.png",
        "sft-pass.png",
        "sft-entropy.png",
    ]
    assert all(png.startswith(b"\x89PNG") and len(png) > 10_000 for png in drawn.values())
    entries = drawn_lines(monkeypatch, results, "sft")
    assert all(names == ["sft", "gift"] for names in entries.values())
    for path in (tmp_path / "lab" / "gift").rglob("metrics.csv"):
        path.write_text(path.read_text().replace("train/entropy", "train/other"))
    pictures(read_results([str(tmp_path / "lab")]), "sft", missing)
    assert missing == ["sft: no train/entropy of gift to draw"]


def test_hybrids_have_their_own_pictures_and_numbers(tmp_path):
    """Area by trapezoids over uneven steps, without what is missing: 10 · 0.2 + 20 · 0.25; a half
    of ten steps and a tenth of twenty."""
    log = [{"step": 5 * i, "train/mix/mu": x} for i, x in enumerate([0.5, 0.44, 0.40, 0.60])]
    kl = {0: 0.1, 10: 0.3, 20: math.nan, 30: 0.2}
    log += [{"step": step, "train/kl": x} for step, x in kl.items()]
    log += [{"step": step, "train/mix/large_changes": x} for step, x in {9: 0.5, 29: 0.1}.items()]
    folders = {
        name: lay(tmp_path / name, [*more, {"step": 30, "val/in/pass@1": 0.3}])
        for name, more in (("gac", log), ("grpo", []))
    }
    results = read_results([f"{name}={folder}" for name, folder in folders.items()])
    curves = results.of("gac", "run")[0].curves
    assert curves["train/kl_area"] == [(30, pytest.approx(7.0))]
    assert curves["train/mix/num_large_changes"] == [(29, pytest.approx(7.0))]
    missing: list[str] = []
    assert "run-mix.png" in pictures(results, "grpo", missing)
    assert not any("mix" in sentence for sentence in missing)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


def gift(*words: str) -> None:
    from gift_lightning.cli import main

    main(["compare", *words])


def test_the_page_needs_nothing_but_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lab(Path("lab"))
    for path in Path("lab").rglob("metrics.csv"):
        path.write_text(path.read_text().replace("val/in/nll", "val/<script>/nll"))
    gift("lab", "--against", "sft")
    printed = capsys.readouterr().out
    assert "+0.102 ± 0.016" in printed and "Written to lab/compare" in printed
    text = Path("lab/compare/index.html").read_text()
    page = Page(text)
    files = sorted(Path("lab/compare").glob("*.png"))
    assert len(files) == 4 == page.tags.count("img")
    prefix = "data:image/png;base64,"
    assert all(link.startswith(prefix) for link in page.links)
    pictures = {base64.b64decode(link.removeprefix(prefix)) for link in page.links}
    assert pictures == {file.read_bytes() for file in files}
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in text.replace(page.text, "") and "url(" not in text
    for part in ("+0.102 ± 0.016, p < 0.001", "val/<script>", "gift fit --model.target=GIFT"):
        assert part in page.text
    assert str(tmp_path) not in text and sys.executable not in text
    assert "| gift | 5 | **+0.102 ± 0.016, p < 0.001**" in Path("lab/compare/table.md").read_text()


def test_without_matplotlib_there_are_tables_and_a_word_about_it(tmp_path, monkeypatch, capsys):
    importlib.import_module("torchmetrics")  # it would stop at half a matplotlib
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    gift(str(lab(tmp_path / "lab")), "--output", str(tmp_path / "out"))
    assert "pip install 'gift-lightning[plots]'" in capsys.readouterr().err
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"index.html", "table.md"}


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["gone"], 1, "gone is no folder"),
        (["lab", "--against", "x"], 1, "--against x: no such arm"),
        (["lab", "--output", "lab/plan.json"], 1, "set --output"),
        ([], 2, "RUN"),
        (["lab", "--what"], 2, "--what"),
    ],
)
def test_a_wrong_word_is_one_sentence(tmp_path, monkeypatch, capsys, words, code, part):
    monkeypatch.chdir(tmp_path)
    lab(Path("lab"))
    with pytest.raises(SystemExit) as stopped:
        gift(*words)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == code
    assert len(said) == 1 and said[0].startswith("gift: error: ") and part in said[0]
