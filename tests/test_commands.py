"""`gift --help`: at once, without the heavy imports, and of all commands that there are."""

import os
import subprocess
import sys
import time
from importlib import import_module

import pytest

from gift_lightning import __version__, cli, commands
from gift_lightning.cli import GiftCLI
from gift_lightning.commands import APART, STAGES, main

HEAVY = ("torch", "lightning", "transformers", "jsonargparse")
PROBE = f"""
import sys
from gift_lightning.commands import main
main(sys.argv[1:])
print("imported:", [x for x in {HEAVY!r} if x in sys.modules])
"""


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["--version"]])
def test_help_and_version_come_at_once(words):
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert time.perf_counter() - start < 3
    assert out.stdout.splitlines()[-1] == "imported: []"
    if words == ["--version"]:
        assert __version__ in out.stdout
    else:
        listed = [x.split()[0] for x in out.stdout.splitlines() if x.startswith("  ")]
        assert listed[: len(STAGES) + len(APART)] == [*STAGES, *APART]


def test_the_help_lists_the_commands_that_there_are():
    assert {name.replace("-", "_") for name in STAGES} == GiftCLI.subcommands().keys()
    for name in APART:
        assert callable(import_module(f"gift_lightning.{name}").main)


def test_other_words_reach_the_real_parser(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fti"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("gift: error: ")


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_large_tensors_lie_on_huge_pages_unless_told_otherwise(given, found, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_HUGE_PAGES", tmp_path)
    monkeypatch.setattr(cli, "main", lambda words: None)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if given:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given)
    main(["fit"])
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == found
