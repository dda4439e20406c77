"""Every file under configs/ parses against the real signatures, says one thing, and stays short."""

from functools import cache
from pathlib import Path

import pytest
import yaml

from gift_lightning.ablate import parse_all
from gift_lightning.cli import GiftCLI, main
from gift_lightning.experiment_file import read_experiment
from gift_lightning.targets import Target

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
ABLATIONS = [path for path in CONFIGS if {"arms", "from"} & set(yaml.safe_load(path.read_text()))]
FITS = [path for path in CONFIGS if path not in ABLATIONS]


def each(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda p: str(p.relative_to(ROOT / "configs"))
    )


@each(FITS)
def test_config_parses_and_is_short(path, parse):
    config = parse(path)
    assert config.model.class_path.startswith("gift_lightning.")
    assert config.trainer.default_root_dir.startswith("runs/")
    assert len(path.read_text().splitlines()) <= 40


@each(ABLATIONS)
def test_ablation_parses(path, monkeypatch):
    """The file, and the command line of every stage and arm."""
    monkeypatch.chdir(ROOT)  # its configs are named from here, and classes of the user's own
    monkeypatch.syspath_prepend(ROOT)  # as `gift` does
    experiment = read_experiment(str(path))
    assert str(experiment.output).startswith("runs/")
    runs = experiment.runs()
    if path.stem.startswith("tuning"):  # an arm's learning rates differ by a number
        runs = list({((run.arm or "").partition("-lr")[0], run.name): run for run in runs}.values())
    parse_all(runs, str(path))


@each(CONFIGS)
def test_config_has_no_key_twice(path):
    """YAML keeps the last of two equal keys without a word."""
    seen = set()

    def walk(node: yaml.Node, where: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{where}.{key.value}"
                assert name not in seen, f"{name} stands twice"
                seen.add(name)
                walk(value, name)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                walk(value, f"{where}[{i}]")

    walk(yaml.compose(path.read_text()), "")


def test_there_is_a_config_for_every_kind_of_target(parse):
    every = [parse(path).model.init_args.get("target") for path in FITS]
    used = {target.class_path.rpartition(".")[2] for target in every if target is not None}
    assert {"OneHot", "GIFT", "DFT", "ASFT", "PSFT", "GEM", "TargetSFT", "LabelSmoothing"} <= used
    assert used <= {cls.__name__ for cls in _subclasses(Target)}


# What trains the embedded base, or one of its size, on the embedded task.
QUICK = [path for path in FITS if "Countdown" in path.read_text()]
SMALL = {
    "CountdownData": {
        "num_demonstrations": 16,
        "num_pretraining": 128,
        "num_eval": 8,
        "batch_size": 16,
    },
    "CountdownProblems": {"size": 16},
    "PromptData": {"prompts_per_rollout": 4, "num_generations": 4, "batch_size": 16},
    "GenerationEval": {"num_samples": 2, "ks": [1, 2]},
}


def shrunk(node):
    """A config with fewer and smaller problem sets, and otherwise as it stands."""
    if isinstance(node, list):
        return [shrunk(child) for child in node]
    if not isinstance(node, dict):
        return node
    node = {key: shrunk(child) for key, child in node.items()}
    if (name := str(node.get("class_path")).rpartition(".")[2]) in SMALL:
        node["init_args"] = {**node.get("init_args", {}), **SMALL[name]}
    return node


@each(QUICK)
def test_every_quick_config_runs_two_steps(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(shrunk(yaml.safe_load(path.read_text()))))
    main(["fit", "--config", "config.yaml", "--trainer.max_steps", "2"])
    assert "Written to runs/" in capsys.readouterr().out


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(c) for c in cls.__subclasses__()))


@pytest.fixture(scope="module")
def parse():
    """Parses a config as `gift fit --config` does, without building anything."""

    class Parsed(Exception):
        pass

    class ParseOnly(GiftCLI):
        def before_instantiate_classes(self) -> None:
            raise Parsed(self)

    @cache
    def parse(path: Path):
        with pytest.raises(Parsed) as parsed:
            ParseOnly(["fit", "--config", str(path)])
        return parsed.value.args[0].config.fit

    return parse
