"""The model card of an export: how the model was made, what it scored, what to cite."""

import math
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from gift_lightning.results import last_validation, read_metrics

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_PACKAGES = ("gift-lightning", "torch", "transformers", "peft")


def model_card(
    run: Path, checkpoint: str, about: str, adapters: bool, merged_into: str | None = None
) -> str:
    """Markdown with the hub's YAML header, from what lies in a run's folder.

    Args:
        run: the folder.
        checkpoint: its file's name.
        about: the method.
        adapters: whether they are exported as such.
        merged_into: which form of a quantised base they were merged into.
    """
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    factory = config["model"]["init_args"]["model"]
    base = (factory.get("init_args") or {}).get("pretrained")
    header: dict[str, Any] = {"library_name": "peft" if adapters else "transformers"}
    header |= {"pipeline_tag": "text-generation", "tags": ["gift-lightning"]}
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        header["base_model"] = base
    made = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    rows = [f"| {name} | {value:.4g} |" for name, value in _last_validation(run).items()]
    papers = [f"- arXiv [{x}](https://arxiv.org/abs/{x})" for x in _papers(config["model"])]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {run.name}",
        f"{about}, from `{base}`." if base else f"{about}.",
        f"Exported from `{checkpoint}` by gift-lightning ({made}).",
        *(
            [f"Adapters of a 4-bit base, merged into its {merged_into} weights."]
            * bool(merged_into)
        ),
        "## Data",
        f"```yaml\n{yaml.safe_dump(config.get('data'), sort_keys=False)}```",
    ]
    if rows:
        parts += [
            "## Last validation of the run",
            "\n".join(["| metric | value |", "|---|---|", *rows]),
        ]
    if papers:
        parts += ["## To cite", "\n".join(papers)]
    parts += ["## Whole config", f"```yaml\n{text}```"]
    return "\n\n".join(parts) + "\n"


def _last_validation(run: Path) -> dict[str, float]:
    if not (run / "metrics.csv").is_file():
        return {}
    values = last_validation(read_metrics(run)[0])
    return {k: x for k, x in values.items() if k[-3:] != "_se" and math.isfinite(x)}


def _papers(node: Any) -> list[str]:
    """The papers that the classes of a config name as their source."""
    found: list[str] = []
    if isinstance(node, dict):
        where, _, name = str(node.get("class_path", "")).rpartition(".")
        if where.startswith("gift_lightning."):
            found += _ARXIV.findall(getattr(import_module(where), name).__doc__ or "")
        for value in node.values():
            found += _papers(value)
    elif isinstance(node, list):
        for value in node:
            found += _papers(value)
    return list(dict.fromkeys(found))
