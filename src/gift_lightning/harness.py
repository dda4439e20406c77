"""A model under lm-evaluation-harness (lm-eval), with everything that its numbers depend on."""

import difflib
import hashlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gift_lightning.models import causal_lm, load_tokenizer
from gift_lightning.readers import first_line

PACKAGES = ("gift-lightning", "lm_eval", "torch", "transformers", "datasets", "peft")
_SEEDS = {f"{name}_random_seed": 1234 for name in ("numpy", "torch", "fewshot")}  # lm-eval's own
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FILES = ("json", "csv", "parquet", "text", "arrow")  # loaders of `datasets` for local files
# Graders of lm-eval that run a model's text as code (sympy's parse_expr) and are not marked.
_UNMARKED = ("tasks/score/math",)


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on, beside the model and the versions."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | float | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    include_path: str | None = None
    gen_kwargs: str | None = None


def evaluate(folder: Path, settings: Settings) -> dict[str, Any]:
    """What lm-eval measures, with the settings behind it, as JSON values.

    Raises:
        ValueError: lm-eval is missing or refuses; a task is unknown, runs model text as code or
            cannot be loaded; the model has no chat template or too few positions.
    """
    simple_evaluate, hf_lm, _ = require()
    with _warnings() as said:
        manager, tasks, roots = _load(settings)
    tokenizer, chat = load_tokenizer(str(folder)), settings.apply_chat_template
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--apply_chat_template: {folder} has no chat template: leave it out.")
    adds_bos = adds_bos_token(tokenizer, chat)
    model = causal_lm(str(folder), dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    with _warnings():  # that it is given a model
        lm = hf_lm(
            model, tokenizer=tokenizer, batch_size=settings.batch_size, add_bos_token=adds_bos
        )
    _check(tasks, settings, lm.max_length)
    with _warnings() as later:
        try:
            found = simple_evaluate(
                model=lm,
                tasks=roots,
                task_manager=manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                batch_size=settings.batch_size,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                gen_kwargs=settings.gen_kwargs,
                log_samples=False,
                confirm_run_unsafe_code=False,
                **_SEEDS,
            )
        except (ValueError, AssertionError) as error:
            print(file=sys.stderr)  # behind a progress bar
            raise ValueError(f"lm-eval refuses: {first_line(error)}.") from error
    template = str(tokenizer.chat_template or "").encode()
    return {
        "model": str(folder),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "results": _rows(found["results"]),
        "tasks": {name: _about(task, found) for name, task in tasks.items()},
        "settings": {
            **asdict(settings),
            "has_chat_template": bool(template),
            "chat_template_sha256": hashlib.sha256(template).hexdigest() if chat else None,
            "fewshot_as_multiturn": chat,
            "add_bos_token": adds_bos,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "max_length": lm.max_length,
            "generation_config": model.generation_config.to_diff_dict(),
            "seeds": _SEEDS,
        },
        "versions": {"python": sys.version.split()[0], **{x: version(x) for x in PACKAGES}},
        "warnings": _distinct([*said, *later, *_mind(tasks, adds_bos)]),
        "configs": found["configs"],
    }


def adds_bos_token(tokenizer: PreTrainedTokenizerBase, chat: bool) -> bool:
    """Whether lm-eval shall let the tokenizer put BOS before a prompt, as in training.

    A chat template writes its own. A tokenizer that appends a token must not: the split of prompt
    and answer would be off by it.

    Raises:
        ValueError: the tokenizer puts tokens on both ends.
    """
    full, bare = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (True, False))
    if chat or full[: len(bare)] == bare:
        return False
    if full[-len(bare) :] != bare:
        raise ValueError(
            f"the tokenizer ends every text with {tokenizer.decode(full[-1:])!r}, which lm-eval "
            "would take for a part of answers: set add_eos_token to false in tokenizer_config.json."
        )
    return True


def require() -> tuple[Callable[..., Any], Any, Any]:
    """`simple_evaluate`, `HFLM` and `TaskManager`; model text is never run, nor code of the hub.

    Raises:
        ValueError: lm-eval is missing or too old.
    """
    os.environ["HF_ALLOW_CODE_EVAL"] = "0"
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")  # the hub's metrics are scripts
    try:
        import datasets
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"--backend lm_eval needs lm-evaluation-harness ({first_line(error)}): "
            "pip install 'gift-lightning[lm_eval]'."
        ) from None
    # Otherwise loading a file, a local one too, is counted at a server.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if not hasattr(TaskManager, "load"):
        raise ValueError(
            f"lm-eval {version('lm_eval')} is too old: pip install -U 'gift-lightning[lm_eval]'."
        )
    return simple_evaluate, HFLM, TaskManager


def _load(settings: Settings) -> tuple[Any, dict[str, Any], list[Any]]:
    """lm-eval's task manager, all tasks by name, and what lm-eval is to run: tasks and groups."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its retries
    _, _, manager_class = require()
    own = settings.include_path
    manager = manager_class(include_path=own, include_defaults=False) if own else manager_class()
    leaves = _leaves(manager.task_index, settings.tasks)
    if own and None in leaves.values():  # not among the user's: lm-eval's 14,000 take seconds
        manager = manager_class(include_path=own)
        leaves = _leaves(manager.task_index, settings.tasks)
    for name, config in leaves.items():
        if config is None:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks`."
            raise ValueError(f"--tasks: lm-eval has no task {name!r}, or cannot read it: {hint}")
        if config.get("unsafe_code") or config["folder"].endswith(_UNMARKED):
            raise _runs_code(name)
    if remote := sorted({_source(config) for config in leaves.values() if config} - {""}):
        print(f"lm-eval loads from the Hugging Face hub, unless cached: {', '.join(remote)}")
    try:
        loaded = manager.load(list(settings.tasks))
    except Exception as error:  # of a task's own code, too
        way = "look at its YAML file and at the data files that it names"
        if isinstance(error, ImportError):
            way = "install what it imports"
        elif remote:
            way = (
                "go online once, or point HF_HOME to a cache with the data of the Hugging Face hub"
            )
        names = ", ".join(settings.tasks)
        raise ValueError(
            f"--tasks: lm-eval cannot load {names} ({first_line(error)}): {way}."
        ) from error
    groups = loaded.get("groups", {})
    children = {x for names in loaded.get("group_map", {}).values() for x in names}
    roots = [x for name, x in (groups | loaded["tasks"]).items() if name not in children]
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise _runs_code(name)
        own_scores = task.OUTPUT_TYPE != "generate_until" or task.get_config("process_results")
        if not own_scores and None in getattr(task, "_metric_fn_list", {}).values():
            raise ValueError(
                f"--tasks: {name} needs a metric that is a script on the Hugging Face hub: set "
                "HF_EVALUATE_OFFLINE=0 to run it."
            )
    return manager, loaded["tasks"], roots


def _runs_code(name: str) -> ValueError:
    return ValueError(
        f"--tasks: {name} runs what the model writes as code, which `gift evaluate` never does: "
        "leave it out, or run lm-eval in a sandbox of your own."
    )


def _leaves(index: Mapping[str, Any], specs: Sequence[Any], above: tuple = ()) -> dict[str, Any]:
    """The tasks in tasks, groups and tags: their configs by name, None where there is none."""
    found: dict[str, Any] = {}
    for spec in specs:
        own = {"task": spec} if isinstance(spec, str) else spec
        name: Any = own.get("group") or own.get("task")
        entry = None if isinstance(name, list) or name in above else index.get(name)
        inside = own.get("task")
        if entry is not None:
            inside = sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task")
        if isinstance(inside, list):
            found |= _leaves(index, inside, (*above, name))
        elif entry is not None:
            found[name] = {**entry.cfg, **own, "folder": entry.yaml_path.parent.as_posix()}
            found[name]["unsafe_code"] = entry.cfg.get("unsafe_code") or own.get("unsafe_code")
        else:
            found[str(name)] = None if isinstance(spec, str) else {**own, "folder": ""}
    return found


def _source(config: Mapping[str, Any]) -> str:
    """Where on the hub a task's data is; empty for local files."""
    path = str(config.get("dataset_path") or f"what {config.get('task')} asks for")
    files = str((config.get("dataset_kwargs") or {}).get("data_files", ""))
    return "" if "://" not in files and (path in _FILES or Path(path).exists()) else path


def _check(tasks: Mapping[str, Any], settings: Settings, positions: int) -> None:
    """Refuses what would fail after some time, or be passed over: examples, lengths, options."""
    given = dict(x.split("=", 1) for x in (settings.gen_kwargs or "").split(",") if x)
    for key in given.keys() - {"until", *_LENGTHS, *vars(GenerationConfig())}:
        raise ValueError(f"--gen_kwargs: transformers generates with no {key!r}: rename it.")
    for name, task in tasks.items():
        pool = getattr(getattr(task, "sampler", None), "df", None)
        if settings.num_fewshot and pool is not None and task.get_config("num_fewshot") != 0:
            # lm-eval draws one more where it then leaves the asked problem out.
            room = len(pool) - (task.fewshot_cfg.split == task.config.test_split)
            if settings.num_fewshot > room:
                raise ValueError(f"--num_fewshot: {name} has {room} examples: lower it.")
        kwargs = {**(task.get_config("generation_kwargs") or {}), **given}
        most = next((str(kwargs[x]) for x in _LENGTHS if x in kwargs), "256")
        if task.OUTPUT_TYPE == "generate_until" and most.isdigit() and int(most) >= positions:
            raise ValueError(
                f"--tasks: {name} generates up to {most} tokens, and the model has {positions} "
                "positions for prompt and answer: set --gen_kwargs max_gen_toks=N."
            )


def _mind(tasks: Mapping[str, Any], adds_bos: bool) -> Iterator[str]:
    """What lm-eval does not say: examples that give the asked problem away, a second BOS."""
    for name, task in tasks.items():
        if adds_bos and task.OUTPUT_TYPE == "loglikelihood_rolling":
            yield f"{name}: lm-eval puts BOS before the tokenizer's own, and scores that one too"
        config, shots = task.config, getattr(task, "fewshot_cfg", None)
        if shots is None or shots.samples or not config.num_fewshot:
            continue
        scored = config.test_split or config.validation_split
        drawn = shots.split or config.training_split or config.validation_split or scored
        if drawn == scored and shots.split != config.test_split:  # else lm-eval leaves it out
            yield f"{name}: examples may be the very problem that is asked, answer included"


def _about(task: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    name, config = task.task_name, task.config
    counts = found["n-samples"].get(name, {})
    return {
        "version": found["versions"].get(name),
        "dataset": [config.dataset_path, config.dataset_name],
        "num_fewshot": found["n-shot"].get(name),
        "num_problems": counts.get("effective"),
        "of": counts.get("original"),
        "generation_kwargs": config.generation_kwargs,
    }


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task or group, metric and filter; what is no finite number is text."""
    rows: list[dict[str, Any]] = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, kept = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                pair = (value, metrics.get(f"{metric}_stderr,{kept}", "N/A"))
                value, stderr = (float(x) if is_number(x) else str(x) for x in pair)
                rows.append({"task": task, "metric": metric, "filter": kept})
                rows[-1] |= {"value": value, "stderr": stderr}
    return rows


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what lm-eval warns of, instead of printing it hundreds of times."""
    said: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("lm_eval")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _distinct(said: Sequence[str]) -> list[str]:
    """Messages that differ in more than numbers, without those about what is meant here."""
    meant = re.compile("Overwriting default num_fewshot|generation_kwargs:|.* is defined, but ")
    first = {re.sub(r"\d+", "0", x): " ".join(x.split()) for x in reversed(said)}
    return [x for x in reversed(first.values()) if not meant.match(x)]
