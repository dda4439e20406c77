"""Every benchmark runs at a tiny size and prints its table; what they compare agrees."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import test_cli
import warm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def rows(out: str) -> dict[str, list[str]]:
    """The cells of a markdown table by their first column."""
    lines = [x.split("|")[1:-1] for x in out.splitlines() if x.startswith("|")]
    return {line[0].strip(): [x.strip() for x in line[1:]] for line in lines}


@pytest.fixture
def table(repository: Path, monkeypatch, capsys):
    """Runs a benchmark with its cells in this process, where everything is imported already."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    measuring = importlib.import_module("measuring")

    def run(name: str, *flags: str) -> dict[str, list[str]]:
        benchmark = importlib.import_module(name)

        def start(file: str, cell: str, given: list[str], threads: int) -> str:
            words = [file, f"--threads={threads}", *given, f"--cell={cell}"]
            monkeypatch.setattr(sys, "argv", words)
            benchmark.main()
            return capsys.readouterr().out

        def finish(out: str, cell: str) -> dict[str, float]:
            return json.loads(out.splitlines()[-1])

        monkeypatch.setattr(measuring, "start", start)
        monkeypatch.setattr(measuring, "finish", finish)
        monkeypatch.setattr(sys, "argv", [name, "--threads=1", "--repeats=1", *flags])
        benchmark.main()
        return rows(capsys.readouterr().out)

    yield run
    for name in ("measuring", "sft", "packing", "grpo"):
        sys.modules.pop(name, None)


def script(repository: Path, name: str, *flags: str) -> str:
    done = warm.run([str(repository / "benchmarks" / name), "--threads=1", *flags], repository)
    assert not done.returncode, done.stderr[-4000:]
    return done.stdout


def test_head(repository: Path) -> None:
    out = script(repository, "head.py", "--tokens=64", "--vocab=512", "--width=16", "--repeats=1")
    cells = rows(out)
    assert out.splitlines()[0].endswith("medians of 1.")
    assert cells["computation"][:3] == ["time (s)", "memory (MiB)", "time ratio"]
    loss = {name: float(row[-1]) for name, row in cells.items() if "." in row[-1]}
    assert abs(loss["GIFT(beta=20), fused"] - loss["GIFT(beta=20), official form"]) < 1e-3
    assert abs(loss["OneHot(), fused"] - loss["cross_entropy(hidden @ weight.T)"]) < 1e-4


def test_head_by_tokens(repository: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    head = importlib.import_module("head")
    cell = [{"seconds": 1.0, "mib": 2000.0, "loss": 1.0}]
    made = rows(head.growth({64: {head.GIFT_FUSED: cell}, 128: {head.GIFT_FUSED: cell}}))
    assert made["memory (MiB) at tokens"] == ["64", "128"]
    assert made[head.GIFT_FUSED] == ["2,000", "2,000"]
    sys.modules.pop("head")


def test_sft(table, capsys) -> None:
    small = ["--vocab=99", "--width=16", "--layers=1", "--batch=2", "--length=8"]
    found = table("sft", *small, "--steps=2", "--skip=1")
    expected = {"bare PyTorch loop", "SFT", "GIFT, cached reference", "GIFT, frozen copy"}
    assert expected <= found.keys()
    assert found["SFT"][-3:-1] == ["1.00", "1.00"]
    standard = {"bare PyTorch loop", "SFT", "TRL SFTTrainer"} & found.keys()
    loss = {cell: float(row[-1]) for cell, row in found.items() if "." in row[-1]}
    assert all(abs(loss[cell] - loss["SFT"]) < 2e-4 for cell in standard)
    assert loss["GIFT, cached reference"] == pytest.approx(loss["GIFT, frozen copy"], abs=0.01)


def test_packing(table, tmp_path) -> None:
    data = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, data)))
    small = ["--width=16", "--layers=1", "--batch=4", "--max-length=32", "--steps=2"]
    found = table("packing", f"--data={tmp_path / 'rows.jsonl'}", *small)
    assert found["official form, padded to max length"][-1] == "1.00"
    assert float(found["GIFT, packed"][1].replace(",", "")) > 0


def test_grpo(table) -> None:
    found = table("grpo", "--prompts=2", "--samples=2", "--steps=2", "--skip=1")
    assert found["GRPO"][-1] == "1.00"


def test_ddp(repository: Path) -> None:
    small = ["--vocab=99", "--width=16", "--layers=1", "--batch=2", "--length=8"]
    words = [*small, "--steps=2", "--skip=1", "--repeats=1"]
    found = rows(script(repository, "ddp.py", *words))
    assert found["one process"][1] == "1.00"
    assert float(found["two processes, DDP"][0].replace(",", "")) > 0


def test_startup(repository: Path, tmp_path) -> None:
    data = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(1200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, data)))
    (tmp_path / "tiny.yaml").write_text(test_cli.TINY)
    flags = [f"--data={tmp_path / 'rows.jsonl'}", f"--config={tmp_path / 'tiny.yaml'}"]
    found = rows(script(repository, "startup.py", *flags, "--repeats=1"))
    seconds = {name: float(row[0]) for name, row in found.items() if row[0][0].isdigit()}
    assert seconds["gift --help"] < seconds["gift fit, to the first step"]
    assert seconds["data, second start"] < seconds["data, first start"]
