"""The README's commands are run as they stand, and its claims about files are true."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.strip().splitlines()
]
GIFT = [line.partition("&& ")[2] or line for line in COMMANDS if "gift " in line]
SHORT = ["--trainer.max_steps", "2", "--data.num_demonstrations", "64", "--data.num_eval", "8"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the repository's configs and the README's own target, to run in."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    (folder / "my_targets.py").write_text(code)
    return folder


def run(command: str, folder: Path, *more: str) -> str:
    words = shlex.split(command)
    assert words[0] == "gift"
    done = subprocess.run(
        [sys.executable, "-m", "gift_lightning", *words[1:], *more],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_readme_shows_what_is_tested_here():
    assert "pip install -e . && gift fit --config configs/quickstart.yaml" in COMMANDS
    assert 'pip install -e ".[test]" && pytest' in COMMANDS
    assert len(GIFT) >= 6


def test_quickstart_in_two_minutes(checkout):
    started = time.perf_counter()
    printed = run(GIFT[0], checkout)
    seconds = time.perf_counter() - started
    for word in ("Before and after training", "pass@1", "pass@16", "NLL", "runs/quickstart"):
        assert word in printed
    assert len(re.findall(r"(right|wrong) *$", printed, re.M)) == 3
    made = {p.name for p in (checkout / "runs/quickstart").iterdir()}
    assert made == {"config.yaml", "metrics.csv", "completions", "checkpoints", "hf"}
    assert seconds < 120, f"the quickstart took {seconds:.0f} s"


@pytest.mark.parametrize("command", GIFT[1:])
def test_every_other_command_runs(command, checkout):
    if "--ckpt_path" in command:  # goes on with the quickstart's data
        more = ["--data.num_eval", "8"]
    else:
        more = SHORT if " fit " in command else SHORT[2:]
    run(command, checkout, *more)


def test_the_readmes_own_target(checkout):
    command = "gift fit --config configs/quickstart.yaml --model.target my_targets.Mine"
    assert "Mine(power=0.5)" in run(command, checkout, *SHORT)


def test_the_readmes_yaml_parses(tmp_path):
    from gift_lightning.cli import GiftCLI

    class Stop(Exception):
        pass

    class ParseOnly(GiftCLI):
        def before_instantiate_classes(self) -> None:
            raise Stop

    (tmp_path / "mine.yaml").write_text(re.findall(r"```yaml\n(.*?)```", README, re.S)[0])
    with pytest.raises(Stop):
        ParseOnly(["fit", "--config", str(tmp_path / "mine.yaml")])


def test_every_module_has_its_line():
    modules = {p.name for p in (ROOT / "src/gift_lightning").glob("*.py")}
    listed = set(re.findall(r"`(\w+\.py)`", README.partition("## Reading the source")[2]))
    assert modules - {"__init__.py", "__main__.py"} == listed


def test_every_target_has_its_row():
    from gift_lightning import targets

    rows = (ROOT / "docs/targets.md").read_text()
    for name in set(targets.__all__) - {"Target"}:
        assert f"| `{name}` |" in rows, f"docs/targets.md has no row for {name}"
