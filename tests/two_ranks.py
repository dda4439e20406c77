"""Fits that a test starts in several processes: cases by name, one pair of processes for all.

`python two_ranks.py STRATEGY FOLDER JOB...` runs each job in every process of a group that the
environment describes as torchrun does, and alone where there is none. A job is CASE for 20 steps,
CASE:save:FILE for the same with a checkpoint after 11 of them, or CASE:load:FILE for what is left
then; a FILE named `shards` is a folder of shards, at which a run that saves it ends. The first
process writes `FOLDER/NAME.safetensors`, the weights, and `FOLDER/NAME.json`, what was measured;
NAME is the job where it begins or ends in the middle, and else the case.
"""

import json
import os
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from gift_lightning.cache import CachedTopK
from gift_lightning.controllers import GAC
from gift_lightning.countdown_data import CountdownData
from gift_lightning.fsdp1 import FSDP1
from gift_lightning.grpo import GRPO
from gift_lightning.guard import gradient_norm
from gift_lightning.hybrid import Hybrid
from gift_lightning.hybrid_data import HybridData
from gift_lightning.models import Lora, tiny_llama
from gift_lightning.module import PolicyModule
from gift_lightning.problems import CountdownProblems
from gift_lightning.prompts import PromptData
from gift_lightning.references import AdapterOff, FrozenCopy
from gift_lightning.sft import SFT
from gift_lightning.sharding import FSDP2
from gift_lightning.targets import GIFT, PSFT, Distillation, OneHot
from gift_lightning.vllm_rollouts import VLLMServerRollout

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
REPLICAS = RANKS // 2 if "tensor" in sys.argv else RANKS
STEPS, STOP = 20, 11
CACHE = "reference"  # the folder of a cache, beside the results

SPLIT = {"accumulate_grad_batches": 2 // REPLICAS}

Case = tuple[PolicyModule, pl.LightningDataModule, dict[str, Any]]


def policy(tied: bool = True, lora: bool = False, **options: Any) -> Any:
    return tiny_llama(
        **options,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        max_positions=128,
        tie_embeddings=tied,
        lora=Lora(r=4) if lora else None,
        seed=1,
    )


def optimizer(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=3e-4, weight_decay=0.1)


def demonstrations(**options: Any) -> CountdownData:
    """Steps of 8, 8 and 1 sample, of which the last leaves a rank without; uneven validation.

    One process takes two micro-batches where each of two takes one."""
    options = {"num_demonstrations": 17, "num_eval": 3, "seed": 1, **options}
    return CountdownData(batch_size=4, **options)


def sft(target: Any = None, tied: bool = True, lora: bool = False, **options: Any) -> Case:
    module = SFT(policy(tied, lora), target or OneHot(), optimizer=optimizer, **options)
    return module, demonstrations(), SPLIT


def paper(precision: str) -> Case:
    """configs/paper/gift_qwen2.5_7b.yaml, smaller."""
    module = SFT(
        policy(gradient_checkpointing=True),
        GIFT(20.0),
        reference=FrozenCopy(dtype="bfloat16"),
        optimizer=optimizer,
    )
    return module, demonstrations(), {**SPLIT, "precision": precision}


def prompts(**options: Any) -> PromptData:
    """A group of 4 is sampled by one rank and trained by both."""
    options = {"prompts_per_rollout": 4, "num_generations": 4, **options}
    problems = CountdownProblems("train", "any", 12)
    return PromptData(problems, batch_size=4, **options)


RL: dict[str, Any] = {
    "rewards": ["small_rewards.Even"],
    "max_completion_length": 8,
    "reward_workers": 1,
    "optimizer": optimizer,
}


def grpo(lora: bool = False, **options: Any) -> Case:
    return GRPO(policy(lora=lora), **{**RL, **options}), prompts(), SPLIT


def hybrid(estimator: Any = "proxy", **options: Any) -> Case:
    rule = {"update_every": 1, "ema_beta": 0.5, "change_cap": 0.05, "prior": None}
    gac = GAC(**rule, estimator=estimator)
    module = Hybrid(policy(), controller=gac, **{**RL, **options})
    return module, HybridData(prompts(), demonstrations(num_demonstrations=24)), SPLIT


APART: dict[str, Callable[[], Case]] = {  # not of every run, or not the same in one process
    "grpo_server": lambda: grpo(engine=VLLMServerRollout(os.environ["SERVER"])),
    "hybrid_gradient": lambda: hybrid(estimator="gradient"),
}

CASES: dict[str, Callable[[], Case]] = {
    "sft": sft,
    "sft_untied": lambda: sft(tied=False),
    "gift_frozen": lambda: sft(GIFT(5.0), reference=FrozenCopy()),
    "gift_frozen_untied": lambda: sft(GIFT(5.0), tied=False, reference=FrozenCopy()),
    "gift_trust": lambda: sft(GIFT(trust=0.9), reference=FrozenCopy(), reduction="sequence"),
    "gift_adapter_off": lambda: sft(GIFT(5.0), lora=True, reference=AdapterOff()),
    "gift_cached": lambda: sft(GIFT(5.0), reference=CachedTopK(CACHE, k=8)),
    "gift_host": lambda: sft(GIFT(5.0), reference=FrozenCopy(device="cpu")),
    "teacher": lambda: sft(Distillation(0.5), reference=FrozenCopy("gift:countdown")),
    "paper": lambda: paper("32-true"),
    "paper_bf16": lambda: paper("bf16-mixed"),
    "psft": lambda: sft(PSFT(), old_policy_every=3),
    "psft_lora": lambda: sft(PSFT(), lora=True, old_policy_every=3),
    "grpo": grpo,
    "grpo_kl": lambda: grpo(reference=FrozenCopy(), kl_weight=0.1),
    "grpo_kl_lora": lambda: grpo(lora=True, reference=AdapterOff(), kl_weight=0.1),
    "hybrid": lambda: hybrid(target=GIFT(5.0), reference=FrozenCopy()),
}


def local(p: Any) -> Any:
    return p.to_local() if isinstance(p, DTensor) else p


class Watch(pl.Callback):
    """What was measured; the gradient's norm and the samples of every step."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.norms: list[float] = []
        self.samples: list[list[int]] = []
        self.shares: dict[str, float] = {}

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """What part of the weights lies here, and what this process has to do in a rollout."""
        reference = getattr(module.reference, "policy", None)
        for name, policy in (("policy", module.policy), ("reference", reference)):
            if policy is not None:
                held = [(local(p).numel(), p.numel()) for p in policy.parameters()]
                mine, all_of_it = map(sum, zip(*held, strict=True))
                self.shares[name] = mine / all_of_it
        if isinstance(module, GRPO):
            self._count(module.engine, "generate", "prompts", lambda prompts, *_: len(prompts))
            self._count(module.policy, "whole", "gathered", lambda *_: 1)

    def _count(self, owner: Any, method: str, name: str, size: Callable[..., int]) -> None:
        real, self.shares[name] = getattr(owner, method), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.shares[name] += size(*args)
            return real(*args, **kwargs)

        setattr(owner, method, counted)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = gradient_norm(module.parameters())
        if isinstance(trainer.strategy, FSDP1):
            norm = trainer.strategy.whole_norm(norm)
        self.norms.append(float(norm))
        parts = module.replicas.gathered(module._step.sample_ids)
        self.samples.append(sorted(chain.from_iterable(parts)))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        found = trainer.callback_metrics.items()
        self.metrics = {k: float(v) for k, v in found if k.startswith("val")}


def fit(strategy: Any, case: Case, steps: int, save: Path | None, load: Path | None) -> Watch:
    pl.seed_everything(0, verbose=False)
    module, data, options = case
    callbacks: list[pl.Callback] = [Watch()]
    if save:
        saver = ModelCheckpoint(save.parent, save.stem, every_n_train_steps=STOP, save_top_k=-1)
        callbacks.append(saver)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        strategy=strategy,
        devices=RANKS,
        logger=False,
        enable_checkpointing=bool(save),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        gradient_clip_val=0.5,
        log_every_n_steps=7,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, data, ckpt_path=load)
    return callbacks[0]


def write_cache() -> None:
    module, data, _ = sft()
    data.prepare(module.tokenizer, module.vocab_size)
    CachedTopK(CACHE, k=8).write(module.policy, module.tokenizer, data.sets, overwrite=True)


def main(strategy: str, folder: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    if RANKS == 1:
        write_cache()
    for job in jobs or CASES:
        name, verb, path = (*job.split(":"), "", "")[:3]
        checkpoint = Path(folder, path) if path else None
        torch.manual_seed(0)
        case = {**CASES, **APART}[name]()
        used: Any = strategy
        if strategy == "tensor":
            used = FSDP2(tensor_parallel_size=2)
        elif strategy == "fsdp":  # by this name Lightning refuses it on the CPU
            used = FSDP1()
        elif "shards" in path:
            used = FSDP2(save_distributed_checkpoint=True)
        ends = verb == "save" and "shards" in path
        watch = fit(
            used,
            case,
            STOP if ends else STEPS,
            checkpoint if verb == "save" else None,
            checkpoint if verb == "load" else None,
        )
        state = case[0].policy.whole().state_dict()
        if RANK == 0:
            called = name if verb == "save" and not ends else job
            weights = {k: v.clone().contiguous() for k, v in state.items()}
            save_file(weights, f"{called}.safetensors")
            found = [watch.metrics, watch.norms, watch.samples, watch.shares]
            Path(f"{called}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
