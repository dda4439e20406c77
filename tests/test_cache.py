import json
import math
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gift_lightning import cache, functional, identity, targets
from gift_lightning.cache import CachedTopK
from gift_lightning.collate import collate
from gift_lightning.distribution import Distribution
from gift_lightning.loss import evaluate
from gift_lightning.models import Lora
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised_labels
from gift_lightning.references import FrozenCopy, Probe
from gift_lightning.target import Tokens

V = 23
# What transformers and peft say about models of this size.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


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


def policy(seed=0, lora=None, **changes):
    made = model(seed, **changes)
    return Policy(made if lora is None else lora.wrap(made))


def tokenizer(words="abcdefghijklmnopqrstuv", template="{{ messages }}"):
    vocabulary = {w: i for i, w in enumerate(["</s>", *words])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return made


def samples(n, seed=0, longest=9):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        ids = torch.randint(V, (int(torch.randint(3, longest + 1, (), generator=g)),), generator=g)
        learned = torch.rand(len(ids), generator=g) < 0.6
        out.append((ids, torch.where(learned, ids, -100)))
    return out


def a_batch(from_samples, ids, packing=True):
    whole = MicroBatch(tuple(ids), 1, len(ids))
    return collate([from_samples[i] for i in ids], whole, pad_id=0, packing=packing)


def made(path, k=V, sets=None, of=None, **options):
    """A cache on disk, and a reference that reads it for the policy that it was made from."""
    of = of or policy()
    sets = sets or {"train": samples(12), "val": samples(4, seed=1)}
    CachedTopK(str(path), k, **options).write(of, tokenizer(), sets, batch_size=5)
    opened = CachedTopK(str(path), k, **options)
    opened.setup(of)
    return opened


def logp(reference, of, batch):
    """[n, V] log-probabilities at the supervised tokens of a batch."""
    rows, labels = reference.rows(of, batch), supervised_labels(batch)
    return Distribution(rows.logits(slice(0, len(labels))), labels).logp


def frozen(of):
    reference = FrozenCopy()
    reference.setup(of)
    return reference


# --- the distribution -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (1, [0.4, 0.3, 0.1, 0.1, 0.1]),  # in the top 2: 0.3 is left for three classes
        (4, [0.4, 0.3, 0.125, 0.125, 0.05]),  # outside: 0.25 is left for two
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_hand(label, expected, dtype):
    p = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype=dtype)
    y = torch.tensor([label])
    kept = cache._truncate(Distribution(p.log() + 7, y), 2)
    _, ids, _, tail = kept
    assert sorted(ids[0].tolist()) == [0, 1]
    assert tail.exp().item() == pytest.approx(sum(expected[2:]) - 0.05 * (label == 4))
    rows = cache.CachedRows(y, 5, *kept)
    for out in (None, torch.full((1, 5), math.nan, dtype=dtype)):
        found = rows.logits(slice(0, 1), out)
        assert out is None or found.data_ptr() == out.data_ptr()
        torch.testing.assert_close(found.exp(), torch.tensor([expected], dtype=dtype))


TILTED = [
    targets.GIFT(beta=2.0),
    targets.GIFT(beta=2.0, smoothing=0.1, floor=1e-3),
    targets.GIFTExact(beta=3.0),
]


@pytest.mark.parametrize("target", TILTED, ids=repr)
def test_a_truncated_reference_is_never_spread(target):
    """Its few numbers give what the whole rows give."""
    torch.manual_seed(0)
    n, v, k = 40, 30, 4
    z, y = torch.randn(n, v, dtype=torch.float64), torch.randint(v, (n,))
    kept = cache._truncate(Distribution(3 * torch.randn(n, v, dtype=torch.float64), y), k)
    listed = (kept[1] == y[:, None]).any(-1)
    assert listed.any() and not listed.all()
    rows = cache.CachedRows(y, v, *kept)
    whole = Distribution(rows.logits(slice(0, n)), y)

    def buffer():
        raise AssertionError("the rows were made dense")

    few = Distribution(buffer, y, whole.logp_y, buffer, rows.peaks(slice(0, n), torch.float64))
    ahead = whole.logp_y.flip(0).cumsum(0).flip(0) if target.ahead_reads else None
    wanted = evaluate(target, Tokens(z, y, reference=whole, ahead=ahead))
    found = evaluate(target, Tokens(z, y, reference=few, ahead=ahead))
    for name in ("value", "gradient", "label_mass", "nll"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), atol=1e-12, rtol=1e-12
        )


def test_all_classes_kept_leaves_no_tail(tmp_path):
    for k, label in ((5, 1), (4, 4)):  # nothing is left, with and without the label's own place
        p = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]])
        y = torch.tensor([label])
        kept = cache._truncate(Distribution(p.log(), y), k)
        rows = cache.CachedRows(y, 5, *kept)
        assert kept[-1].item() == -math.inf
        torch.testing.assert_close(rows.logits(slice(0, 1)).exp(), p)


def test_whole_vocabulary_is_the_frozen_copy(tmp_path):
    of = policy()
    cached, copied = made(tmp_path / "c", of=of), frozen(of)
    batch = a_batch(samples(12), range(12))
    torch.testing.assert_close(
        logp(cached, of, batch), logp(copied, of, batch), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(
        cached.label_logp(of, batch), copied.label_logp(of, batch), atol=1e-6, rtol=1e-6
    )
    for target in (targets.GIFT(beta=2.0), targets.GIFTExact(beta=9.0), targets.TargetSFT(eta=0.5)):
        of.zero_grad()
        loss, _ = of(batch, target, reference=cached.rows(of, batch), chunk_size=7)
        loss.sum().backward()
        found = of.head.weight.grad.clone()
        of.zero_grad()
        expected, _ = of(batch, target, reference=copied.rows(of, batch))
        expected.sum().backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, of.head.weight.grad, atol=1e-5, rtol=1e-5)


def test_k_above_the_vocabulary_is_the_whole_vocabulary(tmp_path):
    of, path, batch = policy(), str(tmp_path / "c"), a_batch(samples(12), range(12))
    cached = made(path, V + 1, of=of)
    assert cached.meta.k == V and cached.arrays["ids"].shape[1] == V
    assert cached.meta.max_tail == 0
    expected = logp(frozen(of), of, batch)
    for k in (V, V + 1, 1000):  # all mean the same
        opened = CachedTopK(path, k)
        opened.setup(of)
        torch.testing.assert_close(logp(opened, of, batch), expected, atol=1e-6, rtol=1e-6)
    stale(CachedTopK(path, V - 1), of, r"k \(23 before, 22 now\)")
    made(tmp_path / "d", 4, of=of)
    stale(CachedTopK(str(tmp_path / "d"), 1000), of, r"k \(4 before, 23 now\)")


@pytest.mark.parametrize("k", [1, 3, 8])
def test_truncation_bound(tmp_path, k):
    of = policy()
    cached = made(tmp_path / "c", k, of=of)
    batch = a_batch(samples(12), range(12))
    labels = supervised_labels(batch)
    exact, found = logp(frozen(of), of, batch), cached.rows(of, batch).logits(slice(0, None))
    top = exact.topk(k, -1)
    assert not (top.indices == labels[:, None]).any(-1).all(), "some labels are in the tail"
    torch.testing.assert_close(found.gather(-1, top.indices), top.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.gather(-1, labels[:, None]), exact.gather(-1, labels[:, None]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(labels)))
    tail = 1 - exact.exp().scatter(-1, top.indices, 0).scatter(-1, labels[:, None], 0).sum(-1)
    tail = 1 - tail
    error = (found.exp() - exact.exp()).abs().sum(-1)
    assert (error <= 2 * tail + 1e-6).all() and error.max() > 1e-3
    meta = cached.meta
    assert float(tail.max()) <= meta.max_tail + 1e-6 and meta.mean_tail < meta.max_tail

    # The gradient of GIFT moves by at most (1 − γ) as much, its label mass and weight not at all.
    target = targets.GIFT(beta=2.0)
    logits = torch.randn(len(labels), V, generator=torch.Generator().manual_seed(0))
    gradients = []
    for reference in (found, exact):
        z = logits.clone().requires_grad_()
        functional.token_loss(target, z, labels, reference_logits=reference).sum().backward()
        gradients.append(z.grad)
    p_y = exact.gather(-1, labels[:, None])[:, 0].exp()
    gamma = math.expm1(2) * p_y / (1 + math.expm1(2) * p_y)
    moved = (gradients[0] - gradients[1]).abs().sum(-1)
    assert (moved <= (1 - gamma) * 2 * tail + 1e-6).all()


def test_reported_tail(tmp_path, capsys):
    meta = made(tmp_path / "c", 4).meta
    said = capsys.readouterr().out
    assert f"{meta.mean_tail:.2g} on average, {meta.max_tail:.2g} at most" in said
    assert "top 4 of 23" in said
    tail = np.load(tmp_path / "c" / "tail.npy")
    assert meta.max_tail == pytest.approx(float(np.exp(tail).max()))
    assert meta.mean_tail == pytest.approx(float(np.exp(tail.astype(np.float64)).mean()))


# --- from batches to places -----------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_any_order_and_packing(tmp_path, packing):
    of, train = policy(), samples(12)
    cached, copied = made(tmp_path / "c", of=of), frozen(of)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    for ids in ([5], shuffled, [2, 2, 7, 2], shuffled[:4]):
        batch = a_batch(train, ids, packing)
        torch.testing.assert_close(
            logp(cached, of, batch), logp(copied, of, batch), atol=1e-5, rtol=0
        )
    # Packing really has another order than the samples were given in.
    assert not packing or a_batch(train, shuffled)["sample_ids"].tolist() != shuffled


def test_validation_sets_share_the_cache_and_sample_numbers(tmp_path):
    of, val = policy(), samples(4, seed=1)
    cached = made(tmp_path / "c", of=of)
    batch = a_batch(val, range(4))  # numbered from 0, as the training samples are
    torch.testing.assert_close(
        logp(cached, of, batch), logp(frozen(of), of, batch), atol=1e-5, rtol=0
    )


def test_every_sample_once(tmp_path, monkeypatch):
    train = samples(7)
    repeated = [*train, train[3], train[0]]
    seen, original = [], Policy.hidden

    def hidden(self, batch):
        seen.append(batch["sample_ids"].tolist())
        return original(self, batch)

    monkeypatch.setattr(Policy, "hidden", hidden)
    meta = made(tmp_path / "c", sets={"train": repeated, "val": train[2:4]}).meta
    assert [sorted(ids) for ids in seen] == [[0, 1, 2, 3, 4], [5, 6]]
    assert (meta.samples, meta.sets) == (7, {"train": 9, "val": 2})
    assert meta.tokens == sum(int((labels[1:] != -100).sum()) for _, labels in train)


def test_nothing_supervised(tmp_path):
    ids = torch.tensor([1, 2, 3])
    first_only = (ids, torch.tensor([1, -100, -100]))  # which no token predicts
    none = [first_only, (ids, torch.full((3,), -100))]
    of, train = policy(), samples(3)
    cached = made(tmp_path / "c", of=of, sets={"train": [*train, *none]})
    for batch in (a_batch(none, [0, 1]), a_batch(none, [])):
        rows = cached.rows(of, batch)
        assert rows.logp_y.shape == (0,) and rows.logits(slice(0, 0)).shape == (0, V)
        loss, _ = of(batch, targets.GIFT(), reference=rows)
        loss.sum().backward()
    mixed = a_batch([*train, *none], [3, 0, 4, 2])
    assert len(cached.label_logp(of, mixed)) == len(supervised_labels(mixed))
    with pytest.raises(ValueError, match="no sample has a supervised token"):
        CachedTopK(str(tmp_path / "d"), V).write(of, tokenizer(), {"train": none})


def test_training_runs_no_reference_forward_and_equals_a_frozen_copy(tmp_path, monkeypatch):
    train, original = samples(12), Policy.hidden

    def trained(reference, of):
        calls = []
        optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
        with monkeypatch.context() as patch:
            patch.setattr(Policy, "hidden", lambda s, b: calls.append(s) or original(s, b))
            for step in range(6):
                batch = a_batch(train, [2 * step, 2 * step + 1])
                rows = reference.rows(of, batch)
                loss, _ = of(batch, targets.GIFT(beta=2.0), reference=rows)
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in of.parameters()]), len(calls)

    of, other = policy(), policy()
    expected, with_reference = trained(frozen(of), of)
    found, without = trained(made(tmp_path / "c", of=other), other)
    assert (with_reference, without) == (12, 6)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_label_rows_need_no_dense_rows(tmp_path, monkeypatch):
    of, batch = policy(), a_batch(samples(12), range(12))
    cached = made(tmp_path / "c", 4, of=of)
    monkeypatch.setattr(cache.CachedRows, "logits", lambda *_: pytest.fail("dense rows made"))
    loss, _ = of(batch, targets.STM(threshold=9.0), reference=cached.rows(of, batch))
    assert loss.isfinite().all() and len(cached.label_logp(of, batch)) == len(loss)


def test_probe(tmp_path):
    of, batch = policy(), a_batch(samples(12), range(3))
    cached = made(tmp_path / "c", 4, of=of)
    probe = Probe(cached, of, batch)
    with torch.no_grad():
        of.head.weight.add_(1.0)
    probe.check(of)


# --- what it was made from ------------------------------------------------------------------


def stale(reference, of, part, sets=None, tok=None):
    with pytest.raises(ValueError, match=part) as caught:
        reference.setup(of)
        reference.check_data(tok or tokenizer(), sets or {"train": samples(12)})
    message = str(caught.value)
    assert "gift cache-reference" in message and "\n" not in message
    others = {"the model", "the tokenizer", "the chat template", "the data", "the format", "k ("}
    named = part.replace("\\", "")
    assert [other for other in others if other in message and other not in named] == []


def test_unchanged_subset_and_reordered_data_are_known(tmp_path):
    cached = made(tmp_path / "c")
    train, val = samples(12), samples(4, seed=1)
    for sets in ({"train": train, "val": val}, {"train": train[::-3]}, {"other": val}, {}):
        cached.check_data(tokenizer(), sets)


def test_stale_data(tmp_path):
    of, path = policy(), str(tmp_path / "c")
    made(path, of=of)
    for change in ("token", "label", "length", "new"):
        train = samples(12)
        ids, labels = (x.clone() for x in train[4])
        if change == "token":
            ids[0] = (ids[0] + 1) % V
        elif change == "label":
            labels[1] = -100 if labels[1] >= 0 else ids[1]
        elif change == "length":
            ids, labels = ids[:-1], labels[:-1]
        train = [*train, *samples(1, seed=9)] if change == "new" else train
        train[4] = (ids, labels)
        part = rf"the data \(1 of {len(train)} train samples are not in it\)"
        stale(CachedTopK(path, V), of, part, {"train": train})
    stale(CachedTopK(path, V), of, r"the data \(2 of 2 val/a samples", {"val/a": samples(2, 7)})


def test_a_batch_of_unknown_samples_is_refused(tmp_path):
    of, path = policy(), str(tmp_path / "c")
    cached = made(path, of=of)
    with pytest.raises(ValueError, match="does not know 2 of 3 samples of a batch"):
        cached.rows(of, a_batch([*samples(1), *samples(2, seed=5)], range(3)))


def test_stale_tokenizer_and_template(tmp_path):
    of, path = policy(), str(tmp_path / "c")
    made(path, of=of)
    stale(CachedTopK(path, V), of, "the tokenizer has changed", tok=tokenizer("bacdefghijklmnop"))
    renamed = tokenizer()
    renamed.add_special_tokens({"bos_token": "a"})
    stale(CachedTopK(path, V), of, "the tokenizer", tok=renamed)
    for template in ("{{ messages[0] }}", None, {"default": "{{ messages }}", "tool": "x"}):
        tok = tokenizer(template=template)
        stale(CachedTopK(path, V), of, "the chat template has changed", tok=tok)
    used = tokenizer()  # which leaves its mark on the backend
    used(["a b c", "a"], padding=True, truncation=True, max_length=2)
    opened = CachedTopK(path, V)
    opened.setup(of)
    opened.check_data(used, {})


def test_stale_model(tmp_path):
    of, path = policy(), str(tmp_path / "c")
    made(path, of=of)
    stale(CachedTopK(path, V), policy(seed=1), r"the model \(LlamaForCausalLM \(\w{8}\) before")
    one = policy()
    with torch.no_grad():
        one.model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    stale(CachedTopK(path, V), one, "the model")
    stale(CachedTopK(path, V), policy().to(torch.bfloat16), "the model")
    # The same weights, another function.
    heads = policy(num_attention_heads=4, num_key_value_heads=4)
    assert torch.equal(heads.head.weight, of.head.weight)
    stale(CachedTopK(path, V), heads, "the model")
    same = policy(attention_dropout=0.3)
    same.base.config.update({"pad_token_id": 3, "use_cache": False})
    CachedTopK(path, V).setup(same)


def test_large_weights_are_sampled_in_every_row_and_column(monkeypatch):
    monkeypatch.setattr(identity, "_BYTES", 64)
    before = identity._weight_digest(policy())
    weight = "model.layers.1.mlp.up_proj.weight"  # [16, 16], 1024 bytes
    for part in (slice(None), (slice(None), 3), (5, slice(None))):
        other = policy()
        with torch.no_grad():
            other.model.get_parameter(weight)[part] += 1
        assert identity._weight_digest(other) != before


def test_stale_k_vocabulary_and_format(tmp_path):
    of, path = policy(), str(tmp_path / "c")
    made(path, 4, of=of)
    stale(CachedTopK(path, 5), of, r"k \(4 before, 5 now\)")
    with pytest.raises(ValueError, match="23 entries, the policy of 24"):
        CachedTopK(path, 4).setup(policy(vocab_size=24))
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    (tmp_path / "c" / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    stale(CachedTopK(path, 4), of, r"the format \(0 before, 1 now\)")


def test_everything_that_changed_is_named(tmp_path):
    cached = made(tmp_path / "c")
    words = "the tokenizer and the chat template and the data .* have changed"
    with pytest.raises(ValueError, match=words):
        cached.check_data(tokenizer("xy", "z"), {"train": samples(3, seed=8)})


def test_adapters_do_not_matter(tmp_path):
    plain, lora = policy(), Lora(r=2, dropout=0.2, extra={"init_lora_weights": False})
    train = samples(12)
    cached, batch = made(tmp_path / "c", of=plain), a_batch(train, range(12))
    adapted = policy(lora=lora)
    opened = CachedTopK(str(tmp_path / "c"), V)
    opened.setup(adapted)
    assert torch.equal(opened.label_logp(adapted, batch), cached.label_logp(plain, batch))
    again = made(tmp_path / "d", of=adapted)  # without adapters, without dropout
    again.setup(plain)
    torch.testing.assert_close(
        again.label_logp(adapted, batch), cached.label_logp(plain, batch), atol=1e-6, rtol=0
    )
    assert all(m.training for m in adapted.modules())
    moving = policy(lora=Lora(r=2, extra={"modules_to_save": ["embed_tokens"]}))
    CachedTopK(str(tmp_path / "c"), V).setup(moving)


def test_adapters_that_rewrite_the_base_are_refused(tmp_path):
    of = policy(lora=Lora(r=2, extra={"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="rewrites the base by init_lora_weights='pissa'"):
        CachedTopK(str(tmp_path / "c"), 4).write(of, tokenizer(), {"t": samples(2)})
    assert list(tmp_path.iterdir()) == []
    CachedTopK(str(tmp_path / "c"), 4, FrozenCopy()).write(of, tokenizer(), {"t": samples(2)})


def test_dropout_is_off_while_writing(tmp_path):
    of, batch = policy(attention_dropout=0.5), a_batch(samples(12), range(12))
    cached = made(tmp_path / "c", of=of)
    torch.testing.assert_close(
        logp(cached, of, batch), logp(frozen(of), of, batch), atol=1e-5, rtol=0
    )
    assert of.model.training


# --- a teacher ------------------------------------------------------------------------------


def test_teacher(tmp_path, monkeypatch):
    folder, path = str(tmp_path / "teacher"), str(tmp_path / "c")
    model(seed=5).save_pretrained(folder)
    of, batch = policy(), a_batch(samples(12), range(12))
    made(path, of=of, source=FrozenCopy(folder))
    monkeypatch.setattr("gift_lightning.references.causal_lm", None)  # never loaded in training
    cached = CachedTopK(path, V, FrozenCopy(folder))
    cached.setup(of)
    torch.testing.assert_close(
        logp(cached, of, batch), logp(frozen(policy(seed=5)), of, batch), atol=1e-5, rtol=0
    )
    CachedTopK(path, V, FrozenCopy(folder)).setup(policy(seed=1))  # serves any student
    shutil.copytree(folder, tmp_path / "moved")
    CachedTopK(path, V, FrozenCopy(str(tmp_path / "moved"))).setup(of)
    for other in (None, FrozenCopy(), FrozenCopy(folder, dtype="bfloat16")):
        stale(CachedTopK(path, V, other), of, "the model")
    model(seed=6).save_pretrained(folder)
    stale(CachedTopK(path, V, FrozenCopy(folder)), of, "the model")


def test_teacher_that_is_not_at_hand(tmp_path):
    folder, path = str(tmp_path / "teacher"), str(tmp_path / "c")
    model(seed=5).save_pretrained(folder)
    of = policy()
    made(path, of=of, source=FrozenCopy(folder))
    shutil.rmtree(folder)
    CachedTopK(path, V, FrozenCopy(folder)).setup(of)
    stale(CachedTopK(path, V, FrozenCopy(folder, revision="v2")), of, "the model")
    stale(CachedTopK(path, V, FrozenCopy("some/other")), of, "the model")


def test_policy_in_another_dtype(tmp_path):
    of, path = policy(), str(tmp_path / "c")
    half = made(path, of=of, source=FrozenCopy(dtype="bfloat16"))
    batch = a_batch(samples(12), range(12))
    error = (logp(half, of, batch) - logp(frozen(of), of, batch)).abs().max()
    assert 1e-4 < error < 0.5
    stale(CachedTopK(path, V), of, "the model")


# --- files ----------------------------------------------------------------------------------


def test_arrays_are_mapped_and_read_only(tmp_path):
    cached = made(tmp_path / "c", 4)
    for array in (cached.index, *cached.arrays.values()):
        assert isinstance(array, np.memmap) and not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        cached.arrays["logp"][0] = 0
    before = {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}
    of, batch = policy(), a_batch(samples(12), range(12))
    rows = cached.rows(of, batch)
    rows.logits(slice(0, 5)).zero_()
    rows.logp.zero_()
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    calls, original = [], Policy.hidden

    def hidden(self, batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Policy, "hidden", hidden)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    made(tmp_path / "c")
    kept = (tmp_path / "c" / "meta.json").read_bytes()
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # nor does it touch what it would have replaced
        CachedTopK(str(tmp_path / "c"), 3).write(
            policy(), tokenizer(), {"t": samples(12)}, batch_size=5, overwrite=True
        )
    assert [f.name for f in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c" / "meta.json").read_bytes() == kept


def test_missing_and_unfinished(tmp_path):
    of, path = policy(), tmp_path / "c"
    with pytest.raises(ValueError, match=r"c' does not exist: make one with `gift cache-reference"):
        CachedTopK(str(path), V).setup(of)
    made(path, of=of)
    path.rename(tmp_path / "c.tmp-1")  # left by a process that was killed
    (tmp_path / "c.tmp-1" / "meta.json").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        CachedTopK(str(path), V).setup(of)
    shutil.copytree(tmp_path / "c.tmp-1", path)
    with pytest.raises(ValueError, match="is no finished reference cache"):
        CachedTopK(str(path), V).setup(of)
    for overwrite in (False, True):  # never deletes a folder that is something else
        with pytest.raises(ValueError, match="is no reference cache: give another path"):
            CachedTopK(str(path), V).write(of, tokenizer(), {"t": samples(2)}, 5, overwrite)


def test_overwrite_only_if_asked(tmp_path):
    of, path, train = policy(), tmp_path / "c", {"t": samples(2)}
    path.mkdir()  # an empty folder is as good as none
    CachedTopK(str(path), 3).write(of, tokenizer(), train)
    with pytest.raises(
        ValueError, match=r"already: use it, give another path, or .* `--overwrite true`"
    ):
        CachedTopK(str(path), 4).write(of, tokenizer(), train)
    CachedTopK(str(path), 3).setup(of)
    CachedTopK(str(path), 4).write(of, tokenizer(), train, overwrite=True)
    CachedTopK(str(path), 4).setup(of)
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def test_what_cannot_be_written(tmp_path, monkeypatch):
    of, train = policy(), {"t": samples(2)}
    with pytest.raises(ValueError, match="k is 1 or more, got 0"):
        CachedTopK(str(tmp_path / "c"), 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        CachedTopK(str(tmp_path / "file" / "c"), 3).write(of, tokenizer(), train)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"GB are free: choose a smaller k"):
        CachedTopK(str(tmp_path / "c"), 3).write(of, tokenizer(), train)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("file", ["samples.npy", "labels.npy", "ids.npy", "logp.npy", "tail.npy"])
def test_damage(tmp_path, file):
    of, path = policy(), tmp_path / "c"
    made(path, 4, of=of)
    whole = (path / file).read_bytes()
    other = np.zeros((3, 4), dtype=np.float16)

    def damaged(match):
        with pytest.raises(ValueError, match=match) as caught:
            CachedTopK(str(path), 4).setup(of)
        assert f"is damaged, {file}: " in str(caught.value)
        assert "--overwrite" in str(caught.value) and "\n" not in str(caught.value)

    for content in (whole[:-8], whole[:60], b"", b"x" * 200):
        (path / file).write_bytes(content)
        damaged(None)
    np.save(path / file, other)
    damaged(r"float16 \(3, 4\) where (int|float)\d+ \(\d+")
    np.save(path / file, np.array([{}], dtype=object), allow_pickle=True)
    damaged("[Oo]bject arrays|Python objects")
    (path / file).unlink()
    damaged("No such file")


def test_damaged_index(tmp_path):
    of, path = policy(), tmp_path / "c"
    made(path, 4, of=of)
    whole = np.load(path / "samples.npy")
    for place, value in (((3, 0), whole[2, 0]), ((5, 1), 10**9), ((5, 1), -1), ((0, 2), 10**6)):
        index = whole.copy()
        index[place] = value
        np.save(path / "samples.npy", index)
        with pytest.raises(ValueError, match=r"is damaged, samples\.npy: an entry is out of place"):
            CachedTopK(str(path), 4).setup(of)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}'])
def test_damaged_description(tmp_path, content):
    of, path = policy(), tmp_path / "c"
    made(path, 4, of=of)
    (path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"is damaged, meta\.json: "):
        CachedTopK(str(path), 4).setup(of)
    meta = {"format": 1, "model": {}, "tokenizer": "", "template": "", "samples": 16}
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"is damaged, meta\.json: no 'sets'"):
        CachedTopK(str(path), 4).setup(of)
