"""Every file under configs/ parses against the real signatures, says one thing, and stays short."""

from pathlib import Path

import pytest
import yaml

from gift_lightning.cli import GiftCLI, main
from gift_lightning.targets import Target

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
names = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))


@names
def test_config_parses_and_is_short(path, parse):
    config = parse(path)
    assert config.model.class_path.startswith("gift_lightning.")
    assert config.trainer.default_root_dir.startswith("runs/")
    assert len(path.read_text().splitlines()) <= 40


@names
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
    used = {parse(path).model.init_args.target.class_path.rpartition(".")[2] for path in CONFIGS}
    assert {"OneHot", "GIFT", "DFT", "ASFT", "PSFT", "GEM", "TargetSFT", "LabelSmoothing"} <= used
    assert used <= {cls.__name__ for cls in _subclasses(Target)}


QUICK = [path for path in CONFIGS if "CountdownData" in path.read_text()]


@pytest.mark.parametrize("path", QUICK, ids=lambda p: p.name)
def test_every_quick_config_runs_two_steps(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = [
        "--data.num_demonstrations",
        "64",
        "--data.num_pretraining",
        "128",
        "--data.num_eval",
        "8",
    ]
    main(["fit", "--config", str(path), "--trainer.max_steps", "2", *sizes])
    assert "Written to runs/" in capsys.readouterr().out


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(c) for c in cls.__subclasses__()))


@pytest.fixture(scope="session")
def parse():
    """Parses a config as `gift fit --config` does, without building anything."""

    class Parsed(Exception):
        pass

    class ParseOnly(GiftCLI):
        def before_instantiate_classes(self) -> None:
            raise Parsed(self)

    def parse(path: Path):
        with pytest.raises(Parsed) as parsed:
            ParseOnly(["fit", "--config", str(path)])
        return parsed.value.args[0].config.fit

    return parse
