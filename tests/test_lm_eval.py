"""`gift evaluate`: numbers of lm-eval against transformers alone, and what is refused."""

import json
import math
import os
import random
import socket
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from gift_lightning import harness
from gift_lightning.cli import main
from gift_lightning.models import Lora, causal_lm, load_tokenizer, tiny_llama

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_target: right
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
LIKELIHOOD = """
output_type: loglikelihood
doc_to_target: "{{' ' + choices[right]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
ANSWER = """
output_type: generate_until
doc_to_target: "{{greedy}}"
generation_kwargs: {until: ["<eos>"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %} = "


@pytest.fixture
def lm_eval(monkeypatch):
    """lm-eval itself; the variables that it is kept safe with are gone afterwards."""
    for name in ("HF_ALLOW_CODE_EVAL", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    return pytest.importorskip(
        "lm_eval", reason="lm-eval is not here: pip install 'gift-lightning[lm_eval]'"
    )


def problems(num: int = 24) -> list[dict]:
    """Countdown problems, each with four sums of which one is right."""
    rng = random.Random(0)
    found = []
    while len(found) < num:
        numbers = rng.sample(range(1, 10), 4)
        signs = rng.sample(list(product((1, -1), repeat=3)), 4)
        values = [numbers[0] + sum(map(int.__mul__, x, numbers[1:])) for x in signs]
        if values[0] < 0 or len(set(values)) < 4:
            continue
        order = rng.sample(range(4), 4)
        texts = [
            f"= {numbers[0]}" + "".join(f"{s * n:+d}" for s, n in zip(x, numbers[1:], strict=True))
            for x in (signs[i] for i in order)
        ]
        question = " ".join(map(str, numbers)) + f" > {values[0]} :"
        found.append({"question": question, "choices": texts, "right": order.index(0)})
    return found


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """An own folder as the working directory; `tasks(name, text)` writes a task into its tasks/."""
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()

    def write(name: str, text: str, rows: list[dict] | None = None) -> list[dict]:
        rows = problems() if rows is None else rows
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TASK.format(name=name, data=f"{name}.jsonl", cache=tmp_path / "cache")
        Path(f"tasks/{name}.yaml").write_text(task + text)
        return rows

    return write


def run(folder: str = "run", **lora) -> Path:
    """A run's folder with the embedded model, or an adapter on it, in hf/."""
    model = causal_lm("gift:countdown", **lora)
    if lora:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(f"{folder}/hf")
    load_tokenizer("gift:countdown").save_pretrained(f"{folder}/hf")
    return Path(folder)


def evaluate(model: str | Path, names: str, *flags: str) -> None:
    given = ["evaluate", str(model), "--backend", "lm_eval", "--tasks", names]
    main([*given, "--include_path", "tasks", *flags])


def value(path: str | Path, task: str) -> float:
    (row,) = (x for x in json.loads(Path(path).read_text())["results"] if x["task"] == task)
    return row["value"]


def refused(capsys, words: list[str]) -> str:
    """The one sentence that is said; no results are left."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code not in (0, None)
    assert not list(Path().rglob("*lm_eval*.json"))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [x for x in said.splitlines() if x.startswith("gift: error: ")]
    assert len(lines) == 1
    return lines[0]


def likelihood(model, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt), one sequence at a time, no padding, in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + answer])).logits[0]
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows[range(len(answer)), answer].sum().item()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Numbers.


def test_accuracy_is_that_of_the_likelihoods(lm_eval, tasks, capsys):
    rows = tasks("sums", CHOICE)
    folder = run()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "hf"), load_tokenizer("run/hf")
    hits = []
    for row in rows:
        prompt = ids(tokenizer, row["question"])
        answers = [ids(tokenizer, f" {x}") for x in row["choices"]]
        scores = [likelihood(model, prompt, answer) for answer in answers]
        hits.append(scores.index(max(scores)) == row["right"])
    assert 0.1 < sum(hits) / len(hits) < 0.9  # some of both

    evaluate(folder, "sums", "--batch_size", "5")
    assert value("run/lm_eval.json", "sums") == sum(hits) / len(hits)
    printed = capsys.readouterr().out
    for said in ("sums", "acc", "none", "stderr", f"{sum(hits) / len(hits):.3f}", "float32 on cpu"):
        assert said in printed
    assert "0 examples, 24 of 24 problems" in printed and "lm_eval 0." in printed

    report = json.loads(Path("run/lm_eval.json").read_text())
    p = sum(hits) / len(hits)
    assert report["results"][0]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 23))
    assert report["settings"]["batch_size"] == 5 and report["settings"]["add_bos_token"] is False
    assert {"lm_eval", "transformers", "torch", "datasets"} <= report["versions"].keys()

    before = Path("run/lm_eval.json").read_bytes()
    evaluate("run/hf", "sums", "--limit", "3")
    assert value("run/lm_eval-1.json", "sums") == sum(hits[:3]) / 3
    assert Path("run/lm_eval.json").read_bytes() == before
    assert "Limited to the first problems" in capsys.readouterr().out


def test_an_adapter_is_evaluated_with_its_base(lm_eval, tasks):
    rows = tasks("answers", LIKELIHOOD)
    folder = run("lora", lora=Lora(r=4))
    assert not (folder / "hf" / "config.json").exists()
    base, tokenizer = causal_lm("gift:countdown"), load_tokenizer("gift:countdown")

    def perplexity(model) -> float:
        model.eval()
        pairs = ((x["question"], f" {x['choices'][x['right']]}") for x in rows)
        found = [likelihood(model, ids(tokenizer, q), ids(tokenizer, a)) for q, a in pairs]
        return math.exp(-sum(found) / len(found))

    without = perplexity(base)
    expected = perplexity(PeftModel.from_pretrained(base, folder / "hf"))
    assert abs(expected / without - 1) > 0.05
    evaluate(folder, "answers")
    assert value("lora/lm_eval.json", "answers") == pytest.approx(expected, rel=1e-4)


def with_bos(folder: str = "run/hf") -> int:
    """Writes a model whose tokenizer puts BOS before a text, and its chat template too."""
    tokenizer = with_ends("<s> $A")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    tiny_llama(folder, hidden_size=32, num_layers=1, num_heads=2).save_pretrained(folder)
    return tokenizer.bos_token_id


@pytest.mark.parametrize("chat", [False, True])
def test_bos_stands_once_before_every_prompt(lm_eval, tasks, monkeypatch, chat, capsys):
    rows = tasks("answers", LIKELIHOOD)
    tasks("greedy", ANSWER, [{**row, "greedy": "= 1"} for row in rows[:3]])
    bos, tokenizer = with_bos(), load_tokenizer("run/hf")
    assert tokenizer("<s>1")["input_ids"][:2] == [bos, bos]  # the trap

    seen: list[list[int]] = []

    def watched(*args, **kwargs):
        model = causal_lm(*args, **kwargs)
        embed = model.get_input_embeddings()
        embed.register_forward_pre_hook(lambda module, given: seen.extend(given[0].tolist()))
        return model

    monkeypatch.setattr(harness, "causal_lm", watched)
    evaluate("run", "answers,greedy", *(["--apply_chat_template"] if chat else []))
    prompts = [[x for x in row if x != tokenizer.pad_token_id] for row in seen if len(row) > 1]
    assert len(prompts) >= len(rows) + 3
    assert all(x[0] == bos and x.count(bos) == 1 for x in prompts)

    model = AutoModelForCausalLM.from_pretrained("run/hf")
    found = []
    for row in rows:
        # A chat's last space goes to the answer: the template ends in one, the task adds another.
        end = [" =", "  "] if chat else ["", " "]
        prompt, answer = row["question"] + end[0], end[1] + row["choices"][row["right"]]
        found.append(likelihood(model, [bos, *ids(tokenizer, prompt)], ids(tokenizer, answer)))
    expected = math.exp(-sum(found) / len(found))
    assert value("run/lm_eval.json", "answers") == pytest.approx(expected, rel=1e-4)
    said = capsys.readouterr().out
    assert ("Chat template applied; BOS not added" in said) == chat
    assert ("has one: --apply_chat_template" in said) == (not chat)
    settings = json.loads(Path("run/lm_eval.json").read_text())["settings"]
    assert (settings["chat_template_sha256"] is not None) == chat


def test_answers_are_greedy_and_end_at_the_end_token(lm_eval, tasks):
    model, tokenizer = causal_lm("gift:countdown").eval(), load_tokenizer("gift:countdown")
    rows = problems(8)
    for i, row in enumerate(rows):
        sequence = ids(tokenizer, row["question"])
        start = len(sequence)
        while len(sequence) < start + 12 and sequence[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
        text = tokenizer.decode(sequence[start:], skip_special_tokens=True)
        row["greedy"] = text if i % 4 else "= 0"  # three of four as the model says
    tasks("greedy", ANSWER, rows)
    evaluate("gift:countdown", "greedy", "--batch_size", "3")
    assert value("countdown.lm_eval.json", "greedy") == 0.75  # beside the user, not the package
    evaluate("gift:countdown", "greedy", "--gen_kwargs", "max_gen_toks=1", "--output", "x/1.json")
    assert value("x/1.json", "greedy") == 0.0


# What changes numbers is said.


@pytest.mark.parametrize("bos", [False, True])
def test_a_second_bos_in_perplexities_is_said(lm_eval, tasks, capsys, bos):
    tasks("texts", ROLLING, problems(2))
    if bos:
        with_bos()
    evaluate("run" if bos else run(), "texts")
    said = "texts: lm-eval puts BOS before the tokenizer's own"
    assert (said in capsys.readouterr().err) == bos


def test_examples_that_are_not_what_was_asked_are_said(lm_eval, tasks, capsys):
    tasks("own", LIKELIHOOD + "num_fewshot: 0\n", problems(6))
    tasks("asked", LIKELIHOOD, problems(6))
    tasks("first", LIKELIHOOD + "fewshot_split: test\n", problems(6))
    evaluate(run(), "own,asked,first", "--num_fewshot", "2")
    said = capsys.readouterr()
    assert "own: 0 examples (its own, not 2), 6 of 6 problems" in said.out
    assert "asked: 2 examples, 6 of 6 problems" in said.out
    # lm-eval leaves the asked problem out only where fewshot_split names the split that is scored.
    assert "asked: examples may be the very problem that is asked" in said.err
    assert "own: examples" not in said.err and "first: examples" not in said.err


def test_warnings_are_said_once_and_kept(lm_eval, tasks, capsys):
    tasks("greedy", ANSWER, [{**row, "greedy": "= 1"} for row in problems(4)])
    evaluate(run(), "greedy", "--gen_kwargs", "temperature=0.7", "--batch_size", "1")
    (kept,) = json.loads(Path("run/lm_eval.json").read_text())["warnings"]
    assert "temperature=0.7" in kept and "do_sample" in kept
    assert capsys.readouterr().err.count("Mind: ") == 1


def test_groups_and_their_members_are_rows(lm_eval, tasks):
    for name in "one", "two":
        tasks(name, CHOICE, problems(8))
    Path("tasks/both.yaml").write_text(
        "group: both\ntask: [one, two]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    evaluate(run(), "both", "--output", "r.json")
    names = [x["task"] for x in json.loads(Path("r.json").read_text())["results"]]
    assert sorted(names) == ["both", "one", "two"]
    assert value("r.json", "both") == value("r.json", "one") == value("r.json", "two")


# Safety.


def test_local_tasks_reach_for_no_network_and_no_code_may_run(lm_eval, tasks, monkeypatch):
    tasks("sums", CHOICE, problems(4))
    asked = []
    for name in "getaddrinfo", "create_connection":
        monkeypatch.setattr(socket, name, lambda *x, **y: asked.append(x) or 1 / 0)
    evaluate(run(), "sums")
    assert asked == []
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"


@pytest.mark.parametrize("name", ["humaneval/humaneval", "mbpp/mbpp", "score/math/"])
def test_tasks_that_run_model_text_are_refused_unread(lm_eval, tasks, capsys, name):
    """Before their code is imported: these ask the hub for a metric when they are."""
    folder = Path(lm_eval.__file__).parent / "tasks" / name.rpartition("/")[0]
    task = name.rpartition("/")[2] or "score_robustness_math"
    words = ["evaluate", str(run()), "--backend", "lm_eval", "--tasks", task]
    said = refused(capsys, [*words, "--include_path", str(folder)])
    assert "runs what the model writes as code" in said
    assert not any(str(folder) in str(getattr(x, "__file__", "")) for x in sys.modules.values())


def test_a_group_cannot_call_a_task_safe(lm_eval, tasks, capsys):
    tasks("danger", ANSWER + "unsafe_code: true\n", problems(2))
    Path("tasks/g.yaml").write_text("group: g\ntask: [{task: danger, unsafe_code: false}]\n")
    for name in "danger", "g":
        words = ["evaluate", str(run(name)), "--backend", "lm_eval", "--tasks", name]
        said = refused(capsys, [*words, "--include_path", "tasks"])
        assert "danger runs what the model writes as code" in said


# What is refused.


def test_data_that_is_not_there_is_one_sentence(lm_eval, tasks, monkeypatch, capsys):
    import datasets
    import huggingface_hub.constants

    for module in datasets.config, huggingface_hub.constants:  # no retries for 20 seconds
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    tasks("remote", CHOICE)
    path = Path("tasks/remote.yaml")
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: some/where"))
    words = ["evaluate", str(run()), "--backend", "lm_eval", "--include_path", "tasks", "--tasks"]
    said = refused(capsys, [*words, "remote"])
    assert "cannot load remote" in said and "go online once, or point HF_HOME" in said
    with pytest.raises(SystemExit):
        main([*words, "remote"])
    assert "from the Hugging Face hub, unless cached: some/where" in capsys.readouterr().out

    Path("tasks/mine.py").write_text("import no_such_package\n")
    tasks("package", CHOICE + "process_docs: !function mine.keep\n")
    assert "install what it imports" in refused(capsys, [*words, "package"])

    tasks("local", CHOICE)
    Path("local.jsonl").unlink()
    said = refused(capsys, [*words, "local"])
    assert "cannot load local" in said and "data files that it names" in said


def test_a_task_that_is_none_is_one_sentence(lm_eval, tasks, capsys):
    tasks("sums", CHOICE)
    words = ["evaluate", str(run()), "--backend", "lm_eval", "--include_path", "tasks"]
    said = refused(capsys, [*words, "--tasks", "sums,helaswag"])
    assert "no task 'helaswag'" in said and "hellaswag" in said


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--gen_kwargs", "max_gen_toks=512"], ["up to 512 tokens", "512 positions"]),
        (["--gen_kwargs", "colour=red"], ["--gen_kwargs", "no 'colour'"]),
        (["--apply_chat_template"], ["--apply_chat_template", "no chat template"]),
        (["--num_fewshot", "4"], ["--num_fewshot: greedy has 3 examples"]),
        (["--gen_kwargs", "do_sample=true"], ["lm-eval refuses", "temperature"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_what_the_model_or_the_task_cannot_do(lm_eval, tasks, capsys, flags, parts):
    split = "fewshot_split: test\n"  # one example less: the asked problem
    tasks("greedy", ANSWER + split, [{**row, "greedy": "= 1"} for row in problems(4)])
    words = ["evaluate", str(run()), "--backend", "lm_eval", "--tasks", "greedy"]
    said = refused(capsys, [*words, "--include_path", "tasks", *flags])
    assert all(part in said for part in parts), said


def test_results_are_never_written_over(lm_eval, tasks, capsys):
    tasks("sums", CHOICE, problems(2))
    Path("mine.json").write_text("kept")
    with pytest.raises(SystemExit):
        evaluate(run(), "sums", "--output", "mine.json")
    assert "mine.json is there already" in capsys.readouterr().err
    assert Path("mine.json").read_text() == "kept"
    with pytest.raises(SystemExit):
        evaluate("run", "sums", "--output", "mine.json/below.json")
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tasks", " , "], ["--tasks", "name a task"]),
        (["--backend", "lighteval"], ["--backend", "lm_eval"]),
        (["--limit", "0"], ["--limit", "'0'"]),
        (["--limit", "2.5"], ["--limit", "'2.5'"]),
        (["--limit", "nan"], ["--limit", "'nan'"]),
        (["--num_fewshot", "-1"], ["--num_fewshot", "whole number from 0"]),
        (["--batch_size", "0"], ["--batch_size", "whole number from 1"]),
        (["--batch_size", "auto"], ["--batch_size", "'auto'"]),
        (["--gen_kwargs", "temperature"], ["--gen_kwargs", "K=V"]),
        (["--include_path", "nowhere"], ["--include_path", "'nowhere' is no folder"]),
        (["--trust_remote_code"], ["--trust_remote_code"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_flags_that_mean_nothing_are_one_sentence(tmp_path, monkeypatch, capsys, flags, parts):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "gift:countdown", "--backend", "lm_eval", "--tasks", "x", *flags]
    said = refused(capsys, words)
    assert all(part in said for part in parts), said


def test_without_tasks_or_backend(capsys):
    assert "--tasks" in refused(capsys, ["evaluate", "gift:countdown", "--backend", "lm_eval"])
    assert "--backend" in refused(capsys, ["evaluate", "gift:countdown", "--tasks", "x"])


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    words = ["--backend", "lm_eval", "--tasks", "x"]
    assert "run has no hf/" in refused(capsys, ["evaluate", "run", *words])
    assert "some/model is no folder" in refused(capsys, ["evaluate", "some/model", *words])
    assert "no embedded model 'gift:x'" in refused(capsys, ["evaluate", "gift:x", *words])


def test_without_lm_eval_the_way_to_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    words = ["evaluate", "gift:countdown", "--backend", "lm_eval", "--tasks", "x"]
    assert "pip install 'gift-lightning[lm_eval]'" in refused(capsys, words)


@pytest.mark.parametrize(
    ("pattern", "chat", "added"),
    [
        ("$A", False, False),
        ("<s> $A", False, True),
        ("<s> $A", True, False),  # the template's own
        ("$A <eos>", False, False),  # it would stand between prompt and answer
        ("<s> $A <eos>", True, False),
    ],
)
def test_whose_bos_it_is(pattern, chat, added):
    assert harness.adds_bos_token(with_ends(pattern), chat) is added


def test_tokens_on_both_ends_are_refused():
    with pytest.raises(ValueError, match=r"ends every text with '<eos>'.*add_eos_token"):
        harness.adds_bos_token(with_ends("<s> $A <eos>"), False)


def with_ends(pattern: str):
    """The embedded tokenizer, with special tokens around a text."""
    tokenizer = load_tokenizer("gift:countdown")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=pattern, special_tokens=special
    )
    return tokenizer
