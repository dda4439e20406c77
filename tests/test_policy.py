import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from gift_lightning import functional, targets
from gift_lightning.collate import collate
from gift_lightning.models import Lora, causal_lm
from gift_lightning.order import MicroBatch
from gift_lightning.policy import (
    Policy,
    supervised,
    supervised_labels,
    supervised_sequences,
)
from gift_lightning.references import FrozenCopy

V = 29
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": V,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "phi": (PhiForCausalLM, PhiConfig, SIZES),  # a head with a bias
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0},
    ),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        SIZES | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    ),
    "cohere": (CohereForCausalLM, CohereConfig, SIZES | {"logit_scale": 0.25}),
}
# What transformers and peft say about models of this size.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def model(family, **changes):
    cls, config, sizes = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = cls(config(**(sizes | changes)))
        for parameter in made.parameters():  # far from uniform, biases far from zero
            nn.init.normal_(parameter, std=0.4)
        return made.train()


def no_dropout(family):
    return {"gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}.get(family, {})


def batch(packing=True, n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(n):
        ids = torch.randint(V, (int(torch.randint(3, 10, (), generator=g)),), generator=g)
        learned = torch.rand(len(ids), generator=g) < 0.6
        examples.append((ids, torch.where(learned, ids, -100)))
    return collate(examples, MicroBatch(tuple(range(n)), 1, n), pad_id=0, packing=packing)


def own_logits(of, b):
    """[n, V], by the model's own forward, one document at a time: neither packed nor padded."""
    out = []
    for i in range(len(b["sample_ids"])):
        mine = b["sequence_ids"] == i
        logits = of.model(input_ids=b["input_ids"][mine][None], use_cache=False).logits[0]
        out.append(logits[:-1][b["labels"][mine][1:] != -100])
    return torch.cat(out)


def gradients(of):
    return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}


def compare(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name],
            expected[name],
            atol=tolerance,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# --- the forward pass -----------------------------------------------------------------------


def test_the_shift_by_hand():
    b = {
        "labels": torch.tensor([[-100, 5, -100, -100, 7, 8], [-100, -100, -100, 9, -100, -100]]),
        "sequence_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, -1, -1]]),
    }
    assert supervised(b).tolist() == [
        [True, False, False, True, True],
        [False, False, True, False, False],
    ]
    assert supervised_labels(b).tolist() == [5, 7, 8, 9]
    assert supervised_sequences(b).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_dense_loss_of_the_models_own_logits(family, tied):
    of = Policy(model(family, tie_word_embeddings=tied, **no_dropout(family)))
    embedding = of.base.get_input_embeddings().weight
    assert (of.head.weight is embedding) == tied
    reference = FrozenCopy()
    reference.setup(of)
    with torch.no_grad():  # away from the reference
        for parameter in of.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02
            )
    for target in (targets.GIFT(beta=2.0), targets.IWSFT(clip_max=1.5)):
        for packing in (True, False):
            b = batch(packing)
            with torch.no_grad():
                base = own_logits(reference.policy, b)
            of.zero_grad()
            dense = functional.token_loss(
                target,
                own_logits(of, b),
                supervised_labels(b),
                reference_logits=base,
                sequence_ids=supervised_sequences(b),
            )
            dense.mean().backward()
            expected = gradients(of)
            of.zero_grad()
            loss, stats = of(b, target, reference=reference.rows(of, b), chunk_size=5)
            loss.mean().backward()
            torch.testing.assert_close(loss, dense, atol=2e-5, rtol=1e-5)
            compare(gradients(of), expected)
            nll = functional.token_loss(targets.OneHot(), own_logits(of, b), supervised_labels(b))
            torch.testing.assert_close(stats.nll, nll, atol=2e-5, rtol=1e-5)


def test_packed_is_unpacked():
    of = Policy(model("llama"))
    found = []
    for packing in (True, False):
        b = batch(packing, n=12)
        of.zero_grad()
        loss, _ = of(b, targets.OneHot())
        order = b["sample_ids"][supervised_sequences(b)].argsort(stable=True)
        loss.sum().backward()
        found.append((b["input_ids"].shape, loss[order], gradients(of)))
    assert found[0][0][0] < found[1][0][0]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-5)
    compare(found[0][2], found[1][2], 1e-4)


def test_padding_is_never_seen():
    of, b = Policy(model("llama")), batch(packing=False)
    expected, _ = of(b, targets.OneHot())
    other = copy.deepcopy(b)
    other["input_ids"][b["sequence_ids"] < 0] = 17
    found, _ = of(other, targets.OneHot())
    assert torch.equal(found, expected)


def test_nothing_supervised_is_a_connected_zero():
    of = Policy(model("llama"))
    for b in (collate([], MicroBatch((), 1, 1), pad_id=0), batch()):
        b["labels"].fill_(-100)
        of.zero_grad()
        loss, _ = of(b, targets.OneHot())
        assert loss.shape == (0,) and loss.requires_grad
        loss.sum().backward()
        assert of.head.weight.grad is not None
        assert all(not p.grad.any() for p in of.parameters() if p.grad is not None)


def test_adapters_train_through_the_fused_head():
    of = Policy(Lora(r=2, extra={"init_lora_weights": False}).wrap(model("llama")))
    assert isinstance(of.model, PeftModel) and isinstance(of.base, LlamaForCausalLM)
    b = batch()
    dense = functional.token_loss(targets.DFT(), own_logits(of, b), supervised_labels(b))
    dense.mean().backward()
    expected = gradients(of)
    of.zero_grad()
    loss, _ = of(b, targets.DFT())
    loss.mean().backward()
    torch.testing.assert_close(loss, dense, atol=2e-5, rtol=1e-5)
    compare(gradients(of), expected)
    assert expected and all("lora" in name for name in expected)


# --- the check before training --------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_passes(family, tied):
    made = model(family, tie_word_embeddings=tied)
    made.gradient_checkpointing_enable()
    of = Policy(made)
    modes = [m.training for m in of.modules()]
    state = torch.get_rng_state()
    for packing in (True, False):
        of.verify(packing)
    assert [m.training for m in of.modules()] == modes and of.model.training
    assert torch.equal(torch.get_rng_state(), state)
    of.model.to(torch.bfloat16)
    of.verify(packing=True)


def test_verify_passes_with_adapters_and_a_tiny_vocabulary():
    lora = Lora(r=2, dropout=0.3, extra={"init_lora_weights": False})
    Policy(lora.wrap(model("llama"))).verify(packing=True)
    Policy(model("llama", vocab_size=3)).verify(packing=True)


class Widened(LlamaForCausalLM):
    """Half precision, but for the logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.float()
        return out


def test_verify_allows_half_precision_its_rounding():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Widened(LlamaConfig(**SIZES, initializer_range=0.4)).to(torch.bfloat16)
    Policy(made).verify(packing=True)


class Doubled(LlamaForCausalLM):
    """A head that the fused one does not know."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


class Shifted(LlamaForCausalLM):
    """A bias that the head's layer does not have, small beside the logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 1e-3 * torch.arange(V)
        return out


@pytest.mark.parametrize("cls", [Doubled, Shifted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify_refuses_an_unknown_head(cls, dtype):
    of = Policy(cls(model("llama").config).to(dtype))
    with pytest.raises(ValueError, match=f"{cls.__name__} computes its logits in a way"):
        of.verify(packing=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logit_scale", 0.26), ("logits_scaling", 1.01), ("final_logit_softcapping", 5.0)],
)
def test_verify_refuses_a_head_that_its_config_misdescribes(name, value):
    made = model("cohere")  # which reads its scale once, when it is made
    setattr(made.config, name, value)
    with pytest.raises(ValueError, match="CohereForCausalLM computes its logits"):
        Policy(made).verify(packing=False)


def test_verify_refuses_a_softcap_under_another_name():
    """Small logits hardly feel a cap of 30: a coarse check would let this one pass."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RecurrentGemmaConfig(**SIZES, logits_soft_cap=30.0, head_dim=8, lru_width=16)
        made = RecurrentGemmaForCausalLM(config)
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM computes its logits"):
        Policy(made).verify(packing=False)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        # Positions of its own, which know nothing of documents.
        (OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16)),
        # A recurrent state that runs on into the next document.
        (JambaForCausalLM, JambaConfig(**SIZES, num_experts=2, mamba_dt_rank=2)),
    ],
    ids=["opt", "jamba"],
)
def test_verify_refuses_packing_that_leaks(cls, config, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of = Policy(cls(config))
    of.model.save_pretrained(tmp_path)
    teacher = FrozenCopy(str(tmp_path))
    teacher.setup(of)
    for model in of, teacher:  # a teacher is held to the packing of the run, and to no more
        model.verify(packing=False)
        with pytest.raises(ValueError, match=r"set data\.packing: false"):
            model.verify(packing=True)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=2, target_modules=["lm_head", "q_proj"]),
        Lora(r=2, extra={"modules_to_save": ["lm_head"]}),
        Lora(r=2, extra={"target_parameters": ["lm_head.weight"]}),
    ],
    ids=["target_modules", "modules_to_save", "target_parameters"],
)
def test_adapters_on_the_head_are_refused(lora):
    with pytest.raises(ValueError, match=r"leave lm_head out of lora\.target_modules"):
        Policy(lora.wrap(model("llama")))
    for fine in (Lora(r=2), Lora(r=2, target_modules=["q_proj", "embed_tokens"])):
        Policy(fine.wrap(model("llama", tie_word_embeddings=True))).verify(packing=True)


# --- gradient checkpointing -----------------------------------------------------------------


def layer_calls(of, b):
    """How often decoder layers run in a forward pass and in a backward pass."""
    calls = []
    # Inside the layers: hooks of a layer itself may stay outside its checkpoint.
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
        for layer in of.base.model.layers
    ]
    of.zero_grad()
    loss, _ = of(b, targets.OneHot())
    forward = len(calls)
    loss.mean().backward()
    for hook in hooks:
        hook.remove()
    return forward, len(calls) - forward


@pytest.mark.parametrize("lora", [None, Lora(r=2, extra={"init_lora_weights": False})])
def test_gradient_checkpointing_happens_and_changes_nothing(tmp_path, lora):
    model("llama").save_pretrained(tmp_path)
    b, found = batch(), {}
    for on in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            of = Policy(causal_lm(str(tmp_path), gradient_checkpointing=on, lora=lora))
        assert all(m.training for m in of.modules())
        of.verify(packing=True)  # which turns it off for itself only
        assert layer_calls(of, b) == (2, 2 if on else 0)
        found[on] = gradients(of)
    compare(found[True], found[False], 1e-7)
    assert all(gradient.any() for gradient in found[True].values())


def test_no_checkpointing_in_eval_mode():
    """Why a model must be put in train mode: transformers loads it in eval mode."""
    made = model("llama")
    made.gradient_checkpointing_enable()
    of = Policy(made)
    assert layer_calls(of, batch()) == (2, 2)
    of.eval()
    assert layer_calls(of, batch()) == (2, 0)


def test_checkpointing_with_dropout_repeats_its_random_numbers():
    b, found = batch(), []
    for on in (False, True):
        made = model("llama", attention_dropout=0.3)
        if on:
            made.gradient_checkpointing_enable()
        of = Policy(made)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            of(b, targets.OneHot())[0].mean().backward()
        found.append(gradients(of))
    compare(found[0], found[1], 1e-7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_implementation": "eager", "use_sliding_window": False}, "full_attention by eager"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention.* by sdpa"),
    ],
)
def test_attention_that_takes_no_mask_of_its_own_shares_no_prompts(change, said):
    kind = {"attn_implementation": "sdpa", "sliding_window": 3, "use_sliding_window": True}
    made = Policy(Qwen2ForCausalLM(Qwen2Config(**SIZES, **(kind | change))))
    made.verify(packing=True)
    with pytest.raises(ValueError, match=said + r".*set data\.share_prompts: false"):
        made.verify(packing=True, share_prompts=True)


def test_a_model_that_ignores_the_mask_of_shared_prompts_is_refused(monkeypatch):
    made = Policy(LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa")))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.verify(packing=True, share_prompts=True)
    forward = made.base.base_model.forward
    monkeypatch.setattr(
        made.base.base_model, "forward", lambda **x: forward(**(x | {"attention_mask": None}))
    )
    with pytest.raises(ValueError, match="does not keep completions apart that share a prompt"):
        made.verify(packing=True, share_prompts=True)
