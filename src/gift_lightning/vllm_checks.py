"""What must be true of a vLLM server before a policy is trained on what it samples."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_lightning.models import base_model
from gift_lightning.rollouts import Sampling
from gift_lightning.vllm_client import RefusedError, VLLMClient
from gift_lightning.vllm_sampling import logprobs_mode

_SPREAD = 64  # tokens that are compared, from all of the vocabulary


def served_model(client: VLLMClient) -> dict[str, Any]:
    """The server's card of its base model."""
    cards: list[dict[str, Any]] = client.get("/v1/models")["data"]
    return next(card for card in cards if card.get("parent") is None)


def check_server(
    client: VLLMClient,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    max_prompt_length: int,
) -> None:
    """Raises ValueError if the server's vocabulary, lengths or log-probabilities do not fit."""
    served = served_model(client)
    room, needed = served["max_model_len"], max_prompt_length + sampling.max_completion_length
    if needed > room:
        raise ValueError(
            f"the vLLM server at {client.url} takes {room} tokens, and the longest prompt and "
            f"completion have {needed}: raise its --max-model-len, or lower "
            "model.max_completion_length."
        )
    vocab_size = len(base_model(model).get_output_embeddings().weight)
    text = tokenizer.decode(list(range(0, len(tokenizer), len(tokenizer) // _SPREAD + 1)))
    body = {"model": served["id"], "prompt": text, "add_special_tokens": False}
    there = client.post("/tokenize", body)["tokens"]
    last = _forced(client, served["id"], vocab_size - 1)
    beyond = _forced(client, served["id"], vocab_size)
    if (
        there != tokenizer.encode(text, add_special_tokens=False)
        or last is None
        or beyond is not None
    ):
        raise ValueError(
            f"the vLLM server at {client.url} has another vocabulary than the policy, whose "
            f"{vocab_size} tokens are those of {base_model(model).name_or_path}: let it serve the "
            "model that is trained."
        )
    processed = last > -1e-3
    wanted = logprobs_mode(sampling)
    matters = sampling.temperature != 1 or sampling.top_p < 1
    if matters and processed is not (wanted == "processed_logprobs"):
        raise ValueError(
            f"the vLLM server at {client.url} does not give the log-probabilities of "
            f"model.temperature={sampling.temperature} before model.top_p={sampling.top_p}: start "
            f"it with --logprobs-mode {wanted}."
        )


def _forced(client: VLLMClient, name: str, token: int) -> float | None:
    """The log-probability of a token that a bias forces: 0 only if it is counted in; None if there
    is no such token."""
    body = {"model": name, "prompt": [0], "max_tokens": 1, "logprobs": 0}
    body |= {"logit_bias": {str(token): 100}, "temperature": 1.0, "return_token_ids": True}
    try:
        answer = client.post("/v1/completions", body)
    except RefusedError:
        return None
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return found[0]
