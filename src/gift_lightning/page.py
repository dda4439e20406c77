"""A comparison as one HTML page that needs nothing but itself."""

import base64
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from gift_lightning.comparison import LEGEND, Comparison
from gift_lightning.results import Results


def html(results: Results, comparison: Comparison, drawn: dict[str, bytes]) -> str:
    """The page: tables, pictures as data URIs, what is missing, the commands.

    Args:
        results: for the commands.
        comparison: for the tables.
        drawn: PNG files by name, each beginning with its stage.
    """
    commands: dict[str, str] = {}
    for (arm, _, stage), run in results.runs.items():
        if run.command:
            commands.setdefault(f"{arm}, {stage}", run.command)
    encoded = {name: base64.b64encode(png).decode() for name, png in drawn.items()}
    text = (files("gift_lightning") / "assets" / "compare.html").read_text(encoding="utf-8")
    plain, bold, _ = LEGEND.split("**")
    return (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(text)
        .render(
            comparison=comparison,
            pictures={
                stage: {k: v for k, v in encoded.items() if k.startswith(f"{stage}-")}
                for stage in comparison.tables
            },
            legend=(plain, bold),
            commands=commands,
        )
    )
