"""A stand-in for vLLM's server, with the endpoints and the ways of vLLM 0.32 that matter here.

It samples from a transformers model, one token at a time. What it is told, it does: what it has
computed of a prompt under a name is kept under that name, as vLLM's prefix cache is.
"""

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--host", required=True)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--max-model-len", type=int, default=512)
parser.add_argument("--max-lora-rank", type=int, default=16)
parser.add_argument("--logprobs-mode", default="raw_logprobs")
parser.add_argument("--enable-lora", action="store_true")
parser.add_argument("--dtype")
parser.add_argument("--enforce-eager", action="store_true")
parser.add_argument("--die-after", type=int, help="completions that are answered before it ends")
parser.add_argument("--lose-answers", action="store_true", help="each path's first is not sent")
said = parser.parse_args()

torch.set_num_threads(1)
models = {"base": AutoModelForCausalLM.from_pretrained(said.model, dtype=torch.float32)}
tokenizer = AutoTokenizer.from_pretrained(said.model)
paths: dict[str, str] = {}
kept: dict[tuple, torch.Tensor] = {}
lost: set[str] = set()
lock, asked = Lock(), 0


class Refused(Exception):
    pass


def first_logits(model, name, body):
    """Of a prompt; as vLLM, from older weights if neither the name nor the salt is new."""
    key = name, body.get("cache_salt"), tuple(body["prompt"])
    if key not in kept:
        kept[key] = model(input_ids=torch.tensor([body["prompt"]])).logits[0, -1]
    return kept[key]


@torch.no_grad()
def complete(body):
    global asked
    asked += 1
    if said.die_after is not None and asked > said.die_after:
        print("ValueError: the stub has died", flush=True)
        os._exit(3)
    name = body["model"]
    if name not in models:
        raise Refused(404, f"The model `{name}` does not exist.")
    model, size = models[name], models["base"].config.vocab_size
    bias = torch.zeros(size)
    for token, value in body.get("logit_bias", {}).items():
        if int(token) >= size:
            raise Refused(400, "logit_bias contains out-of-vocab token ids.")
        bias[int(token)] = value
    if len(body["prompt"]) + body["max_tokens"] > said.max_model_len:
        raise Refused(400, "The prompt is too long.")
    assert body.get("top_p", 1) == 1 and body["return_token_ids"]
    choices, ends = [], set(body.get("stop_token_ids", []))
    for i in range(body.get("n", 1)):
        random = torch.Generator().manual_seed(body.get("seed", 0) + i)
        tokens, logprobs, finished = [], [], False
        while len(tokens) < body["max_tokens"] and not finished:
            if tokens:
                ids = torch.tensor([body["prompt"] + tokens])
                raw = model(input_ids=ids).logits[0, -1]
            else:
                raw = first_logits(model, name, body)
            scores = torch.log_softmax((raw + bias) / body["temperature"], -1)
            token = int(torch.multinomial(scores.exp(), 1, generator=random))
            shown = raw.log_softmax(-1) if said.logprobs_mode == "raw_logprobs" else scores
            tokens.append(token)
            logprobs.append(float(shown[token]))
            finished = token in ends
        choice = {"index": i, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
        choices.append({**choice, "finish_reason": "stop" if finished else "length"})
    return {"choices": choices[::-1]}


def load_adapter(body):
    if not said.enable_lora or os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") != "1":
        raise Refused(404, "Not Found")
    if body["lora_name"] in models and not body.get("load_inplace"):
        raise Refused(400, "The adapter has already been loaded.")
    base = AutoModelForCausalLM.from_pretrained(said.model, dtype=torch.float32)
    config = PeftConfig.from_pretrained(body["lora_path"])
    config.init_lora_weights = True  # whatever else a start does to the base is not done
    loaded = PeftModel.from_pretrained(base, body["lora_path"], config=config).eval()
    if loaded.peft_config["default"].r > said.max_lora_rank:
        raise Refused(500, "LoRA rank is greater than max_lora_rank.")
    models[body["lora_name"]], paths[body["lora_name"]] = loaded, body["lora_path"]
    return "Success"


def unload_adapter(body):
    if body["lora_name"] not in paths:
        raise Refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
    del models[body["lora_name"]], paths[body["lora_name"]]
    return "Success"


def call(body):
    if os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
        raise Refused(404, "Not Found")
    assert body["method"] == "reload_weights"
    path = body["kwargs"]["weights_path"]
    models["base"] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {"results": [None]}


def tokenise(body):
    ids = tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
    return {"tokens": ids}


def cards():
    found = [{"id": name, "parent": None if name == "base" else "base"} for name in models]
    return {"data": [{**card, "max_model_len": said.max_model_len} for card in found[::-1]]}


POST = {
    "/v1/completions": complete,
    "/v1/load_lora_adapter": load_adapter,
    "/v1/unload_lora_adapter": unload_adapter,
    "/collective_rpc": call,
    "/tokenize": tokenise,
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"/health": "", "/v1/models": cards()}[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            with lock:
                done = POST[self.path](body)
            if said.lose_answers and self.path not in lost:
                lost.add(self.path)
                self.close_connection = True
                return
            self.answer(200, done)
        except Refused as refused:
            self.answer(refused.args[0], {"error": {"message": refused.args[1]}})

    def answer(self, status, what):
        data = (what if isinstance(what, str) else json.dumps(what)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    print("ready", file=sys.stderr)
    ThreadingHTTPServer((said.host, said.port), Handler).serve_forever()
