"""FSDP2: weights, gradients and optimizer states spread over all devices, layer by layer."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from gift_lightning.branches import blocks
from gift_lightning.modes import has_adapters
from gift_lightning.policy import Policy
from gift_lightning.quantization import is_quantized
from gift_lightning.skeleton import Skeleton, full, sharded_like

_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism by `fully_shard`, on any device.

    A transformer block is a unit, and so are what is left and an embedding that is not the head.
    Units are gathered in the weights' own dtype: a block while it is computed and the next one is
    fetched, what is left from the start of the forward pass to the end of the backward pass.
    Gradients are those of one process.

    Args:
        tensor_parallel_size: neighbouring devices that share every matrix product of a block, and
            see the same samples; by the plan that the model's config brings.
        save_distributed_checkpoint: whether a checkpoint is a folder to which every process writes
            its shards, or one file for which they are gathered in the first process's memory.
        process_group_backend: of torch.distributed; by default nccl on GPUs, gloo on the CPU.
        timeout: of the processes' waiting for each other.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            "auto",
            tensor_parallel_size,
            save_distributed_checkpoint,
            process_group_backend,
            timeout,
        )
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        self._data_parallel_size = data_parallel_size(world, self.tensor_parallel_size)
        precision = self.precision_plugin.precision
        if precision not in _PRECISIONS:
            raise ValueError(
                f"trainer.precision {precision} does not run with strategy fsdp2: choose one of "
                f"{', '.join(_PRECISIONS)}."
            )
        super().setup_environment()

    def shard(self, policy: Policy) -> None:
        """Spreads the weights of a policy over the devices; a second time, nothing.

        Raises:
            ValueError: they are in 4 bits.
        """
        if isinstance(policy, FSDPModule):
            return
        if is_quantized(policy.base):
            raise ValueError(
                "trainer.strategy fsdp2 does not shard 4-bit weights: use ddp, or leave "
                "model.model.load_in_4bit out."
            )
        for parameter in policy.parameters():
            if parameter.requires_grad:  # what was drawn at random is the first process's
                parameter.data.copy_(self._from_first(parameter.data))
        policy.skeleton = Skeleton(policy.model)
        if self.tensor_parallel_size > 1:
            plan = tensor_plan(policy, self.tensor_parallel_size)
            parallelize_module(policy.base.base_model, self.device_mesh["tensor_parallel"], plan)
        mesh = self.device_mesh["data_parallel"]
        for unit in units(policy):
            fully_shard(unit, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        for method in ("token_logp", "projected"):
            register_fsdp_forward_method(policy, method)

    def _from_first(self, value: Tensor) -> Tensor:
        value = value.to(self.root_device)
        torch.distributed.broadcast(value, 0)
        return value

    # Checkpoints.

    @torch.no_grad()
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises ValueError if the checkpoint does not hold exactly what the module trains."""
        assert self.lightning_module is not None
        path, own = Path(checkpoint_path), self.lightning_module.state_dict()
        check_names(own, _saved_names(path))
        if is_folder_of_shards(path):
            return super().load_checkpoint(path, weights_only)
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        for name, value in saved.pop("state_dict").items():
            own[name].copy_(sharded_like(own[name], value))
        states = saved["optimizer_states"] if self.optimizers else []
        for optimizer, state in zip(self.optimizers, states, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in state["state"].items():
                for name, value in values.items():
                    if value.shape == parameters[i].shape:
                        values[name] = sharded_like(parameters[i], value)
            optimizer.load_state_dict(state)
        return saved

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """As of one process; where it is not sharded, on the first process alone."""
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As of one process; where it is not sharded, on the first process alone."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        state = optimizer.state_dict()
        return {**state, "state": {i: self._gathered(x) for i, x in state["state"].items()}}

    def _gathered(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in values.items():
            whole = full(value)
            if self.is_global_zero:
                found[name] = whole.cpu()
        return found

    def reduce(
        self,
        tensor: Tensor | Any,
        group: Any | None = None,
        reduce_op: ReduceOp | str | None = "mean",
    ) -> Tensor:
        """Over the data replicas."""
        group = group or self.device_mesh["data_parallel"].get_group()
        return super().reduce(tensor, group, reduce_op)


StrategyRegistry.register("fsdp2", FSDP2, "FSDP2 over all devices")


def units(policy: Policy) -> list[nn.Module]:
    """What is gathered by itself: the blocks, and an embedding that is not the head. The rest is
    one more unit."""
    embedding = policy.base.get_input_embeddings()
    apart = embedding is not None and embedding.weight is not policy.head.weight
    return [*blocks(policy.base), *([embedding] if apart else [])]


def data_parallel_size(devices: int, tensor_parallel_size: int) -> int:
    """How many see samples of their own.

    Raises:
        ValueError: the devices cannot be grouped so.
    """
    if tensor_parallel_size < 1 or devices % tensor_parallel_size:
        raise ValueError(
            f"trainer.strategy.tensor_parallel_size={tensor_parallel_size} does not divide the "
            f"{devices} devices: change one of them."
        )
    return devices // tensor_parallel_size


_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def tensor_plan(policy: Policy, size: int) -> dict[str, ParallelStyle]:
    """How the matrices of a block are split over some devices.

    Raises:
        ValueError: the model has no such plan, trains adapters, or its sizes are no multiples.
    """
    key = f"trainer.strategy.tensor_parallel_size={size}"
    config = policy.base.config.get_text_config()
    plan = getattr(config, "base_model_tp_plan", None) or {"": "none"}
    if has_adapters(policy.model) or not _STYLES.keys() >= set(plan.values()):
        kind = "adapters" if has_adapters(policy.model) else type(policy.base).__name__
        raise ValueError(f"{key} does not split {kind}: leave it at 1.")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := getattr(config, name, 0)) % size:
            raise ValueError(f"{key} does not divide the model's {name}, {count}: lower it.")
    return {name: _STYLES[style]() for name, style in plan.items()}


def is_folder_of_shards(path: Path) -> bool:
    """Whether a checkpoint is one."""
    return (path / _METADATA_FILENAME).is_file()


def check_names(own: Iterable[str], saved: Iterable[str]) -> None:
    """Raises ValueError if a checkpoint does not hold exactly what a module trains."""
    if wrong := set(own) ^ set(saved):
        raise ValueError(
            f"the checkpoint is of another model: {min(wrong)!r} is only in one of the two; "
            "give the model.model that it was trained with."
        )


def read_shards(folder: Path, own: dict[str, Tensor]) -> dict[str, Any]:
    """Reads a folder of shards in one process, without a group of them.

    Args:
        folder: a checkpoint.
        own: the tensors to fill, under the names of the checkpoint's.

    Returns:
        All else that the checkpoint holds, but for the optimizer's state.
    """
    check_names(own, _saved_names(folder))
    checkpoint.load({"state_dict": own}, checkpoint_id=folder, no_dist=True)
    return torch.load(folder / _METADATA_FILENAME, map_location="cpu", weights_only=True)


def _saved_names(path: Path) -> list[str]:
    if not is_folder_of_shards(path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return list(state["state_dict"])
    names = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    return [name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")]
