"""The YAML file that describes an ablation: read, or refused in one sentence."""

import re
from pathlib import Path
from typing import Any

import yaml

from gift_lightning.errors import refuse_repeated_keys
from gift_lightning.experiment import Experiment, Stage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SET_HERE = ("config", "seed_everything", "trainer.default_root_dir")
_SKIP = "skip"

Arm = dict[str, dict[str, Any] | None]
"""Overrides by stage; None = the arm skips that stage."""


def read_experiment(path: str) -> Experiment:
    """The experiment that a YAML file describes.

    Raises:
        ValueError: in one sentence, whatever is wrong with the file.
    """
    known = {"output", "seeds", "stages", "arms"}
    top = _mapping(_yaml(path, _text(path)), path, known | {"vary", "from"})
    if "from" in top:
        if not isinstance(base := top.pop("from"), str):
            raise ValueError(f"{path}: from must be another ablation's file, got {base!r}.")
        top = {**_mapping(_yaml(base, _text(base)), base, known | {"vary"}), **top}
    if missing := known - set(top):
        raise ValueError(f"{path}: {min(missing)!r} is missing; docs/ablations.md shows a file.")
    if not isinstance(top["output"], str):
        raise ValueError(f"{path}: output must be a folder, got {top['output']!r}.")
    seeds = top["seeds"]
    whole = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{path}: seeds must be a list of different whole numbers from 0 on, such as "
            f"[0, 1, 2], got {seeds!r}."
        )
    named = _named(top, "stages", path)
    stages = {name: _stage(name, x, path, i) for i, (name, x) in enumerate(named)}
    arms = {name: _arm(name, x, stages, path) for name, x in _named(top, "arms", path)}
    if "vary" in top:
        arms = _varied(arms, top["vary"], stages, path)
    if taken := {"configs", *(s.name for s in stages.values() if s.once)} & set(arms):
        raise ValueError(f"{path}: arm {min(taken)!r} would share a folder: choose another name.")
    experiment = Experiment(Path(top["output"]), seeds, stages, arms)
    try:
        experiment.runs()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return experiment


def _stage(name: str, said: Any, path: str, position: int) -> Stage:
    where = f"{path}: stage {name}"
    said = _mapping(said, where, {"config", "overrides", "once"})
    if not isinstance(said.get("config"), str):
        raise ValueError(f"{where} needs a config, the YAML file of a `gift fit` run.")
    if not isinstance(said.get("once", False), bool):
        raise ValueError(f"{where}: once is true or false, got {said['once']!r}.")
    text = _text(said["config"])
    _yaml(said["config"], text)
    overrides = _overrides(said.get("overrides"), where)
    return Stage(name, said["config"], text, overrides, said.get("once", False), position)


def _arm(name: str, said: Any, stages: dict[str, Stage], path: str) -> Arm:
    where = f"{path}: arm {name}"
    can = {stage.name for stage in stages.values() if not stage.once}
    said = _mapping({} if said is None else said, where, can, "stage")
    arm: Arm = {
        stage: None if x == _SKIP else _overrides(x, f"{where}: {stage}")
        for stage, x in said.items()
    }
    if all(arm.get(stage, {}) is None for stage in can):
        raise ValueError(f"{where} skips every stage: drop it.")
    return arm


def _varied(arms: dict[str, Arm], said: Any, stages: dict[str, Stage], path: str) -> dict[str, Arm]:
    """An arm of its own for every value, or combination of values; `sft` becomes `sft-lr1e-4`."""
    where = f"{path}: vary"
    can = {stage.name for stage in stages.values() if not stage.once}
    for stage, keys in _mapping(said, where, can, "stage").items():
        for key, values in _overrides(keys, f"{where}: {stage}").items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{where}: {stage}: {key} must be a list of values to try.")
            varied: dict[str, Arm] = {}
            for name, arm in arms.items():
                own = arm.get(stage, {})
                if own is None:  # it skips the stage
                    varied[name] = arm
                    continue
                for value in values:
                    one = f"{name}-{key.rpartition('.')[2]}{_short(value)}"
                    if not _NAME.fullmatch(one) or one in varied:
                        raise ValueError(f"{where}: {one!r} is no name for an arm, or one twice.")
                    varied[one] = {**arm, stage: {**own, key: value}}
            arms = varied
    return arms


def _short(value: Any) -> str:
    """0.00015 is 1.5e-4."""
    if not isinstance(value, float) or not 0 < abs(value) < 0.01:
        return str(value)
    digits, _, exponent = f"{value:.6e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _overrides(said: Any, where: str) -> dict[str, Any]:
    said = _mapping({} if said is None else said, f"{where}: overrides")
    for key in said:
        if not isinstance(key, str):
            raise ValueError(f"{where}: {key!r} is no dotted key such as model.target.beta.")
        if key in _SET_HERE:
            raise ValueError(f"{where}: {key} is set by the ablation itself: drop it.")
    return said


def _mapping(said: Any, where: str, keys: set[str] | None = None, what: str = "key") -> Any:
    if not isinstance(said, dict):
        raise ValueError(f"{where} must be a mapping (key: value), got {said!r}.")
    for key in said:
        if keys is not None and key not in keys:
            known = ", ".join(sorted(keys)) or "none"
            raise ValueError(f"{where}: {key!r} is no {what}; choose from {known}.")
    return said


def _named(top: dict[str, Any], what: str, path: str) -> list[tuple[str, Any]]:
    said = _mapping(top[what], f"{path}: {what}")
    if not said:
        raise ValueError(f"{path}: {what} is empty: name at least one.")
    for name in said:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{path}: {name!r} in {what} is no name: use letters, digits, '.', '_' and '-', "
                "and quotes around a number."
            )
    return list(said.items())


def _text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"{path} cannot be read: {why}.") from error
    refuse_repeated_keys(path)
    return text


def _yaml(path: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ValueError(f"{path}{line} is no valid YAML: {problem}.") from error
