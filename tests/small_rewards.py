"""Rewards of the tests, apart from them: every worker imports this, and it imports little."""

from gift_lightning.rewards import Reward


class Even(Reward):
    """A dense reward, so that every group has signal."""

    def score(self, completion, **columns):
        return float(sum(map(ord, completion)) % 3)


class Nothing(Reward):
    def score(self, completion, **columns):
        return None


class Sometimes(Reward):
    """Cannot score problems with an even target."""

    def score(self, completion, target, **columns):
        return float(len(completion) % 2) if target % 2 else None


class Rare(Reward):
    """Only problems with an odd target have signal."""

    reads = ("target",)

    def score(self, completion, target, **columns):
        return float(target % 2 and len(completion) % 2)
