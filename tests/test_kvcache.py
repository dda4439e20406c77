"""The cache holds what transformers' own would hold, for the rows that go on."""

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from gift_lightning.generation import generate
from gift_lightning.kvcache import RoomyLayer, keep, roomy_cache

CONFIG = LlamaConfig(
    vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
)


def test_equal_to_concatenation():
    torch.manual_seed(0)
    ours, theirs = roomy_cache(CONFIG, 95), DynamicCache(config=CONFIG)
    assert all(type(x) is RoomyLayer for x in ours.layers)
    prompts, rows = 3, torch.arange(3).repeat_interleave(8)

    def both(kind, layer, *shape):
        k, v = torch.randn(2, *shape)
        for cache in (ours, theirs):
            found = cache.update(k, v, layer)
        for x, y in zip(cache_of(ours, layer), found, strict=True):
            assert torch.equal(x, y), kind

    def cache_of(cache, layer):
        return cache.layers[layer].keys, cache.layers[layer].values

    for layer in range(2):
        both("prompt", layer, prompts, 4, 5, 8)
    ours.reorder_cache(rows)
    theirs.batch_select_indices(rows)
    count, dropped = len(rows), 0
    for step in range(90):  # room for the prompt's five and sixteen more is exceeded several times
        for layer in range(2):
            both(step, layer, count, 4, 1, 8)
        going = torch.rand(count) > 0.03
        if not going.all() and going.any():
            order = keep(ours, going)
            assert sorted(order.tolist()) == going.nonzero()[:, 0].tolist()
            theirs.batch_select_indices(order)
            dropped += count - len(order)
            count = len(order)
    assert dropped > 10 and ours.get_seq_length() == theirs.get_seq_length() == 95
    assert ours.layers[0]._store[0].shape[-2] == 95  # no more than there can be


@pytest.mark.parametrize("going", [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]])
def test_the_last_rows_take_the_free_places(going):
    going = torch.tensor(going).bool()
    cache = roomy_cache(CONFIG, 2)
    for layer in range(2):
        cache.update(*torch.arange(4.0)[None, :, None, None, None].expand(2, 4, 1, 1, 1), layer)
    cache.reorder_cache(torch.arange(4))
    order = keep(cache, going)
    assert cache.layers[1].keys.flatten().tolist() == order.tolist()
    still = going[: len(order)].nonzero()[:, 0]
    assert torch.equal(order[still], still)  # nothing moves that need not


def test_sliding_windows_stay_as_they_are():
    """Every second layer of Gemma 2 forgets; completions are what the whole sequence gives."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        attn_implementation="eager",
    )
    kinds = {type(x).__name__ for x in roomy_cache(config, 9).layers}
    assert kinds == {"RoomyLayer", "DynamicSlidingWindowLayer"}
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    prompts = [[5, 6, 7], [9, 2, 4], [4, 4, 8]]
    options = {"max_new_tokens": 40, "eos_ids": [1], "pad_id": 0, "seed": 3}
    groups = generate(model, prompts, 6, **options)
    lengths = {len(c.tokens) for group in groups for c in group}
    assert len(lengths) > 3 and max(lengths) > 25  # rows were dropped and room was made
    for prompt, group in zip(prompts, groups, strict=True):
        for c in group:
            ids = torch.tensor([prompt + c.tokens])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            scores = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(c.logprobs), scores, atol=1e-5, rtol=0)
