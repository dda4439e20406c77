"""The benchmark of a GPU says that there is none; its code runs at toy sizes on a CPU."""

import math
import subprocess
from pathlib import Path

import warm


def gpu(repository: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words = [str(repository / "benchmarks" / "gpu.py"), *flags]
    return warm.run(words, repository, CUDA_VISIBLE_DEVICES="")


def test_without_a_device_it_says_so(repository: Path) -> None:
    out = gpu(repository)
    said = "benchmarks/gpu.py: no CUDA device was found, so nothing was measured.\n"
    assert (out.returncode, out.stdout) == (1, "") and out.stderr.endswith(said)


def test_a_dry_run_fills_all_tables(repository: Path) -> None:
    out = gpu(repository, "--dry")
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("A dry run, whose speeds mean nothing")
    speeds, configs, parity = (table.splitlines() for table in out.stdout.split("\n\n")[1:])
    rows = {cells[1].strip(): [x.strip() for x in cells[2:-1]] for cells in map(split, speeds[2:])}
    assert len(rows) == 10
    for name, (speed, memory, loss) in rows.items():
        if "bitsandbytes" not in speed:
            assert float(speed.replace(",", "")) > 0 and memory == "–" and 0 < float(loss) < 20, (
                name
            )
    names = [path.name for path in (repository / "configs/cards").glob("*.yaml")]
    assert sorted(names) == sorted(Path(split(row)[1].strip()).name for row in configs[2:])
    for row in configs[2:]:
        *_, speed, loss, _ = split(row)
        if "bitsandbytes" not in row:
            assert float(speed.replace(",", "")) > 0 and abs(float(loss) - math.log(256)) < 0.1
    for name in "OneHot()", "GIFT(beta=8)":
        forms = ("dense", "fused", "fused, evaluate compiled (aot_eager)")
        dense, *fused = (float(rows[f"head, {name}, {form}"][2]) for form in forms)
        assert all(abs(x - dense) < 1e-2 for x in fused)
    errors = [float(cells[2]) for cells in map(split, parity[2:])]
    assert len(errors) == 9 and max(errors) > 0  # bfloat16 is not float32
    assert all(cells[-2].strip() == "yes" for cells in map(split, parity[2:]))


def split(row: str) -> list[str]:
    return row.split("|")
