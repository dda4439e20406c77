"""How long a user waits: for the help, for the first step of a run, and for tokenised data.

    python benchmarks/startup.py --tokenizer SMOLLM2_FOLDER

The first step is that of configs/quickstart.yaml, with all that comes before it: imports, the
embedded model, the data, and the whole validation that is step 0 of every curve; once without its
callback, whose validation samples 16 completions of each problem, and once as it is. `--config`
takes another. The data are loaded and tokenised twice, into an empty cache and from it; imports are
not in that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, Runs, machine, markdown, median

HELP = "gift --help"
FIT, SAMPLED = "gift fit, to the first step", "the same behind an evaluation by sampling"
TOKENS, AGAIN = "data, first start", "data, second start"


def environment(threads: int, cache: str) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT / "src"),
        "GIFT_CACHE": cache,
    }


def help_seconds(threads: int) -> float:
    begin = time.perf_counter()
    command = [sys.executable, "-m", "gift_lightning", "--help"]
    subprocess.run(command, env=environment(threads, ""), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def fit_seconds(config: str, callbacks: str, threads: int, folder: str) -> float:
    said = "the first step is done"  # by first_step.FirstStep
    command = [
        *(sys.executable, "-m", "gift_lightning", "fit"),
        *("--config", config),
        *("--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false"),
        f"--trainer.callbacks{callbacks}first_step.FirstStep",
    ]
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parent,
        env=environment(threads, ""),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if said in line:
                seconds = time.perf_counter() - begin
                process.kill()
                return seconds
    sys.exit(f"gift fit ended with status {process.returncode} before a step.")


def data_seconds(options: argparse.Namespace, cache: str) -> float:
    command = [sys.executable, __file__, f"--data={options.data}", "--cell=data"]
    command += [f"--tokenizer={options.tokenizer}"]
    out = subprocess.run(
        command, env=environment(options.threads, cache), check=True, stdout=subprocess.PIPE
    )
    return float(json.loads(out.stdout.splitlines()[-1]))


def prepare(options: argparse.Namespace) -> float:
    """Seconds to load and tokenise, in this process."""
    from gift_lightning.data import SFTData
    from gift_lightning.models import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    begin = time.perf_counter()
    SFTData(options.data).prepare(tokenizer, len(tokenizer))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=str(ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl")
    )
    parser.add_argument("--tokenizer", default="gift:countdown")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(prepare(options)))
        return
    runs: Runs = {HELP: [], FIT: [], SAMPLED: [], TOKENS: [], AGAIN: []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs[HELP].append({"seconds": help_seconds(options.threads)})
            for cell, callbacks in ((FIT, "="), (SAMPLED, "+=")):
                seconds = fit_seconds(
                    options.config, callbacks, options.threads, f"{folder}/{cell}"
                )
                runs[cell].append({"seconds": seconds})
            for cell in (TOKENS, AGAIN):
                runs[cell].append({"seconds": data_seconds(options, f"{folder}/cache")})
    print(f"{machine(options.threads, options.repeats)}\n")
    rows = [(cell, f"{median(found, 'seconds'):.2f}") for cell, found in runs.items()]
    print(markdown(("what", "seconds"), rows))


if __name__ == "__main__":
    main()
