"""Prompts and their own demonstrations: which belong together, and what a gate makes of them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gift_lightning.collate import Batch, collate
from gift_lightning.collector import Collector
from gift_lightning.experience import Experience
from gift_lightning.functional import IGNORED
from gift_lightning.gates import Advantages, Gate, Groups
from gift_lightning.generation import Completion
from gift_lightning.hybrid_data import HybridData
from gift_lightning.order import MicroBatch, deal
from gift_lightning.prompts import Ticket
from gift_lightning.replicas import Replicas


class Pairs:
    """Finds each prompt's demonstrations by its tokens.

    Args:
        gate: what decides.
        data: both streams, after `setup`.

    Raises:
        ValueError: no prompt has a demonstration.
    """

    def __init__(self, gate: Gate, data: HybridData) -> None:
        self.gate, self.data = gate, data
        examples = data.train_examples
        found: dict[tuple[int, ...], list[int]] = {}
        for i in range(len(examples)):
            ids, labels = examples[i]
            learned = (labels != IGNORED).nonzero()
            found.setdefault(tuple(ids[: int(learned[0])].tolist()), []).append(i)
        self.of = [found.get(tuple(ids), []) for ids in data.prompts.prompt_ids]
        self.num_paired = sum(map(bool, self.of))
        if not self.num_paired:
            raise ValueError(
                f"controller {type(gate).__name__} trains a prompt's own demonstration, and none "
                f"of the {len(self.of)} prompts has one: data.demonstrations must hold records "
                "whose prompts are those of data.prompts, token by token."
            )
        self._rewards: dict[tuple[int, int], float] = {}
        """By problem and demonstration."""

    def decide(
        self,
        experience: Experience,
        collector: Collector,
        advantages: Advantages,
        ends: Sequence[int],
        replicas: Replicas,
    ) -> None:
        """Writes the gate's decision into the experience; the replicas share the scoring."""
        problems = experience.problems.tolist()
        several = [self.of[problem] for problem in problems]
        chosen = [x[experience.number % len(x)] if x else -1 for x in several]
        if self.gate.scores:
            self._score(problems, chosen, collector, ends, replicas)
        keys = zip(problems, chosen, strict=True)
        rewards = torch.tensor([self._rewards.get(key, math.nan) for key in keys])
        shape = (len(problems), -1)
        groups = Groups(
            experience.rewards.reshape(shape),
            torch.tensor(chosen),
            rewards.to(experience.rewards.dtype),
        )
        decision = self.gate.decide(groups, advantages)
        size = groups.rewards.shape[1]
        experience.advantages = decision.advantages.flatten()
        experience.counted = experience.counted & decision.counted.repeat_interleave(size)
        signal = experience.advantages != 0
        trained = experience.counted
        experience.trained = trained & signal if collector.only_signal else trained
        experience.demonstrations = decision.demonstrations
        experience.demonstration_weights = decision.weights

    def _score(
        self,
        problems: Sequence[int],
        chosen: Sequence[int],
        collector: Collector,
        ends: Sequence[int],
        replicas: Replicas,
    ) -> None:
        keys = dict.fromkeys(zip(problems, chosen, strict=True))
        fresh = [key for key in keys if key[1] >= 0 and key not in self._rewards]
        mine = fresh[replicas.index :: replicas.number]
        scored = collector.score(
            [self.data.prompts.problems[problem] for problem, _ in mine],
            [[self._completion(i, ends)] for _, i in mine],
        )
        found = {key: collector.pool.total(one) for key, (one,) in zip(mine, scored, strict=True)}
        for share in replicas.gathered(found):
            self._rewards |= share

    def _completion(self, i: int, ends: Sequence[int]) -> Completion:
        ids, labels = self.data.train_examples[i]
        tokens = ids[labels != IGNORED].tolist()
        return Completion(tokens, [0.0] * len(tokens), tokens[-1] in ends)

    def batch(
        self, experience: Experience, ticket: Ticket, pad_id: int, replicas: Replicas
    ) -> tuple[Batch, Tensor]:
        """The demonstrations of a ticket's micro-batch, and what each weighs."""
        tickets = self.data.prompts.sampler
        assert tickets is not None and experience.demonstrations is not None
        assert experience.demonstration_weights is not None
        examples, ids = self.data.train_examples, experience.demonstrations
        places = np.arange(len(ids))[ticket.step :: tickets.num_steps]
        if self.gate.at_once:
            first = ticket.step == ticket.iteration == 0
            places = np.arange(len(ids) if first else 0)
        longest_first = places[np.argsort(-examples.lengths[ids[places]], kind="stable")]
        size = max(1, -(-len(places) // (tickets.accumulate * replicas.number)))
        parts = deal(longest_first, size, replicas.number, replicas.index)
        part = parts[ticket.part] if ticket.part < len(parts) else ()
        num_tokens = int(examples.num_targets[ids[places]].sum())
        chosen = [examples[int(ids[place])] for place in part]
        micro_batch = MicroBatch(part, num_tokens, len(places))
        batch = collate(chosen, micro_batch, pad_id, self.data.demonstrations.packing)
        weights = experience.demonstration_weights[batch["sample_ids"]]
        batch["sample_ids"] = ids[batch["sample_ids"]]  # places until here
        return batch, weights
