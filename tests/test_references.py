import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gift_lightning import targets
from gift_lightning.collate import collate
from gift_lightning.models import Lora
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised, supervised_labels
from gift_lightning.references import AdapterOff, FrozenCopy, OldPolicy, Probe, _MovedRows

V = 23
# What transformers and peft say about models of this size.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def model(seed=0, **changes):
    config = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,  # far from uniform
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(config | changes))).train()


def policy(lora=None, **changes):
    made = model(**changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Policy(made if lora is None else lora.wrap(made))


def samples(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        ids = torch.randint(V, (int(torch.randint(3, 10, (), generator=g)),), generator=g)
        learned = torch.rand(len(ids), generator=g) < 0.6
        out.append((ids, torch.where(learned, ids, -100)))
    return out


def batch(n=6, seed=0):
    return collate(samples(n, seed), MicroBatch(tuple(range(n)), 1, n), pad_id=0)


def ready(reference, of):
    reference.setup(of)
    return reference


def rows(reference, of, b):
    labels = supervised_labels(b)
    return reference.rows(of, b).logits(slice(0, len(labels)))


def train(of, reference, steps=3):
    optimizer = torch.optim.SGD([p for p in of.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        b = batch(seed=step)
        optimizer.zero_grad()
        loss, _ = of(b, targets.GIFT(beta=2.0), reference=reference.rows(of, b))
        loss.mean().backward()
        optimizer.step()


ADAPTERS = {
    "plain": Lora(r=2, dropout=0.3),
    "rslora": Lora(r=2, use_rslora=True),
    "dora": Lora(r=2, use_dora=True),
    "not the identity": Lora(r=2, extra={"init_lora_weights": False}),
    "with modules": Lora(r=2, extra={"modules_to_save": ["norm", "embed_tokens"]}),
}


# --- what a reference is --------------------------------------------------------------------


def test_rows_are_the_models_own_log_probabilities():
    of, b = policy(), batch()
    reference = ready(FrozenCopy(), of)
    with torch.no_grad():
        expected = (
            model()
            .eval()(input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False)
            .logits[:, :-1][supervised(b)]
        )
    torch.testing.assert_close(rows(reference, of, b), expected, atol=1e-5, rtol=0)
    labels = supervised_labels(b)
    logp = expected.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(reference.label_logp(of, b), logp, atol=1e-5, rtol=0)
    out = torch.empty(2, V)
    found = reference.rows(of, b).logits(slice(3, 5), out)
    torch.testing.assert_close(found, expected[3:5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_frozen_copy_is_adapter_off(name):
    base, adapted, b = policy(), policy(ADAPTERS[name]), batch()
    copied, off = ready(FrozenCopy(), base), ready(AdapterOff(), adapted)
    before = rows(off, adapted, b)
    torch.testing.assert_close(before, rows(copied, base, b), atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    train(adapted, off)
    assert torch.equal(rows(off, adapted, b), before)
    on, _ = adapted(b, targets.OneHot())
    assert (on + off.label_logp(adapted, b)).abs().max() > 0.1  # the adapters do something


def test_copy_of_adapters_at_their_start_is_the_base():
    of, b = policy(ADAPTERS["plain"]), batch()
    copied, off = ready(FrozenCopy(), of), ready(AdapterOff(), of)
    torch.testing.assert_close(rows(copied, of, b), rows(off, of, b), atol=1e-5, rtol=0)
    train(of, copied)
    torch.testing.assert_close(rows(copied, of, b), rows(off, of, b), atol=1e-5, rtol=0)


def test_other_adapters_are_off_too():
    of, b = policy(ADAPTERS["not the identity"]), batch()
    other = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    of.model.add_adapter("other", other)
    of.model.base_model.set_adapter(["default", "other"])
    off = ready(AdapterOff(), of)
    base = policy()
    expected = rows(ready(FrozenCopy(), base), base, b)
    torch.testing.assert_close(rows(off, of, b), expected, atol=1e-5, rtol=0)
    assert of.model.active_adapters == ["default", "other"]


def test_the_same_gradients_with_either():
    found = []
    for reference in (FrozenCopy(), AdapterOff()):
        of = policy(Lora(r=2))
        train(of, ready(reference, of))
        found.append(torch.cat([p.detach().flatten() for p in of.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [FrozenCopy, AdapterOff])
def test_dropout_and_checkpointing_are_off_in_the_reference_alone(kind):
    of, b = policy(Lora(r=2, dropout=0.5), attention_dropout=0.5), batch()
    of.base.gradient_checkpointing_enable()
    reference = ready(kind(), of)
    modes = [m.training for m in of.modules()]
    runs = []
    of.base.model.layers[0].register_forward_hook(lambda m, *_: runs.append(m.training))
    first, second = rows(reference, of, b), rows(reference, of, b)
    assert torch.equal(first, second)
    plain = policy()
    expected = rows(ready(FrozenCopy(), plain), plain, b)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    assert not any(runs)
    assert [m.training for m in of.modules()] == modes and of.model.training
    assert of.base.model.layers[0].gradient_checkpointing
    nll = [of(b, targets.OneHot())[0] for _ in range(2)]
    assert not torch.equal(*nll) and runs[-1]  # dropout of the policy


@pytest.mark.parametrize("kind", [FrozenCopy, AdapterOff])
def test_no_gradient_reaches_a_reference(kind):
    of, b = policy(Lora(r=2)), batch()
    reference = ready(kind(), of)
    given = reference.rows(of, b)
    assert not given.hidden.requires_grad and not given.head.weight.requires_grad
    loss, _ = of(b, targets.TargetSFT(), reference=given)
    loss.sum().backward()
    copied = [] if kind is AdapterOff else list(reference.policy.parameters())
    base = [p for n, p in of.named_parameters() if "lora" not in n]
    assert all(p.grad is None and not p.requires_grad for p in [*copied, *base])


def test_nothing_supervised():
    of, b = policy(Lora(r=2)), collate([], MicroBatch((), 1, 1), pad_id=0)
    for reference in (FrozenCopy(), AdapterOff()):
        assert ready(reference, of).label_logp(of, b).shape == (0,)
        assert rows(reference, of, b).shape == (0, V)


# --- a frozen copy --------------------------------------------------------------------------


def test_a_copy_belongs_to_no_module():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy()
            self.reference = FrozenCopy()

    holder = Holder()
    before = [set(holder.state_dict()), {n for n, _ in holder.named_parameters()}]
    holder.reference.setup(holder.policy)
    after = [set(holder.state_dict()), {n for n, _ in holder.named_parameters()}]
    assert after == before and all(m is not holder.reference.policy for m in holder.modules())
    mine = {p.data_ptr() for p in holder.parameters()}
    copied = list(holder.reference.policy.parameters())
    assert mine.isdisjoint(p.data_ptr() for p in copied)
    assert not any(p.requires_grad for p in copied)
    assert not any(m.training for m in holder.reference.policy.model.modules())


def test_a_tied_copy_is_tied_to_itself():
    of = policy(tie_word_embeddings=True)
    reference = ready(FrozenCopy(), of)
    copied = reference.policy
    assert copied.head.weight is copied.base.get_input_embeddings().weight
    assert copied.head.weight is not of.head.weight
    b = batch()
    before = rows(reference, of, b)
    train(of, reference)
    assert torch.equal(rows(reference, of, b), before)


def test_a_copy_is_made_once():
    of, b = policy(), batch()
    reference = ready(FrozenCopy(), of)
    before = reference.label_logp(of, b)
    train(of, reference)
    reference.setup(of)  # as when a run is validated after its training
    assert torch.equal(reference.label_logp(of, b), before)


def test_dtype_of_a_copy():
    of, b = policy(), batch()
    half, whole = ready(FrozenCopy(dtype="bfloat16"), of), ready(FrozenCopy(), of)
    assert half.policy.head.weight.dtype == torch.bfloat16
    assert of.head.weight.dtype == torch.float32
    found, expected = rows(half, of, b), rows(whole, of, b)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_rows_that_move_between_devices():
    of, b = policy(), batch()
    reference = ready(FrozenCopy(device="cpu"), of)
    moved = _MovedRows(reference.rows(of, b), torch.device("cpu"))
    assert moved.logp_y is None
    found = moved.logits(slice(2, 5), torch.empty(3, V))
    torch.testing.assert_close(found, rows(reference, of, b)[2:5], atol=1e-5, rtol=0)


# --- a teacher ------------------------------------------------------------------------------


def test_teacher_by_path(tmp_path):
    model(seed=5, hidden_size=8).save_pretrained(tmp_path)  # of another width
    of, b = policy(), batch()
    teacher = ready(FrozenCopy(str(tmp_path)), of)
    other = policy(seed=5, hidden_size=8)
    expected = rows(ready(FrozenCopy(), other), other, b)
    torch.testing.assert_close(rows(teacher, of, b), expected, atol=1e-5, rtol=0)
    assert teacher.policy.head.weight.dtype == torch.float32 or torch.cuda.is_available()
    assert not teacher.policy.model.training
    loss, _ = of(b, targets.Distillation(), reference=teacher.rows(of, b))
    loss.sum().backward()
    half = ready(FrozenCopy(str(tmp_path), dtype="bfloat16"), of)
    assert half.policy.head.weight.dtype == torch.bfloat16


def test_teacher_that_does_not_fit(tmp_path):
    model(vocab_size=V + 1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{V + 1} entries, the policy of {V}: .* share") as caught:
        FrozenCopy(str(tmp_path)).setup(policy())
    assert str(tmp_path) in str(caught.value)


def test_teacher_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        FrozenCopy(str(tmp_path / "none")).setup(policy())


# --- what is refused ------------------------------------------------------------------------


def test_adapter_off_without_adapters():
    with pytest.raises(ValueError, match=r"needs adapters .* or use reference FrozenCopy"):
        AdapterOff().setup(policy())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_adapter_off_with_trained_biases(bias):
    of = policy(Lora(r=2, extra={"bias": bias}), attention_bias=True)
    with pytest.raises(ValueError, match=r"'default' trains biases .* bias to none"):
        AdapterOff().setup(of)
    # The refusal is right: these biases are in the base, and a copy does not follow them.
    b, off = batch(), AdapterOff()
    copied = Probe(ready(FrozenCopy(), of), of, b)
    drifting = Probe(off, of, b)
    train(of, off)
    copied.check(of)
    with pytest.raises(RuntimeError, match="the reference changed"):
        drifting.check(of)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapter_off_with_a_rewritten_base(init):
    """Such adapters start by moving a part of the base weights into themselves."""
    of, b = policy(Lora(r=2, extra={"init_lora_weights": init})), batch()
    with pytest.raises(ValueError, match=f"rewrites the base .*{init}.* FrozenCopy"):
        AdapterOff().setup(of)
    base = policy()
    found, expected = rows(ready(FrozenCopy(), of), of, b), rows(ready(FrozenCopy(), base), base, b)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# --- the probe ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        (FrozenCopy, None),
        (FrozenCopy, ADAPTERS["plain"]),
        *((AdapterOff, lora) for lora in ADAPTERS.values()),
    ],
    ids=["copy", "copy of adapters", *ADAPTERS],
)
def test_bit_identical_through_training_and_resume(kind, lora):
    of, b = policy(lora, attention_dropout=0.2), batch(seed=9)
    reference = ready(kind(), of)
    probe = Probe(reference, of, b)
    before = [p.detach().clone() for p in of.parameters()]
    for _ in range(5):
        train(of, reference, steps=2)
        probe.check(of)
    moved = [not torch.equal(p, q) for p, q in zip(of.parameters(), before, strict=True)]
    assert moved == [p.requires_grad for p in of.parameters()]

    again = policy(lora, attention_dropout=0.2)  # a new process: set up, then the checkpoint
    fresh = ready(kind(), again)
    again.load_state_dict(of.state_dict())
    assert torch.equal(fresh.label_logp(again, b), probe.expected)


def test_probe_catches_drift():
    b = batch()
    of = policy(Lora(r=2))
    off, copied = ready(AdapterOff(), of), ready(FrozenCopy(), of)
    probes = [Probe(off, of, b), Probe(copied, of, b)]
    with torch.no_grad():
        of.base.model.layers[0].mlp.up_proj.base_layer.weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"moved by up to \S+ nats"):
        probes[0].check(of)
    probes[1].check(of)
    with torch.no_grad():
        copied.policy.head.weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"moved by up to \S+ nats"):
        probes[1].check(of)


# --- the old policy -------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, ADAPTERS["plain"]], ids=["full", "adapters"])
def test_old_policy_follows_in_steps(lora):
    of, b = policy(lora), batch()
    old = ready(OldPolicy(every=2), of)
    old.refresh(of, 0)
    reference = ready(FrozenCopy(), of)
    start = old.label_logp(of, b)
    for step in range(1, 5):
        train(of, reference, steps=1)
        current = ready(FrozenCopy(), of).label_logp(of, b)
        old.refresh(of, step)
        found = old.label_logp(of, b)
        assert torch.equal(found, current) == (step % 2 == 0)
        assert not any(p.requires_grad for p in old.policy.parameters())
    assert not torch.equal(found, start)
    late = ready(OldPolicy(every=2), policy(lora))  # resumed without an old policy to restore
    late.refresh(of, 3)
    assert torch.equal(late.label_logp(of, b), ready(FrozenCopy(), of).label_logp(of, b))
    with pytest.raises(ValueError, match="1 or more, got 0"):
        OldPolicy(0)


def test_old_policy_is_restored():
    of, b = policy(ADAPTERS["plain"]), batch()
    old = ready(OldPolicy(every=8), of)
    train(of, old)
    old.refresh(of, 8)
    state = {k: v.clone() for k, v in old.state_dict(of).items()}
    assert state and all("lora" in name for name in state)
    other = policy(ADAPTERS["plain"])
    again = ready(OldPolicy(every=8), other)
    assert not torch.equal(again.label_logp(other, b), old.label_logp(of, b))
    again.load_state_dict(state)
    assert torch.equal(again.label_logp(other, b), old.label_logp(of, b))
