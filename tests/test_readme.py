"""The README's commands are run as they stand, and its claims about files are true."""

import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import warm
from gift_lightning.cli import GiftCLI
from test_configs import shrunk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.strip().splitlines()
]
GIFT = [line.partition("&& ")[2] or line for line in COMMANDS if "gift " in line]
LAB = [line for line in GIFT if line.startswith(("gift ablate", "gift compare"))]
SHORT = ["--trainer.max_steps", "2"]
SFT_SIZES = ["--data.num_demonstrations", "64", "--data.num_eval", "8"]
RL_SIZES = ["--data.train.size", "96", "--trainer.callbacks.sets.drawn.init_args.size", "8"]
HYBRID_SIZES = [
    *("--data.prompts.train.size", "96", "--data.demonstrations.num_demonstrations", "64"),
    *("--data.demonstrations.num_eval", "8", *RL_SIZES[2:]),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the repository's configs and the README's own classes, to run in."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    target, reward = re.findall(r"```python\n(.*?)```", README, re.S)
    (folder / "my_targets.py").write_text(target)
    (folder / "my_rewards.py").write_text(reward)
    return folder


def run(command: str, folder: Path, *more: str) -> str:
    words = shlex.split(command)
    assert words[0] == "gift"
    return warm.gift([*words[1:], *more], folder, COLUMNS="120")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_readme_shows_what_is_tested_here():
    assert "pip install -e . && gift fit --config configs/quickstart.yaml" in COMMANDS
    assert 'pip install -e ".[test]" && pytest' in COMMANDS
    assert len(GIFT) >= 6


def test_quickstart_in_two_minutes(checkout):
    before = cpu_seconds()
    command = [sys.executable, "-m", "gift_lightning", *shlex.split(GIFT[0])[1:]]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    seconds, printed = cpu_seconds() - before, done.stdout
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("Before and after training", "pass@1", "pass@16", "NLL", "runs/quickstart"):
        assert word in printed
    assert len(re.findall(r"(right|wrong) *$", printed, re.M)) == 3
    made = {p.name for p in (checkout / "runs/quickstart").iterdir()}
    assert made == {"config.yaml", "metrics.csv", "completions", "checkpoints", "hf"}
    # Of the processor, as other tests run beside this one.
    assert seconds < 2 * 120, f"the quickstart took {seconds:.0f} s of two cores"


@pytest.mark.parametrize("command", [line for line in GIFT[1:] if line not in LAB])
def test_every_other_command_runs(command, checkout):
    if "hybrid/" in command:
        printed = run(command, checkout, *SHORT, *HYBRID_SIZES)
        assert "with demonstrations towards" in printed and "Before and after training" in printed
    elif "grpo.yaml" in command:
        printed = run(command, checkout, *SHORT, *RL_SIZES)
        assert "GRPO (" in printed and "Before and after training" in printed
        assert ("Brackets" in printed) is ("Brackets" in command)
    elif "--ckpt_path" in command:  # goes on with the quickstart's data
        run(command, checkout, "--data.num_eval", "8")
    else:
        run(command, checkout, *(SHORT if " fit " in command else []), *SFT_SIZES)


def test_the_lab_in_small(tmp_path):
    """The README's experiment with two of its arms, one seed and one step in every stage."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    ablate, compare = LAB
    file = tmp_path / ablate.split()[2]
    lab = yaml.safe_load(file.read_text())
    against = compare.split()[-1]
    arms = [against, next(arm for arm in lab["arms"] if arm != against)]
    lab.update(seeds=lab["seeds"][:1], arms={arm: lab["arms"][arm] for arm in arms})
    file.write_text(yaml.safe_dump(lab, sort_keys=False))
    for stage in lab["stages"].values():
        config = shrunk(yaml.safe_load((tmp_path / stage["config"]).read_text()))
        config["trainer"]["max_steps"] = 1
        (tmp_path / stage["config"]).write_text(yaml.safe_dump(config))
    assert "All done. Next: gift compare runs/lab" in run(ablate, tmp_path)
    printed = run(compare, tmp_path)
    assert all(arm in printed for arm in arms) and "Written to runs/lab/compare" in printed
    assert (tmp_path / "runs/lab/compare/index.html").is_file()


def test_the_readmes_own_target(checkout):
    command = "gift fit --config configs/quickstart.yaml --model.target my_targets.Mine"
    assert "Mine(power=0.5)" in run(command, checkout, *SHORT, *SFT_SIZES)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_the_readmes_yaml_parses(block, tmp_path):
    """Alone, or on top of the quickstart's where it says only a part."""

    class Stop(Exception):
        pass

    class ParseOnly(GiftCLI):
        def before_instantiate_classes(self) -> None:
            raise Stop

    (tmp_path / "mine.yaml").write_text(block)
    files = [str(tmp_path / "mine.yaml")]
    if "model:" not in block.splitlines():
        files.insert(0, str(ROOT / "configs/quickstart.yaml"))
    with pytest.raises(Stop):
        ParseOnly(["fit", *(word for file in files for word in ("--config", file))])


def test_every_module_has_its_line():
    modules = {p.name for p in (ROOT / "src/gift_lightning").glob("*.py")}
    listed = set(re.findall(r"`(\w+\.py)`", README.partition("## Reading the source")[2]))
    assert modules - {"__init__.py", "__main__.py"} == listed


def test_every_target_has_its_row():
    from gift_lightning import targets

    rows = (ROOT / "docs/targets.md").read_text()
    for name in set(targets.__all__) - {"Target"}:
        assert f"| `{name}` |" in rows, f"docs/targets.md has no row for {name}"
