"""The same run in one process and in two: weights, metrics, samples, checkpoints, refusals."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

import two_ranks
import warm
from gift_lightning.cli import main
from gift_lightning.models import Lora, tiny_llama
from gift_lightning.policy import Policy
from gift_lightning.sharding import check_names, is_folder_of_shards, read_shards, tensor_plan

SCRIPT = Path(two_ranks.__file__)
RESUMED = ["psft", "gift_adapter_off", "grpo_kl"]  # inside an epoch, and inside a rollout
SPLIT = ["sft_untied", "psft", "hybrid"]
UNDER_DDP = ["gift_trust", "gift_cached", "hybrid", *RESUMED]
TOLERANCE = {"paper_bf16": 1e-3}  # a rounding apart is a rounding apart, in each of 20 steps
UNDER_FSDP1 = ["sft_untied", "gift_cached", "grpo"]


def jobs_of(cases: Iterable[str], kind: str, saved: Sequence[str] = RESUMED) -> list[str]:
    """Each case to its end, some with a checkpoint on the way."""
    return [f"{case}:save:{case}-{kind}.ckpt" if case in saved else case for case in cases]


def start(folder: Path, strategy: str, ranks: int, jobs: list[str]) -> None:
    """Runs jobs in a group of processes, which torchrun would describe like this."""
    processes: list[tuple[Any, Path]] = []
    for rank, group in enumerate(warm.group(ranks)):
        own = {**os.environ, **(group if strategy != "auto" else {})}
        words = [str(SCRIPT), strategy, str(folder), *jobs]
        log = folder / f"{strategy}-{ranks}-{rank}.log"
        processes.append((warm.start(words, folder, own, log), Path(f"{log}.err")))
    try:
        for process, said in processes:
            process.join(1500)
            assert process.exitcode == 0, said.read_text()[-3000:]
    finally:
        for process, _ in processes:
            process.kill()  # who waits for one that failed


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one process, and checkpoints of some."""
    folder = tmp_path_factory.mktemp("one")
    start(folder, "auto", 1, jobs_of(two_ranks.CASES, "one", [*RESUMED, "grpo"]))
    return folder


def after(name: str, *sources: Path) -> Path:
    """A folder that holds the cache and the checkpoints of earlier runs."""
    folder = sources[0].parent / name
    folder.mkdir()
    for source in sources:
        for file in [*source.glob(two_ranks.CACHE), *source.glob("*.ckpt")]:
            if not file.is_symlink():
                (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def ddp(one: Path) -> Path:
    """Some in two processes, which go on from the one's checkpoints and leave their own."""
    loads = [f"{case}:load:{case}-one.ckpt" for case in RESUMED]
    folder = after("ddp", one)
    start(folder, "ddp", 2, [*jobs_of(UNDER_DDP, "ddp"), *loads, "hybrid_gradient"])
    return folder


@pytest.fixture(scope="module")
def fsdp2(one: Path) -> Path:
    """All in two processes, which also go on from their own shards."""
    jobs = [*jobs_of(two_ranks.CASES, "fsdp2"), "hybrid_gradient"]
    for case in RESUMED:
        jobs += [f"{case}:load:{case}-one.ckpt"]
        jobs += [f"{case}:{verb}:{case}-shards.ckpt" for verb in ("save", "load")]
    folder = after("fsdp2", one)
    start(folder, "fsdp2", 2, jobs)
    return folder


@pytest.fixture(scope="module")
def tensor(one: Path) -> Path:
    """Some in two processes that share every matrix product."""
    folder = after("tensor", one)
    jobs = [*jobs_of(SPLIT, "tensor", ["psft"]), "psft:load:psft-one.ckpt"]
    start(folder, "tensor", 2, jobs)
    return folder


@pytest.fixture(scope="module")
def fsdp1(one: Path) -> Path:
    """Some under FSDP1, which goes on from the one's checkpoint and leaves its own."""
    folder = after("fsdp1", one)
    start(folder, "fsdp", 2, [*jobs_of(UNDER_FSDP1, "fsdp1", ["grpo"]), "grpo:load:grpo-one.ckpt"])
    return folder


@pytest.fixture(scope="module")
def resumed(one: Path, ddp: Path, fsdp2: Path, fsdp1: Path, tensor: Path) -> Path:
    """One process that goes on from the checkpoints of two."""
    folder = after("resumed", one, ddp, fsdp2, fsdp1, tensor)
    kinds = ("ddp", "fsdp2")
    loads = [f"{case}:load:{case}-{kind}.ckpt" for case in RESUMED for kind in kinds]
    others = ["psft:load:psft-tensor.ckpt", "grpo:load:grpo-fsdp1.ckpt"]
    start(folder, "auto", 1, [*loads, *others])
    start(folder, "fsdp2", 1, [f"{case}:load:{case}-shards.ckpt" for case in RESUMED])
    return folder


def same(found: Path, expected: Path, job: str, case: str) -> None:
    """Weights after 20 steps; and the steps of a resumed run are the last of an uninterrupted."""
    atol = TOLERANCE.get(case, 1e-5)
    sides = (found / job, expected / case)
    mine, theirs = (load_file(f"{side}.safetensors") for side in sides)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=atol, msg=name)
    values = (json.loads(Path(f"{side}.json").read_text())[:3] for side in sides)
    (metrics, norms, samples), (same_metrics, same_norms, same_samples) = values
    assert metrics == pytest.approx(same_metrics, abs=atol)
    assert norms == pytest.approx(same_norms[-len(norms) :], rel=atol)
    assert samples == same_samples[-len(samples) :]
    assert len(samples) == (two_ranks.STEPS - two_ranks.STOP if "load" in job else two_ranks.STEPS)


def test_the_cases_train_and_clip(one: Path) -> None:
    """What is the same in one process and in two is no run that does nothing."""
    clipped = 0
    for case in two_ranks.CASES:
        norms, samples = json.loads((one / f"{case}.json").read_text())[1:3]
        before = two_ranks.CASES[case]()[0].policy.state_dict()
        trained = load_file(one / f"{case}.safetensors")
        moved = max(float((x - before[name]).abs().max()) for name, x in trained.items())
        assert moved > 1e-3 and min(norms) > 0, case
        clipped += sum(norm > 0.5 for norm in norms)
        assert any(len(ids) == 1 for ids in samples) or "grpo" in case or "hybrid" in case
    assert clipped > 100


@pytest.mark.parametrize("case", UNDER_DDP)
def test_ddp_is_one_process(one: Path, ddp: Path, case: str) -> None:
    same(ddp, one, case, case)


@pytest.mark.parametrize("case", list(two_ranks.CASES))
def test_fsdp2_is_one_process(one: Path, fsdp2: Path, case: str) -> None:
    same(fsdp2, one, case, case)


def test_gradients_are_measured_on_shards(ddp: Path, fsdp2: Path) -> None:
    """GAC's gradient estimator, which depends on who has which micro-batch: two against two."""
    same(fsdp2, ddp, "hybrid_gradient", "hybrid_gradient")


def test_weights_and_rollouts_are_shared(one: Path, ddp: Path, fsdp2: Path) -> None:
    """Of 4 prompts a process samples 2; the weights are gathered once for each of 10 rollouts."""
    for folder, weights, prompts in ((one, 1.0, 40), (ddp, 1.0, 20), (fsdp2, 0.5, 20)):
        for case in UNDER_DDP if folder == ddp else two_ranks.CASES:
            found = json.loads((folder / f"{case}.json").read_text())[3]
            assert found["policy"] == pytest.approx(weights, abs=0.02)
            whole = 1.0 if case == "gift_host" else weights
            assert found.get("reference", whole) == pytest.approx(whole, abs=0.02)
            if "prompts" in found:
                # Two more: what the start checks for dropout, and what this test saves.
                assert (found["prompts"], found["gathered"]) == (prompts, 12)


@pytest.mark.parametrize("job", [*SPLIT, "psft:load:psft-one.ckpt"])
def test_tensor_parallelism_is_one_process(one: Path, tensor: Path, job: str) -> None:
    same(tensor, one, job, job.partition(":")[0])


@pytest.mark.parametrize("job", [*UNDER_FSDP1, "grpo:load:grpo-one.ckpt"])
def test_fsdp1_is_one_process(one: Path, fsdp1: Path, job: str) -> None:
    same(fsdp1, one, job, job.partition(":")[0])


@pytest.mark.parametrize("job", ["psft:load:psft-tensor.ckpt", "grpo:load:grpo-fsdp1.ckpt"])
def test_one_goes_on_where_matrices_or_flat_weights_were_split(
    one: Path, resumed: Path, job: str
) -> None:
    same(resumed, one, job, job.partition(":")[0])


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_go_on_where_one_was(
    one: Path, case: str, strategy: str, request: pytest.FixtureRequest
) -> None:
    same(request.getfixturevalue(strategy), one, f"{case}:load:{case}-one.ckpt", case)


@pytest.mark.parametrize("case", RESUMED)
def test_two_go_on_from_shards(one: Path, fsdp2: Path, case: str) -> None:
    assert (fsdp2 / f"{case}-shards.ckpt").is_dir()
    same(fsdp2, one, f"{case}:load:{case}-shards.ckpt", case)


def test_shards_are_read_without_processes(one: Path, fsdp2: Path) -> None:
    """As `gift export` reads them: all weights, in the middle of a run."""
    saved = torch.load(one / "psft-one.ckpt", weights_only=True)["state_dict"]
    own = {name: torch.empty_like(x) for name, x in saved.items()}
    read_shards(fsdp2 / "psft-shards.ckpt", own)
    for name, weight in saved.items():
        torch.testing.assert_close(own[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "shards"])
def test_one_goes_on_where_two_were(one: Path, resumed: Path, case: str, kind: str) -> None:
    same(resumed, one, f"{case}:load:{case}-{kind}.ckpt", case)


# --- the command line -------------------------------------------------------------------------

TINY = """
model:
  class_path: SFT
  init_args:
    model:
      class_path: gift_lightning.models.tiny_llama
      init_args: {hidden_size: 16, num_layers: 1, num_heads: 2, lora: {r: 2}}
    target: GIFT
    reference: AdapterOff
data:
  class_path: CountdownData
  init_args: {num_demonstrations: 32, num_eval: 3, batch_size: 8}
trainer:
  max_steps: 2
  enable_progress_bar: false
  accelerator: cpu
  default_root_dir: runs/tiny
  callbacks:
    - class_path: GenerationEval
      init_args: {num_samples: 2, ks: [1], max_new_tokens: 4}
"""
FIT = ["fit", "--config", "tiny.yaml"]
WHOLE = TINY.replace(", lora: {r: 2}", "").replace("AdapterOff", "FrozenCopy")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `gift` has started two processes that write a folder of shards."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "tiny.yaml").write_text(TINY)
    flags = ["--trainer.strategy", "FSDP2", "--trainer.devices", "2"]
    flags += ["--trainer.strategy.save_distributed_checkpoint", "true"]
    command = [sys.executable, "-m", "gift_lightning", *FIT, *flags]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to runs/tiny") == 1  # by one of them
    return folder


def test_the_command_under_ddp_is_the_command_alone(tmp_path: Path) -> None:
    """One report, one folder, the same weights and figures."""
    (tmp_path / "tiny.yaml").write_text(WHOLE)
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "4"]
    found = []
    for name, flags in (("one", []), ("two", two)):
        folder = f"runs/{name}"
        words = ["-m", "gift_lightning", *FIT, *flags, "--trainer.default_root_dir", folder]
        done = warm.run(words, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"Written to {folder}") == 1
        with (tmp_path / folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        values = {k: v for row in rows for k, v in row.items() if k.startswith("val/") and v}
        weights = load_file(tmp_path / folder / "hf/model.safetensors")
        found.append((weights, {k: float(v) for k, v in values.items()}))
    assert any("pass@1" in name for name in found[0][1])
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)
    for name, weight in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], weight, rtol=0, atol=1e-6)


def test_what_two_processes_cannot_share_is_one_sentence(tmp_path: Path) -> None:
    """Each of them says it; nothing is left, and nobody waits."""
    (tmp_path / "tiny.yaml").write_text(WHOLE.replace("num_heads: 2", "num_heads: 1"))
    flags = ["--trainer.strategy", "FSDP2", "--trainer.strategy.tensor_parallel_size", "2"]
    words = ["-m", "gift_lightning", *FIT, *flags, "--trainer.devices", "2"]
    done = warm.run(words, tmp_path)
    lines = {x for x in done.stderr.splitlines() if x.startswith("gift: error: ")}
    assert done.returncode == 1 and len(lines) == 1
    assert "=2 does not divide the model's num_attention_heads, 1: lower it." in lines.pop()
    assert not (tmp_path / "runs/tiny").exists()


def test_shards_are_exported_as_what_was_trained(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    assert is_folder_of_shards(shards / "runs/tiny/checkpoints/last.ckpt")
    main(["export", "--run", "runs/tiny", "--out", "out"])
    mine, theirs = (load_file(f / "model.safetensors") for f in (Path("runs/tiny/hf"), Path("out")))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer.strategy", "fsdp"], "`fsdp` requires a GPU accelerator"),
        (["--trainer.strategy", "nonsense"], "trainer cannot be set up here: .*nonsense"),
        (["--trainer.accelerator", "gpu"], "trainer cannot be set up here: .*gpu"),
        (["--ckpt_path", "last.ckpt"], "is a folder of shards, which only `--trainer.strategy"),
        (["--trainer.strategy", "fsdp2", "--trainer.precision", "64-true"], "precision 64-true"),
        (
            ["--trainer.strategy", "FSDP2", "--trainer.strategy.tensor_parallel_size", "3"],
            "tensor_parallel_size=3 does not divide the 1 devices",
        ),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else None,
)
def test_what_cannot_run_is_said_in_one_sentence(
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    Path("last.ckpt").mkdir()
    Path("last.ckpt/meta.pt").touch()
    with pytest.raises(SystemExit) as stopped:
        main([*FIT, *flags])
    assert stopped.value.code == 1 and not Path("runs").exists()
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("gift: error: ")]
    assert len(lines) == 1 and re.search(said, lines[0])


HYBRID = """
model:
  class_path: Hybrid
  init_args:
    model:
      class_path: gift_lightning.models.tiny_llama
      init_args: {hidden_size: 16, num_layers: 1, num_heads: 2}
    rewards: [Countdown]
    controller: GAC
    max_completion_length: 8
data:
  class_path: HybridData
  init_args:
    prompts: {class_path: PromptData, init_args: {train: {class_path: CountdownProblems}}}
    demonstrations: CountdownData
trainer: {accelerator: cpu, default_root_dir: runs/tiny}
"""


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TINY, "fsdp trains all weights of a model: use `--trainer.strategy fsdp2`"),
        (WHOLE, "strategy fsdp shards no FrozenCopy: use"),
        (HYBRID, "strategy fsdp does not train Hybrid"),
    ],
)
def test_what_fsdp1_does_not_do(config: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(config)
    done = warm.run(["-m", "gift_lightning", *FIT, "--trainer.strategy", "fsdp1"], tmp_path)
    lines = [x for x in done.stderr.splitlines() if x.startswith("gift: error: ")]
    assert done.returncode == 1 and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "runs/tiny").exists()


def test_lightnings_own_fsdp1_is_refused() -> None:
    module, *_ = two_ranks.sft()
    module._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="would clip by the norm of a device's own shards: use"):
        module.setup("fit")


def test_what_tensor_parallelism_cannot_split() -> None:
    policy = Policy(tiny_llama(hidden_size=12, num_layers=1, num_heads=3))
    assert len(tensor_plan(policy, 3)) == 7
    with pytest.raises(ValueError, match="=2 does not divide the model's num_attention_heads, 3"):
        tensor_plan(policy, 2)
    adapted = Policy(tiny_llama(hidden_size=8, num_layers=1, num_heads=2, lora=Lora(r=2)))
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not split adapters"):
        tensor_plan(adapted, 2)
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 16, "num_attention_heads": 2}
    opt = OPTConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    with pytest.raises(ValueError, match="does not split OPTForCausalLM"):
        tensor_plan(Policy(OPTForCausalLM(opt)), 2)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="of another model: 'b' is only in one of the two"):
        check_names(["a"], ["a", "b"])
