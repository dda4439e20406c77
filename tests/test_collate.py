import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gift_lightning.collate import collate, pack
from gift_lightning.order import MicroBatch


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
