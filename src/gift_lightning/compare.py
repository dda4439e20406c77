"""`gift compare RUN...`: tables, pictures and a page of finished runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gift_lightning.comparison import LEGEND, Comparison, compare
from gift_lightning.errors import CommandParser
from gift_lightning.page import html
from gift_lightning.plots import pictures
from gift_lightning.results import Results, read_results


def main(words: Sequence[str]) -> None:
    """`gift compare`."""
    parser = CommandParser(
        "gift compare",
        description="Compare arms over seeds: tables, paired tests, pictures, one HTML page.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder of `gift ablate`, a run's folder, or ARM=FOLDER to name the arm",
    )
    parser.add_argument(
        "--against", metavar="ARM", help="compare with it; by default the first in all stages"
    )
    parser.add_argument("--output", metavar="DIR", help="by default compare/ in the first RUN")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a column of metrics.csv, * allowed; by default pass@k and nll of every set",
    )
    given = parser.parse_args(list(words))
    results = read_results(given.runs)
    comparison = compare(results, given.against, given.metric)
    console = Console()
    for table in (x for tables in comparison.tables.values() for x in tables):
        table.show(console)
    console.print(LEGEND.replace("**", ""), highlight=False)
    folder = Path(given.output or Path(given.runs[0].rpartition("=")[2]) / "compare")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = _draw(folder, results, comparison)
        (folder / "table.md").write_text(comparison.markdown(), encoding="utf-8")
        page = html(results, comparison, drawn)
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}; set --output.") from error
    for sentence in comparison.missing:
        console.print(f"Missing: {sentence}.", style="yellow", highlight=False, markup=False)
    print(f"Written to {folder}: index.html, table.md, {len(drawn)} pictures")


def _draw(folder: Path, results: Results, comparison: Comparison) -> dict[str, bytes]:
    """Pictures by file name, written to the folder; none, and a word about it, without plots."""
    try:
        drawn = pictures(results, comparison.against, comparison.missing)
    except ImportError:
        print(
            "gift: no pictures without matplotlib: pip install 'gift-lightning[plots]'.",
            file=sys.stderr,
        )
        return {}
    for name, content in drawn.items():
        (folder / name).write_bytes(content)
    return drawn
