"""How large a run's micro-batches can be, from its data module and without a batch of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gift_lightning.collate import Batch, collate
from gift_lightning.data import SFTData
from gift_lightning.experience import Experience
from gift_lightning.hybrid_data import HybridData
from gift_lightning.models import base_model
from gift_lightning.module import PolicyModule
from gift_lightning.onpolicy import OnPolicy
from gift_lightning.order import MicroBatch
from gift_lightning.problems import ConcatProblems, JSONLProblems, Problems
from gift_lightning.prompts import PromptData
from gift_lightning.rollouts import HFRollout


@dataclass(frozen=True)
class Setting:
    """What of the trainer and of the device decides about memory.

    Attributes:
        accelerator: whether it is not the CPU.
        precision: as the trainer's.
        accumulate: micro-batches of an optimizer step.
        devices: of the whole run.
        replicas: how many see samples of their own; fewer than devices under tensor parallelism.
    """

    accelerator: bool = True
    precision: Any = "32-true"
    accumulate: int = 1
    devices: int = 1
    replicas: int = 1


@dataclass(frozen=True)
class Sizes:
    """The largest micro-batch of a run; empty or 0 for what it has not.

    Attributes:
        lengths: tokens of each demonstration.
        completions: of a micro-batch.
        prompt: tokens of the longest prompt.
        completion: tokens of the longest completion.
        decoded: completions that the policy itself samples side by side.
        group: completions of one prompt.
        together: of these, how many meet in a micro-batch.
        scored: whether a rollout ends with the old log-probabilities of its completions.
    """

    lengths: tuple[int, ...] = ()
    completions: int = 0
    prompt: int = 0
    completion: int = 0
    decoded: int = 0
    group: int = 1
    together: int = 1
    scored: bool = False


def sizes(module: PolicyModule, data: pl.LightningDataModule, setting: Setting) -> Sizes:
    """The largest micro-batch that a data module can make for a module: of the longest samples
    where the data are on this machine, else of samples as long as they may be.

    Raises:
        ValueError: there is no limit, or the data module is of an unknown kind.
    """
    if isinstance(data, HybridData):
        parts = (data.demonstrations, data.prompts)
        sft, rl = (sizes(module, part, setting) for part in parts)
        return replace(rl, lengths=sft.lengths)
    if isinstance(data, SFTData):
        return Sizes(_longest_samples(module, data))
    if isinstance(data, PromptData) and isinstance(module, OnPolicy):
        completion, group = module.sampling.max_completion_length, data.num_generations
        rollout = -(-data.prompts_per_rollout // setting.replicas) * group
        size = data._batch_size or -(-rollout // setting.accumulate)
        own = module.engine.batch_size if isinstance(module.engine, HFRollout) else 0
        prompt = _longest_prompt(module, data, completion)
        steps = -(-rollout // (size * setting.accumulate))
        together = max(1, min(group // steps, size))
        scored = steps * data.num_iterations > 1
        return Sizes((), size, prompt, completion, min(own, rollout), group, together, scored)
    raise ValueError(
        f"gift plan knows SFTData, PromptData and HybridData with their modules, not "
        f"{type(data).__name__} with {type(module).__name__}."
    )


def _longest_samples(module: PolicyModule, data: SFTData) -> tuple[int, ...]:
    sources = [*data.train_sources, *chain.from_iterable(data.val_sources.values())]
    if all(Path(source.path).exists() for source in sources):
        data.prepare(module.tokenizer, module.vocab_size)
        return tuple(sorted(data.train_examples.lengths.tolist())[-data.batch_size :])
    longest = _limited("data.max_length", data.rendering.max_length, _positions(module))
    return tuple(_ragged(longest, data.batch_size))


def _longest_prompt(module: PolicyModule, data: PromptData, completion: int) -> int:
    if _is_here(data.train_problems):
        data._tokenise(module.tokenizer)
        return max(map(len, data.prompt_ids))
    free = _positions(module) - completion
    return _limited("data.max_prompt_length", data.max_prompt_length, free)


def _is_here(problems: Problems) -> bool:
    if isinstance(problems, ConcatProblems):
        return all(map(_is_here, problems.parts))
    return not isinstance(problems, JSONLProblems) or Path(problems.source.path).exists()


def _positions(module: PolicyModule) -> int:
    config = base_model(module.model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _limited(key: str, value: int | None, positions: int) -> int:
    if value is None:
        raise ValueError(
            f"{key} is null and the data are not on this machine, so that the longest sequence is "
            "not known: set it."
        )
    return min(value, positions)


def _ragged(longest: int, count: int) -> list[int]:
    """Lengths of which only one is the longest, so that the others are padded as most are."""
    return [longest] + [max(longest - 1, 1)] * (count - 1)


def demonstrations(lengths: Sequence[int], packing: bool) -> Batch:
    """Sequences of which every token but the first is supervised."""
    samples = [(torch.zeros(n, dtype=torch.int64),) * 2 for n in lengths]
    whole = MicroBatch(tuple(range(len(lengths))), sum(lengths), len(lengths))
    return collate(samples, whole, 0, packing)


def rollout(sizes: Sizes) -> Experience:
    count, tokens = sizes.completions, _ragged(sizes.completion, sizes.completions)
    ones, all_tokens = torch.ones(count), torch.zeros(sum(tokens))
    problems = torch.arange(count) // sizes.together
    return Experience(
        number=0,
        prompt_ids=problems.repeat_interleave(sizes.prompt),  # ids that no one looks up
        prompt_lengths=torch.full((count,), sizes.prompt),
        completion_ids=torch.zeros(sum(tokens), dtype=torch.int64),
        completion_lengths=torch.tensor(tokens),
        sampler_logp=all_tokens,
        finished=ones.bool(),
        rewards=ones,
        advantages=ones,
        counted=ones.bool(),
        trained=ones.bool(),
        problems=torch.arange(-(-count // sizes.group)),
    )
