"""How vLLM is asked for completions, by a server or in this process."""

from typing import Any

from gift_lightning.rollouts import Sampling
from gift_lightning.seeds import keyed_seed


def logprobs_mode(sampling: Sampling) -> str:
    """What vLLM calls the log-probabilities that the trainer needs.

    It offers them before the temperature (raw) or after temperature and top-p (processed).

    Raises:
        ValueError: neither is ``log_softmax(logits / temperature)``.
    """
    if sampling.temperature == 1:
        return "raw_logprobs"
    if sampling.top_p < 1:
        raise ValueError(
            f"vLLM does not give log-probabilities at model.temperature={sampling.temperature} "
            f"before model.top_p={sampling.top_p}: set one of them to 1, or sample with HFRollout."
        )
    return "processed_logprobs"


def parameters(sampling: Sampling, num_samples: int, seed: int, key: int) -> dict[str, Any]:
    """All that is said about the completions of one prompt, by the names of SamplingParams.

    What is left out would be taken from the model's generation config. vLLM adds a sample's number
    to the seed.
    """
    return {
        "n": num_samples,
        "seed": keyed_seed(seed, "sample", key) >> 1,
        "max_tokens": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # only what is named here ends a completion
        "stop_token_ids": list(sampling.end_ids),
        "logprobs": 0,  # of the drawn token alone
    }
