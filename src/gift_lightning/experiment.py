"""An ablation as arms × seeds × stages, and the runs that it stands for."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

_SEED = "{seed}"
_STAGE_FOLDER = re.compile(r"\{([^{}/]*)\}/")  # "{sft}/hf"


@dataclass(frozen=True, eq=False)
class Stage:
    """One `gift fit` command, before an arm and a seed change it."""

    name: str
    config: str
    """Path of the YAML file."""
    text: str
    """What that file says."""
    overrides: dict[str, Any]
    once: bool
    """One run for all arms and seeds, such as a teacher."""
    position: int
    """In the order of the file."""

    @property
    def copy_name(self) -> str:
        """A name for a copy of the config that no other text has."""
        return f"{self.name}-{hashlib.sha256(self.text.encode()).hexdigest()[:12]}.yaml"


@dataclass(frozen=True, eq=False)
class Run:
    """One stage of one arm and seed; both are None for a stage that is run once for all."""

    stage: Stage
    arm: str | None
    seed: int | None
    folder: Path
    config: Path
    """Its copy of the stage's config, which nobody edits while runs wait."""
    flags: dict[str, Any]
    """Overrides as written: stage's, then arm's."""
    needs: dict[str, "Run"]
    """The runs whose folders the flags read, by stage."""

    def __str__(self) -> str:
        return self.stage.name if self.arm is None else f"{self.arm} seed {self.seed} {self.name}"

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def log(self) -> Path:
        """Beside the folder, which must be empty when training starts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def words(self, config: str | Path | None = None) -> list[str]:
        """The command line behind `gift`, reading the copy or another config."""
        flags = {key: self._filled(value) for key, value in self.flags.items()}
        if self.seed is not None:
            flags["seed_everything"] = self.seed
        flags["trainer.default_root_dir"] = str(self.folder)
        given = [f"--{key}={_word(value)}" for key, value in flags.items()]
        return ["fit", "--config", str(config or self.config), *given]

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._filled(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._filled(v) for v in value]
        if value == _SEED:
            return self.seed
        if isinstance(value, str) and (found := _STAGE_FOLDER.match(value)):
            return f"{self.needs[found[1]].folder}/{value[found.end() :]}"
        return value

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the result depends on, as JSON; no path of it depends on the output folder."""
        return {
            "config": yaml.safe_load(self.stage.text),
            "overrides": self.flags,
            "seed": self.seed,
            "reads": {name: run.key for name, run in self.needs.items()},
        }

    @cached_property
    def key(self) -> str:
        """sha256 of the inputs, and of those of every run that it reads."""
        text = json.dumps(self.inputs, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Experiment:
    """Arms × seeds × stages."""

    output: Path
    seeds: list[int]
    stages: dict[str, Stage]
    """In the order of running."""
    arms: dict[str, dict[str, dict[str, Any] | None]]
    """Overrides by arm and stage; None = the arm skips that stage."""

    def runs(self, only: Iterable[str] = ()) -> list[Run]:
        """All runs (of the named arms), a run behind what it reads, seed by seed.

        Raises:
            ValueError: if there is no such arm, or a run reads a stage that does not come before.
        """
        only = list(only)
        for arm in only:
            if arm not in self.arms:
                raise ValueError(f"--only {arm}: no such arm; there are {', '.join(self.arms)}.")
        shared: dict[str, Run] = {}
        for stage in self.stages.values():
            if stage.once:
                shared[stage.name] = self._run(stage, None, None, shared)
        runs = list(shared.values())
        for seed in self.seeds:
            for arm in only or self.arms:
                made = dict(shared)
                for stage in self.stages.values():
                    if not stage.once and self.arms[arm].get(stage.name, {}) is not None:
                        made[stage.name] = self._run(stage, arm, seed, made)
                        runs.append(made[stage.name])
        return runs

    def _run(self, stage: Stage, arm: str | None, seed: int | None, made: dict[str, Run]) -> Run:
        own = (self.arms[arm].get(stage.name) if arm else None) or {}
        flags = {**stage.overrides, **own}
        needs = {}
        where = f"stage {stage.name} of arm {arm}" if arm else f"stage {stage.name}"
        for text in _strings(flags):
            if arm is None and text == _SEED:
                raise ValueError(f"{where}: a stage that runs once has no {_SEED}: write a number.")
            if (found := _STAGE_FOLDER.match(text)) is None:
                continue
            if (name := found[1]) not in made:
                raise ValueError(f"{where}: {text!r} {self._absent(name, arm, stage)}.")
            needs[name] = made[name]
        place = [arm, f"seed-{seed}"] if arm else []
        folder = self.output.joinpath(*place, stage.name)
        config = self.output / "configs" / stage.copy_name
        return Run(stage, arm, seed, folder, config, flags, needs)

    def _absent(self, name: str, arm: str | None, stage: Stage) -> str:
        if arm and self.arms[arm].get(name, {}) is None:
            return (
                f"reads stage {name}, which this arm skips: give the arm's {stage.name} its own "
                "value for that key, such as the base model's name"
            )
        names = list(self.stages)
        earlier = ", ".join(names[: names.index(stage.name)]) or "none"
        return f"names no stage that comes before it (there: {earlier})"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", ".nan").replace("inf", ".inf")
    return json.dumps(value, default=str)
