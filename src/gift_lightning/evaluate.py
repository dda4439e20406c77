"""`gift evaluate RUN --backend lm_eval`: a finished run under lm-evaluation-harness."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gift_lightning.errors import CommandParser
from gift_lightning.harness import PACKAGES, Settings, evaluate, is_number, require
from gift_lightning.models import embedded_path
from gift_lightning.receipt import write_json
from gift_lightning.tables import Table, plus_minus


def main(words: Sequence[str]) -> None:
    """`gift evaluate`."""
    parser = CommandParser(
        "gift evaluate",
        description="Evaluate a model by lm-evaluation-harness. Its tasks load their data from the "
        "Hugging Face hub, unless it is cached or in local files.",
    )
    add = parser.add_argument
    add("model", metavar="RUN_OR_HF_FOLDER", help="a run's folder, its hf/, or a PEFT folder")
    add("--backend", required=True, choices=["lm_eval"])
    add("--tasks", required=True, type=_names, metavar="A,B", help="tasks, groups, tags of lm-eval")
    add("--num_fewshot", type=_at_least(0), metavar="N", help="by default each task's own")
    add("--limit", type=_limit, metavar="N", help="problems of each task, or a share below 1")
    add("--batch_size", type=_at_least(1), default=8, metavar="N")
    add("--apply_chat_template", action="store_true", help="for models trained on chats")
    add("--include_path", type=_folder, metavar="DIR", help="with YAML files of your own tasks")
    add("--gen_kwargs", type=_pairs, metavar="K=V,...", help="of tasks that generate")
    add("--output", metavar="FILE", help="by default lm_eval.json in the run, lm_eval-1.json, ...")
    given = vars(parser.parse_args(list(words)))
    del given["backend"]
    model, output = given.pop("model"), given.pop("output")
    folder, settings = hf_folder(model), Settings(**given)
    require()
    # Nothing is written beside the embedded models, which lie in the package.
    path = _reserve(Path(folder.name) if model.startswith("gift:") else folder, output)
    try:
        report = evaluate(folder, settings)
        write_json(path, report)
    except BaseException:
        path.unlink()
        raise
    _show(report)
    print(f"Written to {path}")


def hf_folder(given: str) -> Path:
    """The Hugging Face or PEFT folder of a run, or the folder itself if it is one.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(embedded_path(given))
    for candidate in (folder, folder / "hf"):
        if any((candidate / x).is_file() for x in ("config.json", "adapter_config.json")):
            return candidate
    if not folder.is_dir():
        raise ValueError(f"{given} is no folder: give a run's folder or a Hugging Face folder.")
    raise ValueError(
        f"{given} has no hf/ and is no Hugging Face folder: give the folder of a run that has "
        "ended (of an ablation, ARM/seed-N/STAGE)."
    )


def _show(report: Mapping[str, Any]) -> None:
    """The table, and under it what changes its numbers."""
    settings, tasks, versions = (report[x] for x in ("settings", "tasks", "versions"))
    table = Table("lm-eval", ["task", "metric", "filter", "value", "stderr"])
    for row in report["results"]:
        cells = (plus_minus(x) if is_number(x) else x for x in (row["value"], row["stderr"]))
        table.add(row["task"], row["metric"], row["filter"], *cells)
    table.show(Console())
    print(f"Model {report['model']}")
    for name, task in tasks.items():
        shots, asked = task["num_fewshot"], settings["num_fewshot"]
        kept = f" (its own, not {asked})" if asked not in (None, shots) else ""
        print(f"{name}: {shots} examples{kept}, {task['num_problems']} of {task['of']} problems")
    chat = "applied" if settings["apply_chat_template"] else "not applied"
    if settings["has_chat_template"] and not settings["apply_chat_template"]:
        chat += " (the tokenizer has one: --apply_chat_template)"
    print(
        f"Chat template {chat}; BOS {'added' if settings['add_bos_token'] else 'not added'}; "
        f"limit {settings['limit']}; batches of {settings['batch_size']} in {settings['dtype']} on "
        f"{settings['device']}; gen_kwargs {settings['gen_kwargs']}; "
        + ", ".join(f"{name} {versions[name]}" for name in PACKAGES[1:4])
    )
    if settings["limit"] is not None:
        print("Limited to the first problems of each task: not comparable with whole tasks.")
    for said in report["warnings"]:
        print(f"Mind: {said}", file=sys.stderr)


def _reserve(folder: Path, output: str | None) -> Path:
    """An empty file for the results, that was not there: a long evaluation must not end unsaved."""
    folder = folder.resolve()
    near = folder.parent / "lm_eval.json"
    if folder.name != "hf":
        near = folder.with_name(f"{folder.name}.lm_eval.json")
    path, number = Path(output) if output else near, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.open("x").close()
                return path
            except FileExistsError:
                if output:
                    raise ValueError(
                        f"--output: {output} is there already: name another file."
                    ) from None
                number += 1
                path = near.with_name(f"{near.stem}-{number}.json")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): set --output.") from error


# What a flag may say; the message stands behind "argument --flag: ".


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"give a whole number from {least}, not {text!r}")
        return int(text)

    return number


def _limit(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"give a whole number or a share below 1, not {text!r}")
    return int(value) if value >= 1 else value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(x.strip() for x in text.split(",") if x.strip()))
    if not names:
        raise argparse.ArgumentTypeError("name a task")
    return names


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return text


def _pairs(text: str) -> str:
    if not all(re.fullmatch(r"\w+=.+", x) for x in text.split(",")):
        raise argparse.ArgumentTypeError(f"give K=V,K=V, not {text!r}")
    return text
