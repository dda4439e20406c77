"""Model factories that a config names, and the tokenizer that belongs to a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gift_lightning.modes import has_adapters
from gift_lightning.quantization import four_bit, keep_layout, merged

DType = Literal["float32", "bfloat16", "float16", "auto"]
_EMBEDDED = "gift:"  # names of models shipped in the package
# Other starts of LoRA move a part of the base weights into the adapters.
_LEAVE_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
# What transformers raises on folders that are not there, not whole, not weights, or want own code.
_UNREADABLE = (OSError, ImportError, ValueError, RuntimeError, SafetensorError)
_reads_weights = ContextVar("reads_weights", default=True)


@dataclass
class Lora:
    """Low-rank adapters by peft; the base is frozen."""

    r: int = 16
    """Rank."""
    alpha: float = 32
    """Scale; the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers; "all-linear" leaves the head alone."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Weight-decomposed adapters."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Any other argument of peft.LoraConfig."""

    def wrap(self, model: PreTrainedModel, revision: str | None = None) -> PreTrainedModel:
        """The model with adapters, which name their base and its revision when they are saved.

        Raises:
            ValueError: peft knows no such adapters, or cannot put them on this model.
        """
        from peft import LoraConfig, get_peft_model

        try:
            config = LoraConfig(
                r=self.r,
                lora_alpha=cast(int, self.alpha),
                lora_dropout=self.dropout,
                target_modules=self.target_modules,
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
                task_type="CAUSAL_LM",
                **self.extra,
            )
            wrapped: Any = get_peft_model(model, config, revision=revision)
        except (TypeError, ValueError, ImportError, KeyError) as error:
            raise ValueError(
                f"model.lora cannot be put on this model: {_first_line(error)}"
            ) from error
        return cast(PreTrainedModel, wrapped)


def embedded_path(name: str) -> str:
    """The folder of a model shipped in the package for "gift:NAME", any other name as it is.

    Raises:
        ValueError: if the package ships no such model.
    """
    if not name.startswith(_EMBEDDED):
        return name
    path = Path(str(files("gift_lightning") / "assets" / name.removeprefix(_EMBEDDED)))
    if not path.is_dir():
        shipped = sorted(_EMBEDDED + p.name for p in path.parent.glob("*") if p.is_dir())
        raise ValueError(f"no embedded model {name!r}: the package ships {', '.join(shipped)}.")
    return str(path)


@contextmanager
def without_weights() -> Iterator[None]:
    """In here `causal_lm` makes a model of the right shapes, and reads no weights."""
    token = _reads_weights.set(False)
    try:
        yield
    finally:
        _reads_weights.reset(token)


def causal_lm(
    pretrained: str,
    dtype: DType = "float32",
    gguf_file: str | None = None,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    lora: Lora | None = None,
    load_in_4bit: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A pretrained causal language model; no remote code is ever run.

    Args:
        pretrained: a folder, a hub id, or "gift:countdown" for the embedded base. Adapters that a
            run with lora left are merged into their base: training goes on from what they learned.
        dtype: of the weights. Full training wants float32: bfloat16 weights round small updates
            away. With lora a bfloat16 base is fine, the adapters stay in float32.
        gguf_file: a GGUF file in that folder to read instead of safetensors (needs the gguf extra).
        attn_implementation: of transformers; sdpa by default.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: adapters to train instead of the weights.
        load_in_4bit: hold the linear layers in 4 bits (NF4 with double quantisation, by
            bitsandbytes: the qlora extra) and compute in `dtype`. With lora this is QLoRA; without,
            the model can be measured but not trained.
        revision: of a hub id.

    Returns:
        The model, in train mode (transformers loads it in eval mode, which silently turns dropout
        and gradient checkpointing off).

    Raises:
        ValueError: if it cannot be loaded, or not in 4 bits.
    """
    folder = Path(embedded_path(pretrained))
    adapters = (folder / "adapter_config.json").is_file()
    if load_in_4bit and (adapters or gguf_file is not None):
        what, instead = ("a GGUF file", "the model's safetensors")
        if adapters:
            what, instead = "adapters", "what `gift export --merge` makes of them"
        raise ValueError(f"model.load_in_4bit cannot read {what}: give {instead}.")
    quantized = four_bit(dtype) if load_in_4bit else {}
    try:
        if adapters and not (folder / "adapter_model.safetensors").is_file():
            raise OSError("adapters are only read from adapter_model.safetensors")
        base = None
        if adapters:
            import peft  # here and not above: it takes seconds

            base = peft.PeftConfig.from_pretrained(str(folder))
        load: Any = _loaded if _reads_weights.get() else _unloaded
        model = load(
            base.base_model_name_or_path if base else embedded_path(pretrained),
            dtype=dtype,
            gguf_file=gguf_file,
            attn_implementation=attn_implementation,
            revision=base.revision if base else revision,
            trust_remote_code=False,
            **quantized,
        )
    except _UNREADABLE as error:
        raise ValueError(
            f"model.pretrained={pretrained!r} cannot be loaded: give a folder with config.json and "
            f"safetensors, a hub id, or gift:countdown ({_first_line(error)})"
        ) from error
    model.gguf_file = gguf_file
    if gguf_file is not None:  # plain tensors by now, which transformers would refuse to save
        model.hf_quantizer, model.is_quantized = None, False
        vars(model.config).pop("quantization_config", None)
    model.can_be_loaded_again = gguf_file is None and not adapters
    keep_layout(model)
    if adapters:
        if _reads_weights.get():
            model = merged(peft.PeftModel.from_pretrained(model, str(folder)))
        model.config._name_or_path = model.name_or_path = str(folder)
        model.requires_grad_(True)
    return _for_training(model, gradient_checkpointing, lora, revision)


def tiny_llama(
    tokenizer: str = "gift:countdown",
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    intermediate_size: int | None = None,
    max_positions: int = 512,
    tie_embeddings: bool = True,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    lora: Lora | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A small Llama with random weights, for tests and for training from scratch.

    Args:
        tokenizer: the folder, hub id or embedded model whose tokenizer it uses.
        hidden_size: width.
        num_layers: decoder layers.
        num_heads: attention heads.
        intermediate_size: width of the MLP; 4 · hidden_size by default.
        max_positions: longest sequence.
        tie_embeddings: share the embedding with the head.
        dropout: on attention weights.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: adapters to train instead of the weights.
        seed: of the weights; the global random state is left alone.
    """
    vocabulary = load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_embeddings,
        attention_dropout=dropout,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.can_be_loaded_again = False  # type: ignore[assignment]
    model.config._name_or_path = model.name_or_path = embedded_path(tokenizer)
    return _for_training(model, gradient_checkpointing, lora)


def load_tokenizer(pretrained: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub id or embedded model, with a padding token.

    Raises:
        ValueError: if it cannot be loaded or has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            embedded_path(pretrained), gguf_file=gguf_file, trust_remote_code=False
        )
    except _UNREADABLE as error:
        raise ValueError(
            f"the tokenizer of {pretrained!r} cannot be loaded: set model.tokenizer "
            f"({_first_line(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {pretrained!r} has no eos token: give one that has.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside adapters, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if has_adapters(model) else model)


def require_intact_base(model: torch.nn.Module, instead: str) -> None:
    """Refuses adapters that changed the weights which they were put on.

    Args:
        model: the policy.
        instead: what takes such adapters, for the message.

    Raises:
        ValueError: if the model without its adapters is not the base.
    """
    if not has_adapters(model):
        return
    for name, config in model.peft_config.items():
        start = getattr(config, "init_lora_weights", True)
        if start not in _LEAVE_THE_BASE:
            raise ValueError(
                f"adapter {name!r} rewrites the base by init_lora_weights={start!r}, so that "
                f"without it the model is not the base: use another start, or {instead}."
            )


def for_export(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy with its adapters merged if their base cannot be loaded again (a GGUF
    file, random weights)."""
    again = getattr(base_model(model), "can_be_loaded_again", True)
    return merged(model) if has_adapters(model) and not again else model


def _loaded(name: str, **options: Any) -> PreTrainedModel:
    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    random = sorted(found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]})
    if random:
        more = f" and {len(random) - 1} more" if random[1:] else ""
        raise OSError(
            f"its files have no {random[0]}{more} of the right shape, which would be random"
        )
    return cast(PreTrainedModel, model)


def _unloaded(
    name: str,
    *,
    dtype: DType,
    attn_implementation: str | None,
    quantization_config: Any = None,
    device_map: Any = None,
    **source: Any,
) -> PreTrainedModel:
    """What `from_pretrained` would give, with weights that are not those of the folder."""
    config = AutoConfig.from_pretrained(name, **source)
    if kind := getattr(config, "quantization_config", None):
        if not kind.get("load_in_4bit"):
            raise OSError(
                "its weights are quantised in a way that gift plan cannot count; give it the model "
                "that they were made from"
            )
        quantization_config = kind
    own = config.dtype if dtype == "auto" else getattr(torch, dtype)
    options = {"dtype": own, "attn_implementation": attn_implementation}
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, **options))
    model.is_quantized = quantization_config is not None  # type: ignore[assignment]
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _for_training(
    model: PreTrainedModel,
    gradient_checkpointing: bool,
    lora: Lora | None,
    revision: str | None = None,
) -> PreTrainedModel:
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        model = lora.wrap(model, revision)
    return model.train()
