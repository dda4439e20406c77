"""Log-probabilities through the head against dense autograd in float64."""

import pytest
import torch

from gift_lightning.head import Head
from gift_lightning.logprobs import token_logp


def inputs(dtype=torch.float64, n=23, v=37, d=8, bias=True):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)]
    tensors += [torch.randn(v, generator=g)] if bias else []
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    return leaves, torch.randint(v, (n,), generator=g)


def dense(leaves, tokens, temperature, scale=1.0, cap=None):
    hidden, weight, *bias = leaves
    logits = scale * torch.nn.functional.linear(hidden, weight, *bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logs = (logits / temperature).log_softmax(-1)
    return logs.gather(1, tokens[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def some_loss(logp, entropy):
    ramp = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    return (ramp * logp.exp()).sum() + (ramp.flip(0) * entropy.square()).sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.6, 4.0)])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_equals_the_dense_form(bias, temperature, scale, cap, chunk_size):
    leaves, tokens = inputs(bias=bias)
    expected = dense(leaves, tokens, temperature, scale, cap)
    wanted = torch.autograd.grad(some_loss(*expected), leaves)
    head = Head(leaves[1], leaves[2] if bias else None, scale, cap)
    found = token_logp(leaves[0], head, tokens, temperature=temperature, chunk_size=chunk_size)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(some_loss(*found), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone(which):
    leaves, tokens = inputs()
    found = token_logp(leaves[0], Head(leaves[1], leaves[2]), tokens)[which]
    expected = dense(leaves, tokens, 1.0)[which]
    a, b = (torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


def test_masked_classes_and_narrow_inputs():
    leaves, tokens = inputs(torch.float32)
    with torch.no_grad():
        leaves[2][5] = -torch.inf
    tokens[tokens == 5] = 6
    logp, entropy = token_logp(leaves[0], Head(leaves[1], leaves[2]), tokens)
    some_loss(logp, entropy).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert leaves[2].grad[5] == 0
    narrow = [leaf.detach().bfloat16() for leaf in leaves]
    assert token_logp(narrow[0], Head(narrow[1], narrow[2]), tokens)[0].dtype == torch.float32


def test_a_frozen_head_and_no_token():
    leaves, tokens = inputs()
    head = Head(leaves[1].detach(), leaves[2].detach())
    logp, entropy = token_logp(leaves[0], head, tokens)
    some_loss(logp, entropy).backward()
    assert leaves[0].grad.abs().sum() > 0 and leaves[1].grad is None
    logp, _ = token_logp(leaves[0][:0], Head(leaves[1], leaves[2]), tokens[:0])
    logp.sum().backward()
    assert logp.shape == (0,) and not leaves[1].grad.any()
