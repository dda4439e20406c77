"""Model modes for sampling and scoring, put back exactly as they were, also after an exception.

`generate` and most helpers change flags of a model (train mode, gradient checkpointing, the cache,
adapters) and forget some of them on the way back; a training run then goes on with dropout off or
with a stale adapter. Each context here takes a snapshot of every flag first and restores that,
whatever happened inside.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

_ABSENT = object()
# the last three are PEFT's: on its layers, on its wrappers and on the model
_FLAGS = (
    "training",
    "gradient_checkpointing",
    "_disable_adapters",
    "_active_adapter",
    "_adapters_disabled",
)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Puts back every flag on exit.

    Per module: train/eval, checkpointing, adapters on/off and which is active; per config:
    `use_cache`; per parameter: `requires_grad`.
    """
    flags = [
        (vars(module), name, _copied(vars(module).get(name, _ABSENT)))
        for module in model.modules()
        for name in _FLAGS
    ]
    caches = [(config, config.use_cache) for config in _configs(model)]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for attributes, name, value in flags:
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value
        for config, use_cache in caches:
            config.use_cache = use_cache
        for parameter, requires_grad in gradients:
            # only where it differs: setting it is an error on non-leaf tensors of some wrappers
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """For generation: eval mode, cache on, no checkpointing, no gradient; adapters unchanged."""
    with restored(model), torch.no_grad():
        _inference(model, use_cache=True)
        yield


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """For log-probabilities: as `sampling`, with the cache off.

    A cache object would hide from transformers where packed documents begin.
    """
    with restored(model), torch.no_grad():
        _inference(model, use_cache=False)
        yield


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base model under the adapters of a PEFT model, which are switched off. Gradients and
    other modes are left alone.

    Raises:
        ValueError: there is no PEFT model in `model`, or an adapter is merged into the base
            weights.
    """
    modules = list(model.modules())
    switches = [module for module in modules if hasattr(module, "disable_adapter")]
    if not switches:
        raise ValueError(
            f"{type(model).__name__} has no PEFT adapter to switch off: "
            "train with model.lora, or use a frozen copy as reference."
        )
    if any(getattr(module, "merged_adapters", None) for module in modules):
        raise ValueError(
            "An adapter is merged into the base weights: "
            "call unmerge_adapter() before switching adapters off."
        )
    with restored(model), ExitStack() as stack:
        for module in switches:
            stack.enter_context(module.disable_adapter())  # type: ignore[operator]
        yield


def has_adapters(model: nn.Module) -> TypeGuard["PeftModel"]:
    """Whether peft has wrapped it, without importing peft: that takes seconds, and most runs have
    no adapters."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _inference(model: nn.Module, use_cache: bool) -> None:
    for module in model.modules():
        module.training = False
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    for config in _configs(model):
        config.use_cache = use_cache


def _configs(model: nn.Module) -> list[Any]:
    """Every different config and generation config below `model` that has a `use_cache` switch."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = vars(module).get(name)
            if hasattr(config, "use_cache"):
                found[id(config)] = config
    return list(found.values())


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
