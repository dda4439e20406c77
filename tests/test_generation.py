import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gift_lightning import generation
from gift_lightning.generation import draw, generate

EOS, PAD, VOCAB = 1, 0, 24
PROMPTS = [[5, 6, 7], [9], [4, 4, 4, 4, 8], [9, 2], [5, 6, 3], [2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS = {"max_new_tokens": 12, "eos_ids": [EOS], "pad_id": PAD, "seed": 3}


def tiny(name):
    """A random Llama or GPT-2 in train mode: GPT-2 has dropout, if eval mode were forgotten."""
    torch.manual_seed(0)
    if name == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        made = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        config.bos_token_id = config.eos_token_id = EOS
        made = GPT2LMHeadModel(config)
    for parameter in made.parameters():
        parameter.data *= 3  # far from uniform, so that mistakes show
    return made.train()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny(request.param)


def sample(*args, **kwargs):
    """The tokens alone."""
    return [[completion.tokens for completion in group] for group in generate(*args, **kwargs)]


def test_shape_and_end(model):
    result = generate(model, PROMPTS, 5, **OPTIONS)
    assert [len(group) for group in result] == [5] * len(PROMPTS)
    assert any(c.finished for group in result for c in group)
    for group in result:
        for c in group:
            assert len(c.tokens) == len(c.logprobs) and 1 <= len(c.tokens) <= 12
            assert c.finished == (c.tokens[-1] == EOS) and EOS not in c.tokens[:-1]
            assert c.finished or len(c.tokens) == 12


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_equal_a_teacher_forced_forward(model, temperature):
    for batch_size in (64, 4):  # with padding across lengths, and nearly without
        result = generate(
            model, PROMPTS, 4, temperature=temperature, batch_size=batch_size, **OPTIONS
        )
        model.eval()
        for prompt, group in zip(PROMPTS, result, strict=True):
            for c in group:
                ids = torch.tensor([prompt + c.tokens])
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
                scores = torch.log_softmax(logits / temperature, -1).gather(
                    1, ids[0, len(prompt) :, None]
                )
                torch.testing.assert_close(
                    torch.tensor(c.logprobs), scores[:, 0], atol=1e-5, rtol=0
                )
        model.train()


def test_independent_of_the_batch(model):
    whole = sample(model, PROMPTS, 6, batch_size=100, **OPTIONS)
    for batch_size in (1, 5, 7):
        assert sample(model, PROMPTS, 6, batch_size=batch_size, **OPTIONS) == whole
    fewer = sample(model, PROMPTS, 3, **OPTIONS)
    assert fewer == [group[:3] for group in whole]
    for rank in range(2):  # ranks name the prompts by their place in the whole list
        keys = list(range(rank, len(PROMPTS), 2))
        assert sample(model, PROMPTS[rank::2], 6, keys=keys, **OPTIONS) == whole[rank::2]
    short = sample(model, PROMPTS, 6, **(OPTIONS | {"max_new_tokens": 4}))
    assert short == [[tokens[:4] for tokens in group] for group in whole]
    assert sample(model, PROMPTS, 6, **(OPTIONS | {"seed": 4})) != whole


def test_global_random_state_is_untouched(model):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sample(model, PROMPTS, 2, **OPTIONS)
    assert torch.equal(torch.rand(3), expected)


def test_distribution_of_the_first_two_tokens(model):
    n = 4000
    tokens = sample(model, [[5, 6]], n, **(OPTIONS | {"max_new_tokens": 2}), batch_size=n)[0]
    model.eval()
    with torch.no_grad():
        first = torch.softmax(model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].double(), -1)
        pairs = torch.softmax(
            model(input_ids=torch.tensor([[5, 6, t] for t in range(VOCAB)])).logits[:, -1].double(),
            -1,
        )
    model.train()
    expected = (first[:, None] * pairs).clone()
    expected[EOS] = 0  # nothing follows the end
    observed = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    ended = 0
    for completion in tokens:
        if completion == [EOS]:
            ended += 1
        else:
            observed[completion[0], completion[1]] += 1
    expected, observed = (
        torch.cat([expected.flatten(), first[EOS : EOS + 1]]) * n,
        torch.cat([observed.flatten(), torch.tensor([float(ended)]).double()]),
    )
    big = expected >= 5
    rest = expected[~big].sum()
    chi2 = ((observed - expected)[big] ** 2 / expected[big]).sum()
    chi2 += (observed[~big].sum() - rest) ** 2 / rest.clamp(min=1e-9)
    freedom = int(big.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_greedy_and_its_limit(model):
    greedy = sample(model, PROMPTS, 2, temperature=0.0, **OPTIONS)
    assert all(group[0] == group[1] for group in greedy)
    assert sample(model, PROMPTS, 1, temperature=1e-4, **OPTIONS) == [group[:1] for group in greedy]
    assert sample(model, PROMPTS, 1, top_p=1e-6, **OPTIONS) == [group[:1] for group in greedy]
    with torch.no_grad():
        model.eval()
        ids = list(PROMPTS[0])
        for token in greedy[0][0]:
            assert token == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        model.train()


def test_draw_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.0, 0.2]])).repeat(6, 1)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, 1.0, 1.0).tolist() == [0, 0, 1, 1, 3, 3]
    # top-p 0.6 keeps 0.5 and 0.3, renormalised to 0.625 and 0.375
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.9, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, 1.0, 0.6).tolist() == [0, 0, 1, 1, 1, 1]
    assert draw(logits, uniform, 1.0, 0.49).tolist() == [0] * 6
    assert draw(logits, uniform, 0.0, 1.0).tolist() == [0] * 6
    # temperature 1/2 squares the probabilities: 0.25, 0.09, 0, 0.04 of 0.38
    uniform = torch.tensor([0.65, 0.66, 0.89, 0.90, 0.0, 0.99], dtype=torch.float64)
    assert draw(logits, uniform, 0.5, 1.0).tolist() == [0, 1, 1, 3, 0, 3]


def test_draw_never_picks_an_impossible_token():
    logits = torch.full((1000, 8), -torch.inf)
    logits[:, 2] = torch.linspace(-3, 3, 1000)
    logits[:, 5] = 0.1
    for u in (0.0, 0.5, 1 - 2**-53):
        drawn = draw(logits, torch.full((1000,), u, dtype=torch.float64), 1.0, 1.0)
        assert set(drawn.tolist()) <= {2, 5}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # names that every supported transformers has
def test_modes_are_restored_also_when_generation_raises(model, monkeypatch):
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    calls = 0

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("injected")
        return draw(*args)

    monkeypatch.setattr(generation, "draw", failing)
    with pytest.raises(RuntimeError, match="injected"):
        sample(model, PROMPTS, 2, **OPTIONS)
    assert calls == 3
    assert all(m.training for m in model.modules()) and not model.config.use_cache
    assert model.is_gradient_checkpointing and torch.is_grad_enabled()
    assert all(p.requires_grad for p in model.parameters())
    model.gradient_checkpointing_disable()


def test_several_end_tokens(model):
    ends = [EOS, 5, 6]
    for group in generate(model, PROMPTS, 4, **(OPTIONS | {"eos_ids": ends})):
        for c in group:
            assert c.finished == (c.tokens[-1] in ends) and not set(c.tokens[:-1]) & set(ends)


def test_no_prompt_and_bad_arguments(model):
    assert sample(model, [], 3, **OPTIONS) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(model, [[3], []], 3, **OPTIONS)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="change them"):
            sample(model, PROMPTS, 3, **OPTIONS, **wrong)


def test_nan_is_reported(model):
    weight = model.get_output_embeddings().weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="NaN"):
            sample(model, PROMPTS, 2, temperature=temperature, **OPTIONS)
    weight.data.copy_(kept)
