"""The benchmark of the fused head runs and prints its table."""

import subprocess
import sys
from pathlib import Path


def test_the_benchmark_prints_a_table(repository: Path) -> None:
    script = repository / "benchmarks" / "head.py"
    sizes = ["--tokens=64", "--vocab=512", "--width=16", "--threads=1", "--repeats=1"]
    out = subprocess.run(
        [sys.executable, str(script), *sizes], capture_output=True, text=True, check=True
    )
    rows = [line for line in out.stdout.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| computation | time (s) | memory (MiB) | time ratio")
    cells = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in rows[2:]}
    assert {
        "GIFT(beta=20), official form",
        "GIFT(beta=20), fused",
        "cross_entropy(hidden @ weight.T)",
        "OneHot(), fused",
    } <= set(cells)
    loss = {name: float(row[-1]) for name, row in cells.items()}
    assert abs(loss["GIFT(beta=20), fused"] - loss["GIFT(beta=20), official form"]) < 1e-3
    assert abs(loss["OneHot(), fused"] - loss["cross_entropy(hidden @ weight.T)"]) < 1e-4
