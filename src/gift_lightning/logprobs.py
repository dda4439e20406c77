"""Log-probabilities and entropies of given tokens from hidden states, chunk by chunk of logits.

For losses that are functions of log-probabilities, such as the GRPO family: whatever is computed of
them may be differentiated. The logits are made again in the backward pass, which costs four head
matmuls in all, and no [tokens, vocab] tensor is kept.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gift_lightning.head import Head
from gift_lightning.matmul import add_matmul_tn, chunks, default_chunk, math_dtype, matmul_nn


def token_logp(
    hidden: Float[Tensor, "n d"],
    head: Head,
    tokens: Int[Tensor, " n"],
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """log softmax(logits / temperature) at each token, and the entropy of that distribution.

    Both are differentiable in hidden states, weight and bias, in float32 or better.

    Args:
        hidden: final hidden states; row i predicts tokens[i].
        head: of the language model.
        tokens: vocabulary entries.
        temperature: that the tokens were sampled at.
        chunk_size: tokens whose logits exist at a time; by default about 2²⁵ logits, on a CPU 2²⁴.
    """
    if chunk_size is None:
        chunk_size = default_chunk(head.weight)
    bias = head.bias if head.bias is not None else hidden.new_zeros(0)
    logp, entropy = _TokenLogp.apply(
        hidden, head.weight, bias, head, tokens, temperature, chunk_size
    )
    return logp, entropy


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        head: Head,
        tokens: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        logp = torch.zeros(len(tokens), dtype=math_dtype(hidden), device=hidden.device)
        entropy = torch.zeros_like(logp)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(len(tokens), chunk_size):
                logs = (head.project(hidden[rows]) / temperature).log_softmax(-1)
                logp[rows] = logs.gather(1, tokens[rows, None])[:, 0]
                entropy[rows] = torch.special.entr(logs.exp()).sum(-1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, tokens, entropy)
        ctx.job = head, temperature, chunk_size
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, tokens, entropy = ctx.saved_tensors
        head, temperature, chunk_size = ctx.job
        wide, needs = math_dtype(hidden), ctx.needs_input_grad
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if needs[1] else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=hidden.device) if needs[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(len(tokens), chunk_size):
                logits = head.project(hidden[rows])
                logs = (logits / temperature).log_softmax(-1)
                p = logs.exp()
                gradient = torch.zeros_like(p)
                if d_logp is not None:  # δ - p
                    gradient.addcmul_(p, -d_logp[rows, None].to(wide))
                    up = d_logp[rows, None].to(wide)
                    gradient.scatter_add_(1, tokens[rows, None], up)
                if d_entropy is not None:  # -p·(log p + H)
                    slope = p * logs.masked_fill(logs.isneginf(), 0.0).add_(entropy[rows, None])
                    gradient.addcmul_(slope, -d_entropy[rows, None].to(wide))
                gradient = head.backproject(logits, gradient.div_(temperature))
                d_hidden[rows] = matmul_nn(gradient, weight, hidden.dtype)
                if d_weight is not None:
                    add_matmul_tn(d_weight, gradient, hidden[rows])
                if d_bias is not None:
                    d_bias += gradient.sum(0)
        return (
            d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )
