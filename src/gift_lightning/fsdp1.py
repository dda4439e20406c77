"""FSDP1, as far as Lightning has it: all weights of one model. Its successor is `fsdp2`."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    OptimStateKeyType,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer

from gift_lightning.branches import blocks
from gift_lightning.cache import CachedTopK
from gift_lightning.modes import has_adapters
from gift_lightning.policy import Policy
from gift_lightning.references import Reference
from gift_lightning.sharding import check_names
from gift_lightning.skeleton import WRAPPED, Skeleton


class FSDP1(FSDPStrategy):
    """Lightning's `FSDPStrategy` with a transformer block as a unit.

    It clips by norm, which Lightning's does not, and reads checkpoints without unpickling code.
    What `FSDP2` has and this has not: adapters, references with a model of their own, old policies
    and folders of shards. Where the whole policy is needed, as for sampling, every device holds it
    twice for a moment. In a mixed precision the weights themselves are rounded for each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []

    def check(self, policy: Policy, references: Sequence[Reference]) -> None:
        """Raises ValueError if not all weights are trained, or more than they is to be sharded."""
        reason = None
        if has_adapters(policy.model) or not all(p.requires_grad for p in policy.parameters()):
            reason = "trains all weights of a model"
        elif own := [x for x in references if not isinstance(x, CachedTopK)]:
            reason = f"shards no {type(own[0]).__name__}"
        if reason:
            raise ValueError(f"trainer.strategy fsdp {reason}: use `--trainer.strategy fsdp2`.")

    def shard(self, policy: Policy) -> None:
        """Says how the weights of a policy will be spread over the devices."""
        assert self.lightning_module is not None
        self._names = list(self.lightning_module.state_dict())
        self.kwargs["auto_wrap_policy"] = ModuleWrapPolicy({type(x) for x in blocks(policy.base)})
        policy.skeleton = Skeleton(policy.model)
        policy.gathered = self._gathered

    def _setup_model(self, model: nn.Module) -> nn.Module:
        for parameter in model.parameters():  # what was drawn at random is the first process's
            value = parameter.data.to(self.root_device)
            torch.distributed.broadcast(value, 0)
            parameter.data.copy_(value)
        # Lightning gives the device's number, and a CPU has none.
        return FSDP(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )

    @contextmanager
    def _gathered(self, writeback: bool = False) -> Iterator[None]:
        assert self.model is not None
        with FSDP.summon_full_params(self.model, writeback=writeback):
            yield

    def whole_norm(self, norm: Tensor) -> Tensor:
        """[] of all devices' shards, from that of this one's."""
        squared = norm.to(self.root_device).square()
        return self.reduce(squared, reduce_op="sum").sqrt()

    # Checkpoints are those of one process.

    def _state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the module; where all weights are gathered."""
        module = self.lightning_module
        assert module is not None
        found = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
        named = {name.replace(WRAPPED, ""): value.detach() for name, value in found}
        return {name: named[name] for name in self._names}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """On the first process alone."""
        with self._gathered():
            # FSDP's own would hand out views of what is freed, where devices are CPUs.
            state = self._state() if self.is_global_zero else {}
            return {name: value.to("cpu", copy=True) for name, value in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """On the first process alone."""
        assert self.model is not None
        with self._whole_states():
            state = FSDP.optim_state_dict(self.model, optimizer)
        if not self.is_global_zero:
            return {}
        return FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)

    def _whole_states(self) -> AbstractContextManager[None]:
        assert self.model is not None
        # Where devices are CPUs, offloading would hand out views of what is freed.
        offload = self.root_device.type != "cpu"
        whole = FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=False)
        kind = StateDictType.FULL_STATE_DICT
        return FSDP.state_dict_type(self.model, kind, FullStateDictConfig(), whole)

    @torch.no_grad()
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises ValueError if the checkpoint does not hold exactly what the module trains."""
        assert self.model is not None
        saved = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)
        check_names(self._names, saved["state_dict"])
        with self._gathered(writeback=True):
            own = self._state()
            for name, value in saved.pop("state_dict").items():
                own[name].copy_(value)
        states = saved["optimizer_states"] if self.optimizers else []
        with self._whole_states():
            for optimizer, state in zip(self.optimizers, states, strict=True):
                named = FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
                mine = FSDP.optim_state_dict_to_load(self.model, optimizer, named)
                optimizer.load_state_dict(mine)
        return saved


StrategyRegistry.register("fsdp1", FSDP1, "FSDP1 over all devices")
# By its own name Lightning asks for a GPU.
StrategyRegistry.register("fsdp", FSDP1, "FSDP1 over all GPUs", override=True)
