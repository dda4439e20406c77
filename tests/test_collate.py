import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gift_lightning.collate import collate, pack, reads
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised_sequences


def example(*ids, prompt=1):
    input_ids = torch.tensor(ids)
    labels = input_ids.clone()
    labels[:prompt] = -100
    return input_ids, labels


def test_packing_by_hand():
    examples = [example(1, 2), example(3, 4, 5, 6, 7), example(8, 9, 10)]
    batch = collate(examples, MicroBatch((40, 41, 42), 99, 7), pad_id=0)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7], [8, 9, 10, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 4, 5, 6, 7], [-100, 9, 10, -100, 2]]
    assert batch["sequence_ids"].tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 2, 2]]
    assert batch["sample_ids"].tolist() == [41, 42, 40]
    assert (batch["step_tokens"], batch["step_sequences"]) == (99, 7)


def test_one_sample_per_row_without_packing():
    examples = [example(1, 2), example(3, 4, 5)]
    batch = collate(examples, MicroBatch((7, 8), 3, 2), pad_id=5, packing=False)
    assert batch["input_ids"].tolist() == [[1, 2, 5], [3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100, 4, 5]]  # pad id 5 is also learned
    assert batch["sequence_ids"].tolist() == [[0, 0, -1], [1, 1, 1]]
    assert batch["sample_ids"].tolist() == [7, 8]


def test_the_first_token_of_a_sample_is_never_learned():
    batch = collate([example(1, 2, prompt=0)] * 2, MicroBatch((0, 1), 1, 2), 0, packing=False)
    assert batch["labels"].tolist() == [[-100, 2]] * 2


def test_empty_micro_batch():
    batch = collate([], MicroBatch((), 12, 3), pad_id=4)
    assert batch["input_ids"].tolist() == [[4]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["position_ids"].tolist() == [[0]]
    assert batch["sequence_ids"].tolist() == [[-1]]
    assert batch["sample_ids"].shape == (0,) and batch["sample_ids"].dtype == torch.int64
    assert (batch["step_tokens"], batch["step_sequences"]) == (12, 3)


def test_rows_never_exceed_the_longest_sample():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        n = int(torch.randint(1, 12, (), generator=generator))
        lengths = torch.randint(1, 30, (n,), generator=generator).tolist()
        rows = pack(lengths, max(lengths))
        assert sorted(i for row in rows for i in row) == list(range(n))
        assert all(sum(lengths[i] for i in row) <= max(lengths) for row in rows)
        # First fit: no two rows could have been one.
        loads = sorted(sum(lengths[i] for i in row) for row in rows)
        assert len(loads) < 2 or loads[0] + loads[1] > max(lengths)


def tiny_models():
    size = {"vocab_size": 64, "attn_implementation": "sdpa"}
    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **size,
    )
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **size)
    return {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_logits_equal_separate_ones(name):
    torch.manual_seed(0)
    model = tiny_models()[name].eval()
    for parameter in model.parameters():  # larger weights make any leak between samples visible
        torch.nn.init.normal_(parameter, std=0.3)
    examples = [example(*torch.randint(0, 64, (n,)).tolist()) for n in (17, 3, 9, 8, 1, 12, 5)]
    batch = collate(examples, MicroBatch(tuple(range(7)), 50, 7), pad_id=0)
    assert len(batch["input_ids"]) < 7
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for s, sample in enumerate(batch["sample_ids"].tolist()):
            alone = model(input_ids=examples[sample][0][None], use_cache=False).logits[0]
            together = packed[batch["sequence_ids"] == s]
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
            assert alone.abs().max() > 0.1


# --- shared prompts -------------------------------------------------------------------------


def test_shared_prompts_by_hand():
    three = [
        example(1, 2, 3, prompt=2),
        example(9, 8, 7, 6, prompt=3),
        example(1, 2, 4, 5, prompt=2),
    ]
    batch = collate(three, MicroBatch((40, 41, 42), 4, 3), pad_id=0, prompts=[2, 3, 2])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 2, 4, 5], [9, 8, 7, 6, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [
        [-100, -100, 3, -100, 4, 5],
        [-100, -100, -100, 6] + 2 * [-100],
    ]
    assert batch["sequence_ids"].tolist() == [[-1, 0, 0, 1, 1, 1], [2, 2, 2, 2, -1, -1]]
    assert batch["sample_ids"].tolist() == [40, 42, 41]
    expected = [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4], [0, 3, 4, 5]]
    mask = reads(batch)
    assert [row.nonzero()[:, 0].tolist() for row in mask[0]] == expected
    expected = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], [4, 5]]
    assert [row.nonzero()[:, 0].tolist() for row in mask[1]] == expected


def test_prompts_are_shared_within_bounds():
    same = [example(*[5] * 10, 6, i, prompt=10) for i in range(20)]
    batch = collate(same, MicroBatch(tuple(range(20)), 40, 20), 0, prompts=[10] * 20)
    # 9 tokens and 3 for each; 4 rows of the longest sample are 48, so the eight decide.
    assert batch["input_ids"].shape == (3, 9 + 8 * 3)
    same = [example(5, 5, *range(10), prompt=2) for _ in range(8)]
    batch = collate(same, MicroBatch(tuple(range(8)), 80, 8), 0, prompts=[2] * 8)
    assert batch["input_ids"].shape == (2, 1 + 4 * 11)  # at most 48
    alone = [example(1, 2, prompt=1), example(1, 3, prompt=1)]  # nothing is saved
    assert reads(collate(alone, MicroBatch((0, 1), 2, 2), 0, prompts=[1, 1])) is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shared_prompts_give_the_same_gradient(name):
    torch.manual_seed(0)
    model = tiny_models()[name].double().train()
    model.config.attn_pdrop = 0.0
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    policy = Policy(model.eval())
    samples, prompts = [], []
    for length, completions in ((6, (3, 1, 8)), (1, (2, 5)), (9, (4,)), (3, (2, 2, 7, 1, 3))):
        prompt = torch.randint(0, 64, (length,)).tolist()
        for n in completions:
            samples.append(example(*prompt, *torch.randint(0, 64, (n,)).tolist(), prompt=length))
            prompts.append(length)
    whole = MicroBatch(tuple(range(len(samples))), 38, len(samples))
    found = []
    for given in (None, prompts):
        batch = collate(samples, whole, 0, prompts=given)
        assert (given is None) == (reads(batch) is None)
        logp, entropy = policy.token_logp(batch)
        order = batch["sample_ids"][supervised_sequences(batch)].argsort(stable=True)
        weight = torch.arange(1.0, len(logp) + 1)  # no two tokens may be mistaken for each other
        policy.zero_grad()
        (logp[order] * weight + entropy[order]).sum().backward()
        found.append([logp[order].detach(), *(p.grad for p in policy.parameters())])
    assert len(found[0][0]) == 38
    close = 1e-9 if name == "gpt2" else 2e-5  # Llama's norms are in float32 always
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=close, rtol=close)
