import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gift_lightning.modes import adapter_off, restored, sampling, scoring

# the old name of the checkpointing switch, which every supported transformers has
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _llama(**changes):
    torch.manual_seed(0)
    config = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | changes)))


def _lora():
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(_llama(attention_dropout=0.1), lora)
    model.add_adapter("ref", lora)  # frozen: PEFT's own switches would make it trainable
    return model


def _state(model):
    modules = [
        (
            name,
            module.training,
            vars(module).get("gradient_checkpointing", "absent"),
            vars(module).get("_disable_adapters", "absent"),
            str(vars(module).get("_active_adapter", "absent")),
            vars(module).get("_adapters_disabled", "absent"),
        )
        for name, module in model.named_modules()
    ]
    gradients = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return modules, gradients, model.config.use_cache, model.generation_config.use_cache


def _logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(6)[None], use_cache=False).logits


def test_modes_inside():
    model = _llama().train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    before = _state(model)
    with sampling(model):
        assert not any(m.training for m in model.modules())
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        assert model.config.use_cache and not torch.is_grad_enabled()
        with scoring(model):
            assert not model.config.use_cache
        assert model.config.use_cache
    assert _state(model) == before and torch.is_grad_enabled()


def test_cache_is_really_used_while_checkpointing_is_on():
    model = _llama().train()
    model.gradient_checkpointing_enable()
    with sampling(model):
        assert model(input_ids=torch.arange(4)[None]).past_key_values.get_seq_length() == 4
    with scoring(model):
        assert model(input_ids=torch.arange(4)[None]).past_key_values is None


def test_adapter_off_is_the_base_model():
    base = _logits(_llama().eval())
    model = _lora().eval()
    assert not torch.allclose(_logits(model), base)
    with adapter_off(model):
        assert torch.equal(_logits(model), base)
        with adapter_off(model):
            assert torch.equal(_logits(model), base)
        assert torch.equal(_logits(model), base)  # the inner exit does not switch them on
    assert not torch.allclose(_logits(model), base)


def test_adapter_off_leaves_gradients_and_modes():
    model = _lora().train()
    with adapter_off(model):
        assert model.training and torch.is_grad_enabled()


def test_adapter_off_needs_an_unmerged_adapter():
    with pytest.raises(ValueError, match="no PEFT adapter"), adapter_off(_llama()):
        pass
    model = _lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"), adapter_off(model):
        pass


class Injected(Exception):
    pass


def _meddle(model, rng):
    """What user code and PEFT do to flags."""
    match rng.randrange(6):
        case 0:
            model.train(rng.random() < 0.5)
        case 1:
            model.gradient_checkpointing_enable()
        case 2:
            model.base_model.disable_adapter_layers()
        case 3:
            model.set_adapter(rng.choice(["default", "ref"]))
        case 4:
            model.config.use_cache = rng.random() < 0.5
        case 5:
            for parameter in model.parameters():
                parameter.requires_grad_(rng.random() < 0.5)


def _nest(model, rng, depth):
    with rng.choice([sampling, scoring, adapter_off, restored])(model):
        if rng.random() < 0.5:
            _meddle(model, rng)
        if rng.random() < 0.3:
            raise Injected
        if depth and rng.random() < 0.6:
            before = _state(model)
            try:
                _nest(model, rng, depth - 1)
            finally:
                assert _state(model) == before
        _logits(model)


@pytest.mark.filterwarnings("ignore")  # PEFT and transformers about the flags set here
def test_random_sequences_with_exceptions():
    rng, model, raised = random.Random(0), _lora(), 0
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for round_ in range(200):
        if round_ % 10 == 0:
            _meddle(model, rng)  # another starting point
        for module in model.modules():
            module.training = (
                rng.random() < 0.5
            )  # a mix, as with a frozen part in a training module
        before = _state(model)
        try:
            _nest(model, rng, 3)
        except Injected:
            raised += 1
        assert _state(model) == before
    assert 30 < raised < 170
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
