"""Tables that say the same on a terminal, in Markdown and in HTML."""

import math
from dataclasses import dataclass, field

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Cell:
    text: str
    real: bool = False
    """A difference that is not explained by chance: shown in bold."""


@dataclass
class Table:
    title: str
    heads: list[str]
    rows: list[list[Cell]] = field(default_factory=list)

    def add(self, *cells: str | Cell) -> None:
        assert len(cells) == len(self.heads)
        self.rows.append([x if isinstance(x, Cell) else Cell(x) for x in cells])

    def show(self, console: Console) -> None:
        """Print it; columns that do not fit go below, again beside the first."""
        title, start = self.title, 1
        while start < len(self.heads):
            stop = len(self.heads)
            while True:
                part = self._part(title, [0, *range(start, stop)])
                wide = Measurement.get(console, console.options.update(width=10_000), part).maximum
                if wide <= console.width or stop == start + 1:
                    break
                stop -= 1
            console.print(part)
            title, start = f"{self.title} (continued)", stop

    def _part(self, title: str, columns: list[int]) -> RichTable:
        table = RichTable(title=Text(title), box=SIMPLE, title_justify="left")
        for i in columns:
            table.add_column(Text(self.heads[i]), justify="right" if i else "left")
        for row in self.rows:
            lines = ((row[i].text.replace(", ", "\n"), row[i].real) for i in columns)
            table.add_row(*(Text(text, "bold green" if real else "") for text, real in lines))
        return table

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.heads) - 1)]
        rows = [[f"**{x.text}**" if x.real else x.text for x in row] for row in self.rows]
        lines = [[x.replace("|", "\\|") for x in row] for row in [self.heads, rule, *rows]]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines)


def plus_minus(mean: float, half: float = math.nan, sign: bool = False) -> str:
    """A mean with its interval's half-width (NaN: none): three decimals, whole, or two digits."""
    largest = max(abs(mean), 0.0 if math.isnan(half) else half)
    form = ".1e" if 0 < largest < 0.0005 else ".3f" if largest < 10_000 else ",.0f"
    if form == ".3f":
        mean = round(mean, 3) + 0.0  # no -0.000
    text = f"{mean:{'+' if sign else ''}{form}}" + ("" if math.isnan(half) else f" ± {half:{form}}")
    return text.replace("-", "−")


def chance(p: float) -> str:
    return "no test" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
