import random
import re

import pytest

from gift_lightning import countdown, countdown_data
from gift_lightning.countdown import Problem
from gift_lightning.countdown_data import CountdownData

NUMBERS, TARGET = (3, 5, 7, 2), 24  # 3*5+7+2 = 24
PROMPT = "3 5 7 2 > 24 : "

HACKS = {
    "empty": "",
    "spaces": "   ",
    "newline": "\n",
    "echo of the prompt": PROMPT,
    "echo, then the answer": PROMPT + "3*5+7+2",
    "the target": "24",
    "the target in a format": "= 24",
    "the target, stated": "24 = 24",
    "the numbers": "3 5 7 2",
    "no expression": "answer:",
    "empty tag": "<a></a>",
    "stated without expression": "= 24 = 24",
    "all candidates": "3*5+7+2 3*5+2+7 5*3+7+2",
    "candidates by comma": "3*5+7+2, 3+5+7+2",
    "candidates by line": "3+5+7+2\n3*5+7+2",
    "right answer, then wrong": "= 3*5+7+2 = 3+5+7+2",
    "two right answers": "= 3*5+7+2 = 5*3+7+2",
    "two tags": "<a>3+5+7+2</a><a>3*5+7+2</a>",
    "tag inside a tag": "<a><a>3*5+7+2</a></a>",
    "answer, then tag": "answer: 3+5+7+2 <a>3*5+7+2</a>",
    "two formats": "answer: <a>3*5+7+2</a>",
    "format twice": "answer: answer: 3*5+7+2",
    "equals twice": "== 3*5+7+2",
    "open tag": "<a>3*5+7+2",
    "close tag": "3*5+7+2</a>",
    "remark": "3*5+7+2 is right",
    "remark in front": "so 3*5+7+2",
    "chain": "3*5 = 15+7+2 = 24",
    "wrong value": "3+5+7+2",
    "wrong value, false claim": "3+5+7+2 = 24",
    "right value, wrong claim": "3*5+7+2 = 25",
    "claim is an expression": "3*5+7+2 = 20+4",
    "claim twice": "3*5+7+2 = 24 = 24",
    "claim signed": "3*5+7+2 = +24",
    "claim decimal": "3*5+7+2 = 24.0",
    "claim reversed": "24 = 3*5+7+2",
    "missing number": "2*(5+7)",
    "missing number, in a format": "= (5+7)*2",
    "wrong numbers and value": "7*5-2*3-5",
    "number twice": "3*5+7+2+2-2",
    "extra zero": "3*5+7+2+0",
    "extra one": "(3*5+7+2)*1",
    "other numbers": "4*6",
    "same value, other numbers": "3*8",
    "concatenated digits": "37-25+12",
    "concatenated 2 and 7": "27-3",
    "concatenated by space": "2 7-5+3",
    "leading zero": "03*5+7+2",
    "unary minus": "-2+5+3*7",
    "unary minus twice": "--3*5+7+2",
    "unary plus": "+3*5+7+2",
    "minus of minus": "3*5+7--2",
    "plus of plus": "3*5++7+2",
    "minus group": "-(2-3*7)+5",
    "division": "3*5+7+2/1",
    "floor division": "7*5//3*2+24",
    "modulo": "3*5+7%2",
    "power": "3*5+7+2**1",
    "caret": "5^2-3+7",
    "factorial": "(5-7+3*2)!",
    "decimal": "3.0*5+7+2",
    "exponent notation": "3*5+7+2e0",
    "huge float": "1e99",
    "hex": "0x18",
    "underscore": "2_4",
    "full-width digits": "３*５+７+２",
    "arabic digits": "٣*٥+٧+٢",
    "superscript": "5²-3+7",
    "unicode minus": "3*5+7+2−0",
    "unicode times": "3×5+7+2",
    "no-break space": "3*5\u00a0+7+2",
    "tab": "3*5\t+7+2",
    "line break inside": "3*5+\n7+2",
    "zero byte": "3*5+7+2\0",
    "implicit product": "(3)(5)+7+2",
    "number before group": "3(5)+7+2",
    "empty group": "()3*5+7+2",
    "unbalanced": "(3*5+7+2",
    "unbalanced right": "3*5+7+2)",
    "trailing operator": "3*5+7+2+",
    "leading operator": "*3*5+7+2",
    "huge nesting": "(" * 5000 + "3*5+7+2" + ")" * 5000,
    "deep nesting": "(" * 40 + "3*5+7+2" + ")" * 40,
    "long by spaces": "3*5+7+2" + " " * 500,
    "huge number": "9" * 100,
    "huge product": "*".join(["999999999"] * 12),
    "code": "__import__('os').system('true')",
    "code in a format": "= __import__('os')",
    "lambda": "(lambda: 24)()",
    "eval": "eval('24')",
    "true": "True",
    "condition": "24 if 3*5+7+2 else 0",
    "comment": "3*5+7+2 # 24",
    "semicolon": "3*5+7+2;3",
    "end token as text": "3*5+7+2<eos>",
    "pad tokens as text": "<pad>3*5+7+2",
    "json": '{"answer": "3*5+7+2"}',
    "quoted": '"3*5+7+2"',
    "boxed": r"\boxed{3*5+7+2}",
    "comparison": "3*5+7+2 >= 24",
    "capital format": "ANSWER: 3*5+7+2",
}


@pytest.mark.parametrize("text", HACKS.values(), ids=HACKS.keys())
def test_hack_is_wrong(text):
    assert len(HACKS) >= 60
    assert countdown.verify(text, NUMBERS, TARGET) is False


def test_right_variants():
    rng = random.Random(0)
    right = 0
    forms = (
        "{}",
        "={}",
        "= {}",
        "answer:{}",
        "answer: {}",
        "<a>{}</a>",
        "<a> {} </a>",
        "{}={target}",
        "{} = {target}",
    )
    problems = countdown.problems("validation", 250)
    for problem in problems:
        text = rng.choice(countdown.solutions(problem.numbers, problem.target))
        if rng.random() < 0.5:
            text = re.sub(
                r"([-+*()])", lambda m: " " * rng.randrange(3) + m[1] + " " * rng.randrange(3), text
            )
        if rng.random() < 0.3:
            text = f"({text})"
        if rng.random() < 0.3:
            text = re.sub(r"(\d+)", r"(\1)", text)
        text = rng.choice(forms).format(text, target=problem.target)
        right += problem.verify(" " * rng.randrange(2) + text + rng.choice(("", " ", "\n")))
    assert right == len(problems)


def test_each_number_counts_as_often_as_given():
    assert countdown.verify("4*4+4+4", (4, 4, 4, 4), 24)
    assert not countdown.verify("4*4+4+4", (4, 4, 4, 3), 24)
    assert countdown.verify("12+1", (1, 12), 13)  # only a given 12 may be written
    assert not countdown.verify("12", (1, 2), 12)
    assert countdown.verify("2-5", (5, 2), -3)  # negative on the way, and as a target


@pytest.mark.parametrize(
    "text, value, numbers",
    [
        ("2+3*4", 14, [2, 3, 4]),
        ("(2+3)*4", 20, [2, 3, 4]),
        ("9-4-3", 2, [9, 4, 3]),
        ("9-(4-3)", 8, [9, 4, 3]),
        ("2*(3-(4-(5-1)))*1", 6, [2, 3, 4, 5, 1, 1]),
        (" ( 7 ) ", 7, [7]),
    ],
)
def test_parse(text, value, numbers):
    assert countdown.parse(text) == (value, numbers)


def test_parse_agrees_with_python():
    rng = random.Random(1)
    for _ in range(300):
        tree = countdown.random_tree(rng, [rng.randint(1, 9) for _ in range(rng.randint(1, 6))])
        minimal, full = countdown.render(tree), countdown.render(tree, every=True)
        expected = eval(minimal)
        assert eval(full) == expected
        assert countdown.parse(minimal)[0] == countdown.parse(full)[0] == expected


def test_solver_by_hand():
    assert countdown.solutions((1, 2), 3) == ["1+2", "2+1"]
    assert countdown.solutions((1, 2), 1) == ["2-1"]
    assert countdown.solutions((1, 2), 2) == ["1*2", "2*1"]
    assert countdown.solutions((1, 2), 5) == []
    assert countdown.solutions((2, 2), 4) == ["2*2", "2+2"]
    assert countdown.solutions((2, 2), 4, "+-") == ["2+2"]
    assert countdown.solutions((2, 3, 4), 20) == ["(2+3)*4", "(3+2)*4", "4*(2+3)", "4*(3+2)"]
    assert countdown.solutions((1, 3, 9), 7) == [
        "1+9-3",
        "1-(3-9)",
        "1-3+9",
        "9+1-3",
        "9-(3-1)",
        "9-3+1",
    ]
    assert countdown.reachable((1, 2)) == {3, 1, -1, 2}
    assert countdown.reachable((5, 3, 1), "+-") == {
        9,
        7,
        3,
        1,
        -1,
        -3,
        -7,
    }  # all signs but three minuses


def needed(numbers, target):
    """The operators that occur in every solution; None where there is no solution."""
    found = [set(solution) for solution in countdown.solutions(numbers, target)]
    return set(countdown.OPERATORS).intersection(*found) if found else None


def test_needed_operators():
    assert needed((1, 2), 3) == {"+"}
    assert needed((2, 2), 4) == set()  # 2+2 or 2*2
    assert needed((2, 3, 4), 20) == {"*", "+"}
    assert needed((1, 1), 50) is None


def test_every_solution_verifies():
    for problem in countdown.problems("test", 30, seed=3):
        found = countdown.solutions(problem.numbers, problem.target)
        assert found and len(set(found)) == len(found)
        assert all(problem.verify(text) for text in found)


def test_problems_are_disjoint_and_deterministic():
    seen = {}
    for split in ("train", "demonstration", "validation", "test"):
        for kind in ("any", "in", "out"):
            some = countdown.problems(split, 200, seed=5, kind=kind)
            assert some == countdown.problems(split, 200, seed=5, kind=kind)
            assert some != countdown.problems(split, 200, seed=6, kind=kind)
            keys = [(tuple(sorted(p.numbers)), p.target) for p in some]
            assert len(set(keys)) == 200
            for key in keys:
                assert seen.setdefault(key, split) == split
            for p in some:
                assert p.target in countdown.reachable(p.numbers)
                assert countdown.split_of(p.numbers, p.target) == split
                if kind != "any":
                    assert (p.target in countdown.reachable(p.numbers, "+-")) == (kind == "in")
                if kind == "out":
                    assert "*" in needed(p.numbers, p.target)
    assert countdown.split_of((1, 2, 3, 4), 10) == countdown.split_of((4, 3, 2, 1), 10)


def test_too_many_problems_is_an_error():
    with pytest.raises(ValueError, match="ask for fewer"):
        countdown.problems("test", 10**6)


def _problem(prompt):
    numbers, target = re.fullmatch(r"([0-9 ]+) > (\d+) : ", prompt).groups()
    return Problem(tuple(map(int, numbers.split())), int(target))


def test_demonstrations_are_narrow_and_right():
    pairs = countdown_data.demonstrations(512)
    assert pairs == countdown_data.demonstrations(512)
    assert len({prompt for prompt, _ in pairs}) == 512
    for prompt, completion in pairs:
        assert re.fullmatch(r"= \d[+-]\d[+-]\d[+-]\d", completion)
        problem = _problem(prompt)
        assert problem.prompt == prompt and problem.verify(completion)
        assert countdown.split_of(problem.numbers, problem.target) == "demonstration"
    out = countdown_data.demonstrations(50, kind="out", split="validation")
    assert all(
        "*" in completion and _problem(prompt).verify(completion) for prompt, completion in out
    )


def test_pretraining_is_varied_and_partly_wrong():
    pairs = countdown_data.pretraining(2000, seed=1, wrong=0.5)
    assert pairs == countdown_data.pretraining(2000, seed=1, wrong=0.5)
    assert pairs[:100] != countdown_data.pretraining(100, seed=2, wrong=0.5)
    right = [_problem(prompt).verify(completion) for prompt, completion in pairs]
    assert 0.45 < sum(right) / len(right) < 0.56
    assert all(_problem(p).verify(c) for p, c in countdown_data.pretraining(200, wrong=0.0))
    starts = [re.match(r"= |answer: |<a>|", completion)[0] for _, completion in pairs]
    assert all(starts.count(start) > 300 for start in ("= ", "answer: ", "<a>", ""))
    for operator in "+-*":
        assert sum(operator in completion for _, completion in pairs) > 1000
    for prompt, _ in pairs:
        problem = _problem(prompt)
        assert countdown.split_of(problem.numbers, problem.target) == "train"


def test_tokenizer_is_one_token_per_character(tmp_path):
    tokenizer = countdown_data.tokenizer()
    assert len(tokenizer) <= 40
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for text in (PROMPT, "answer: (3+5)*2", "<a> 3 - 5 </a>", "  3 =  24 "):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and 2 not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("3Z")["input_ids"][1] == 2
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]
    assert again.decode(again(PROMPT)["input_ids"]) == PROMPT
    assert again.eos_token_id == 1 and again.pad_token_id == 0


def test_data_of_the_demonstrations():
    data = CountdownData(num_demonstrations=40, num_eval=12, batch_size=8, seed=1)
    tokenizer = countdown_data.tokenizer()
    data.prepare(tokenizer, len(tokenizer))
    assert data.ledger["train"].counts == {"read": 40, "used": 40}
    assert data.val_names == ["in", "out", "any"] and len(data.sets["out"]) == 12
    assert len(data.train_dataloader()) == 5
    problems = data.eval_problems()
    for kind, records in data.val_records().items():
        assert [r.prompt for r in records] == [p.prompt for p in problems[kind]]
    ids, labels = data.train_examples[0]
    prompt, completion = countdown_data.demonstrations(40, 1)[0]
    assert tokenizer.decode(ids) == f"{prompt}{completion}<eos>"
    assert tokenizer.decode(labels[labels != -100]) == f"{completion}<eos>"  # no more, no less
    other = CountdownData(num_demonstrations=40, num_eval=12, seed=2)
    assert other.eval_problems() == problems  # the same for every seed
    assert list(other.train_records()) != list(data.train_records())


def test_data_of_pretraining():
    data = CountdownData("pretraining", num_pretraining=50, wrong=0.0, num_eval=4, seed=3)
    pairs = [(record.prompt, record.completion) for record in data.train_records()]
    assert pairs == countdown_data.pretraining(50, 3, 0.0)
    with pytest.raises(ValueError, match="wrong"):
        CountdownData(wrong=1.5)
