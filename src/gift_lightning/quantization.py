"""A base in 4 bits (QLoRA): how it is loaded, what it must be kept from, how adapters leave it."""

import copy
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel


def four_bit(dtype: str) -> dict[str, Any]:
    """What `from_pretrained` takes for NF4 with double quantisation (QLoRA, arXiv 2305.14314).

    Each process of a run loads onto the device of its own.

    Args:
        dtype: that layers compute in; "auto" is bfloat16.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "model.load_in_4bit needs bitsandbytes: pip install 'gift-lightning[qlora]'."
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether its weights can only be trained through adapters."""
    return bool(getattr(model, "is_quantized", False))


def keep_layout(model: PreTrainedModel) -> None:
    """Keeps 4-bit weights as they were loaded.

    On some CPUs (AVX-512 with bfloat16) bitsandbytes packs them anew in the first forward pass in
    eval mode, which rounds their scales and leaves them without a backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def merged(
    model: "PeftModel", base: PreTrainedModel | None = None, wide: bool = False
) -> PreTrainedModel:
    """A copy of the model with its adapters in the weights.

    4 bits would round most of the adapters away: a quantised base is dequantised first.

    Args:
        model: with one adapter.
        base: another base to merge into, which is changed.
        wide: add in float32, and leave the weights so.
    """
    import peft  # here and not above: it takes seconds

    model = copy.deepcopy(model)
    if base is not None or is_quantized(cast(PreTrainedModel, model.get_base_model())):
        config: Any = copy.copy(model.peft_config[model.active_adapter])
        adapters = peft.get_peft_model_state_dict(model)
        if base is None:  # a start that rewrites the base has done so: not a second time
            config.init_lora_weights = True
        bare: Any = model.unload()
        model = cast(peft.PeftModel, peft.get_peft_model(base or bare.dequantize(), config))
        peft.set_peft_model_state_dict(model, adapters)
    if wide:
        model.float()
    return cast(PreTrainedModel, model.merge_and_unload())


def unquantized(model: "PeftModel") -> PreTrainedModel:
    """The base of adapters as it was before quantisation, loaded again.

    Raises:
        ValueError: if it is only there quantised.
    """
    config = model.peft_config[model.active_adapter]
    base = cast(PreTrainedModel, model.get_base_model())
    made = AutoModelForCausalLM.from_pretrained(
        str(config.base_model_name_or_path),
        dtype=base.dtype,
        revision=config.revision,
        trust_remote_code=False,
    )
    if is_quantized(made):
        raise ValueError(
            f"--base original: {config.base_model_name_or_path!r} is quantised itself, use "
            "dequantized."
        )
    return cast(PreTrainedModel, made)
