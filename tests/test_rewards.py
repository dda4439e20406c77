import asyncio
import json
import math
import random
import subprocess
import sys
import textwrap

import pytest

from gift_lightning import countdown
from gift_lightning.gym_answer import ReasoningGym
from gift_lightning.rewards import (
    Countdown,
    ExactMatch,
    Format,
    FunctionReward,
    LengthPenalty,
    build_rewards,
    needs,
    rebuild,
)
from test_countdown import HACKS as COUNTDOWN_HACKS
from test_countdown import NUMBERS, TARGET

# Countdown


def test_countdown_hacks():
    reward = Countdown()
    assert len(COUNTDOWN_HACKS) >= 60
    for text in COUNTDOWN_HACKS.values():
        assert reward.score(text, numbers=list(NUMBERS), target=TARGET) == reward.minimum == 0.0


def test_countdown_right_variants():
    rng = random.Random(0)
    for _ in range(250):
        numbers = [rng.randint(1, 9) for _ in range(rng.choice((2, 3, 3, 3, 4)))]
        target = rng.choice(sorted(countdown.reachable(numbers)))
        text = rng.choice(countdown.solutions(numbers, target))
        stated = countdown.FORMATS if target >= 0 else countdown.FORMATS[:3]
        said = rng.choice(stated).format(text, target=target)
        rng.shuffle(numbers)
        assert Countdown().score(said, numbers=numbers, target=target, prompt="?") == 1.0, said


@pytest.mark.parametrize(
    "numbers, target",
    [
        (None, 24),
        ([], 24),
        ("3572", 24),
        ([3, 5, "7"], 24),
        ([3.0], 3),
        ([True], 1),
        ([3, 5], None),
        ([3, 5], "8"),
        ([3, 5], 8.0),
        ([3, 5], [8]),
    ],
)
def test_countdown_problem_that_is_none(numbers, target):
    assert Countdown().score("= 3+5", numbers=numbers, target=target) is None


# ExactMatch

EXACT_HACKS = (
    "",
    " ",
    "\n",
    "paris",
    "PARIS",
    "Pari",
    "aris",
    "Parisian",
    "Paris.",
    "Paris!",
    '"Paris"',
    "'Paris'",
    "**Paris**",
    "$Paris$",
    "(Paris)",
    "[Paris]",
    "{Paris}",
    "<answer>Paris</answer>",
    "<a>Paris</a>",
    "\\boxed{Paris}",
    "\\text{Paris}",
    "#### Paris",
    "answer: Paris",
    "The answer is Paris",
    "Paris is the answer",
    "Paris Paris",
    "Paris\nParis",
    "Paris, London",
    "London, Paris",
    "Paris or London",
    "Paris/London",
    "London Paris Rome Madrid",
    "not Paris",
    "Paris?",
    "P a r i s",
    "P-aris",
    "Par\u00adis",
    "Par\u200bis",
    "\u200bParis",
    "Paris\u200b",
    "\ufeffParis",
    "Pаris",
    "Ｐａｒｉｓ",
    "Paris\0",
    "\0Paris",
    "sirap",
    "siraP",
    "London",
    ".*",
    "P.*",
    "%",
    "_____",
    "None",
    "null",
    "nan",
    "True",
    "answer",
    "{answer}",
    "{{answer}}",
    "$answer",
    "columns['answer']",
    "gold",
    "__import__('os')",
    "Paris\\",
    "Paris\\n",
    "Paris<eos>",
    "<pad>Paris",
    "What is the capital of France?",
    "Paris" * 1000,
)


def test_exact_match_hacks():
    assert len(EXACT_HACKS) >= 60
    for text in EXACT_HACKS:
        assert ExactMatch().score(text, answer="Paris") == 0.0, text
        folded = ExactMatch(ignore_case=True).score(text, answer="Paris")
        assert folded == float(text in ("paris", "PARIS")), text


def test_exact_match_right_variants():
    rng = random.Random(0)
    spaces = ("", " ", "\n", "\t", "\r\n", "  ", "\u00a0")
    golds = [
        "Paris",
        "18",
        "a b",
        "x = 1",
        "ß",
        "é",
        "\ud800",
        "ÄÖ",
        "日本",
        "1,234",
        "\\frac{1}{2}",
    ]
    for i in range(200):
        gold = rng.choice(golds)
        said = rng.choice(spaces) + gold + rng.choice(spaces)
        assert ExactMatch("city").score(said, city=rng.choice(spaces) + gold) == 1.0
        swapped = said.swapcase() if len(said.swapcase()) == len(said) else said
        assert ExactMatch(ignore_case=True).score(swapped, answer=gold) == 1.0, i


@pytest.mark.parametrize(
    "gold, said, expected",
    [
        (18, "18", 1),
        (18, "18.0", 0),
        (27.0, "27", 1),
        (0.5, "0.5", 1),
        (-3, "-3", 1),
        ("", "", None),
        (" ", "", None),
        (None, "None", None),
        (True, "True", None),
        (math.nan, "nan", None),
        (math.inf, "inf", None),
        (["a"], "a", None),
    ],
)
def test_exact_match_of_other_values(gold, said, expected):
    assert ExactMatch().score(said, answer=gold) == expected


# Format

THINK = r"<think>.+</think>\n<answer>[^<]+</answer>"
FORMAT_HACKS = (
    "",
    " ",
    "<think></think>\n<answer></answer>",
    "<think>a</think>\n<answer></answer>",
    "<think></think>\n<answer>b</answer>",
    "<think>a</think><answer>b</answer>",
    "<think>a</think> <answer>b</answer>",
    "<think>a</think>\n\n<answer>b</answer>",
    "<think>a</think>\r\n<answer>b</answer>",
    "<think>a</think>\\n<answer>b</answer>",
    "<answer>b</answer>\n<think>a</think>",
    "<think>a</think>\n<answer>b",
    "<think>a</think>\nb</answer>",
    "<think>a\n<answer>b</answer>",
    "a</think>\n<answer>b</answer>",
    "<think>a</think>\n<answer>b</answer> ",
    " <think>a</think>\n<answer>b</answer>",
    "<think>a</think>\n<answer>b</answer>\n",
    "\n<think>a</think>\n<answer>b</answer>",
    "x<think>a</think>\n<answer>b</answer>",
    "<think>a</think>\n<answer>b</answer>x",
    "<think>a</think>\n<answer>b</answer>.",
    "<think>a</think>\n<answer>b</answer><eos>",
    "<think>a</think>\n<answer>b<c</answer>",
    "<think>a</think>\n<answer><answer>b</answer></answer>",
    "<Think>a</Think>\n<Answer>b</Answer>",
    "<THINK>a</THINK>\n<ANSWER>b</ANSWER>",
    "<think >a</think >\n<answer >b</answer >",
    "< think>a</think>\n<answer>b</answer>",
    "<thinking>a</thinking>\n<answer>b</answer>",
    "<think>a<think>\n<answer>b</answer>",
    "<think>a</think>\n<answer>b<answer>",
    "[think]a[/think]\n[answer]b[/answer]",
    "&lt;think&gt;a&lt;/think&gt;\n<answer>b</answer>",
    "＜think＞a＜/think＞\n＜answer＞b＜/answer＞",
    "<think>a</think>\n<answer>b</answer>\0",
    "<think>a</think>\n<answ\u200ber>b</answer>",
    "<thіnk>a</thіnk>\n<answer>b</answer>",
    "<think>a</think>",
    "<answer>b</answer>",
    "think a answer b",
    "<think><answer>",
    "</think></answer>",
    "<think>a</think>\n",
    "\n<answer>b</answer>",
    THINK,
    r"<think>.+</think>",
    ".*",
    ".+",
    "^$",
    "(?s).*",
    "<think>a</think>\n<answer>b</answer>\n<answer>",
    "<think>a</think>\n<answer>b</answer></answer>",
    "<think>a</think>\n<answer>b</answer>" + "x" * 1000,
    "x" * 1000,
    "<" * 1000,
    "None",
    "True",
    "re.compile('')",
    "__import__('re')",
    "{'format': 1}",
    "please score 1",
    "format",
    "<think>a</think>\t<answer>b</answer>",
    "<think>a</think>\x0b<answer>b</answer>",
    "<think>a</think>\u2028<answer>b</answer>",
)


def test_format_hacks():
    assert len(FORMAT_HACKS) >= 60
    for text in FORMAT_HACKS:
        assert Format(THINK).score(text) == 0.0, text


def test_format_right_variants():
    rng = random.Random(0)
    parts = ["x", "2+2=4", "a\nb", "é日本", "</think", "\n\n", "<b>", "\\boxed{1}", " ", "\ud800"]
    for _ in range(200):
        thought = "".join(rng.choices(parts, k=rng.randint(1, 6)))
        answer = "".join(x for x in rng.choices(parts, k=3) if "<" not in x) or "4"
        assert Format(THINK).score(f"<think>{thought}</think>\n<answer>{answer}</answer>") == 1.0


# LengthPenalty


def test_length_penalty_by_hand():
    """DAPO, eq. 13, with a maximum of 20480 and a cache of 4096 tokens."""
    reward = LengthPenalty(cache=4096, max_length=20480)
    for length, expected in (
        (0, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1.0),
        (20481, -1.0),
        (10**6, -1.0),
    ):
        assert reward.score("", completion_ids=[0] * length) == expected


def test_a_cache_longer_than_the_runs_completions_is_refused():
    for reward, limit in ((LengthPenalty(24), 24), (LengthPenalty(64, 128), 24)):
        reward.check(limit)
    with pytest.raises(ValueError, match="cache must lie between 1 and 24, got 64: change it"):
        LengthPenalty(64).check(24)


def test_length_penalty_hacks():
    """What is too long is too long, whatever it looks like: tokens count, not characters."""
    rng = random.Random(0)
    texts = ("", "a", " ", "\u200b", "x" * 10, "LengthPenalty", "-1", "max_completion_length = 1")
    for i in range(64):
        ids = [rng.choice((0, 1, -100, 50256))] * rng.choice((64, 65, 100, 5000))
        columns = {"completion_ids": ids, "max_completion_length": 64, "prompt": "p" * i}
        assert LengthPenalty(cache=16).score(rng.choice(texts), **columns) == -1.0
    assert LengthPenalty.minimum == -1.0


def test_length_penalty_right_variants():
    for length in range(200):
        columns = {"completion_ids": [7] * length, "max_completion_length": 250}
        assert LengthPenalty(cache=51).score("x" * 9999, **columns) == 0.0
    scores = [LengthPenalty(10, 20).score("", completion_ids=[0] * n) for n in range(30)]
    assert scores == sorted(scores, reverse=True)


# ReasoningGym


@pytest.fixture(scope="module")
def gym():
    """Entries of a task, as they come out of JSON, with the reward of it."""
    reasoning_gym = pytest.importorskip("reasoning_gym")

    def entries(task, size, **config):
        made = reasoning_gym.create_dataset(task, size=size, seed=5, **config)
        return ReasoningGym(task), [json.loads(json.dumps(x)) for x in made]

    return entries


def number_hacks(gold: str) -> dict[str, str]:
    digits = {c: chr(0xFF10 + int(c)) for c in "0123456789"}
    return {
        "empty": "",
        "spaces": "   ",
        "more digits": gold + "1",
        "another first": "1" + gold,
        "sentence": f"The answer is {gold}",
        "sentence after": f"{gold} is the answer",
        "junk": f"{gold} junk",
        "twice": f"{gold} {gold}",
        "two lines": f"{gold}\n{gold}",
        "list": f"{gold}, 7",
        "or": f"{gold} or 7",
        "or before": f"7 or {gold}",
        "slash": f"{gold}/7",
        "all": " ".join(map(str, range(-200, 1000))),
        "all by comma": ",".join(map(str, range(-200, 1000))),
        "negated": f"-{gold}" if gold != "0" else "-1",
        "sum": f"{gold}+0",
        "product": f"{gold}*1",
        "chain": f"{gold} = {gold}",
        "brackets": f"[{gold}]",
        "parentheses": f"({gold})",
        "quotes": f'"{gold}"',
        "bold": f"**{gold}**",
        "math": f"${gold}$",
        "box": f"\\boxed{{{gold}}}",
        "hashes": f"#### {gold}",
        "another tag": f"<a>{gold}</a>",
        "open tag": f"<answer>{gold}",
        "capital tag": f"<ANSWER>{gold}</ANSWER>",
        "empty last tag": f"<answer>{gold}</answer><answer></answer>",
        "wrong last tag": f"<answer>{gold}</answer><answer>{gold}1</answer>",
        "wide digits": "".join(digits.get(c, c) for c in gold),
        "hex": hex(int(gold)),
        "octal": oct(int(gold)),
        "binary": bin(int(gold)),
        "words": "one",
        "nan": "nan",
        "inf": "inf",
        "minus inf": "-inf",
        "overflow": "1e999",
        "none": "None",
        "null": "null",
        "true": "True",
        "json": json.dumps({"answer": gold}),
        "python list": str([gold]),
        "eval": f"eval('{gold}')",
        "import": "__import__('os').getpid()",
        "int": f"int({gold})",
        "print": f"print({gold})",
        "lambda": f"(lambda: {gold})()",
        "condition": f"{gold} if True else 0",
        "format": "{answer}",
        "entry": "entry['answer']",
        "key": "answer",
        "near above": f"{int(gold) + 1}",
        "near below": f"{int(gold) - 1}",
        "half": f"{gold}.5",
        "scaled": f"{gold}00",
        "unit": f"{gold} eggs",
        "percent": f"{gold}%",
        "zero byte": f"{gold}\0",
        "invisible": f"{gold}\u200b",
        "comment": f"{gold} # right",
        "semicolon": f"{gold};",
        "colon": f"answer: {gold}",
        "question": f"{gold}?",
    }


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "gsm_symbolic", "products"])
def test_gym_number_hacks(gym, task):
    reward, entries = gym(task, 8)
    for entry in entries:
        hacks = number_hacks(entry["answer"])
        assert len(hacks) >= 60
        for name, text in hacks.items():
            assert reward.score(text, entry=entry) == 0.0, (name, text, entry["answer"])
        assert reward.score(entry["question"], entry=entry) == 0.0
        assert reward.score(entry["answer"], entry=entry) == 1.0


FORMULA_HACKS = (
    "integrate({integrand}, {variable})",
    "Integral({integrand}, {variable})",
    "sympify('{integrand}')",
    "S('0')",
    "{variable}.diff()",
    "Symbol('{variable}')",
    "__import__('os')._exit(0)",
    "[0][0]",
    "lambda: 0",
    "exec('1')",
    "0 if 1 else 0",
    "{integrand}",
    "0",
    "nan",
    "oo",
    "C",
)


def test_gym_never_has_text_evaluated(gym, tmp_path):
    reward, entries = gym("simple_integration", 4)
    for entry in entries:
        for text in FORMULA_HACKS:
            said = text.format(**entry["metadata"])
            assert reward.score(said, entry=entry) == 0.0, said
        assert reward.score(entry["answer"].replace("C", "7"), entry=entry) == 1.0
    mark = tmp_path / "written"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for task in (
        "countdown",
        "polynomial_multiplication",
        "intermediate_integration",
        "string_insertion",
        "spiral_matrix",
        "binary_matrix",
        "n_queens",
    ):
        entries = gym(task, 1)[1]
        for strict in (True, False):
            for text in (code, f"[{code}]", f"{code}, 1", f"1 + {code}"):
                assert ReasoningGym(task, strict).score(text, entry=entries[0]) == 0.0
    assert not mark.exists()


def test_gym_constant_and_near_answers(gym):
    """What the scorers themselves call right."""
    for task, text in (
        ("coin_flip", "0"),
        ("complex_arithmetic", "nan"),
        ("countdown", "2**3"),
        ("spell_backward", "{answer}0"),
        ("time_intervals", "{answer}0"),
        ("string_insertion", "list('{answer}')"),
        ("number_sorting", "[]"),
        ("prime_factorization", "many"),
        ("boxnet", "42"),
    ):
        reward, entries = gym(task, 10)
        for entry in entries:
            if entry["answer"] != text:
                assert reward.score(text.format(**entry), entry=entry) == 0.0, task


TASKS = (
    "advanced_geometry",
    "arc_agi",
    "basic_arithmetic",
    "base_conversion",
    "bitwise_arithmetic",
    "caesar_cipher",
    "calendar_arithmetic",
    "chain_sum",
    "coin_flip",
    "complex_arithmetic",
    "count_primes",
    "countdown",
    "decimal_chain_sum",
    "dice",
    "family_relationships",
    "fraction_simplification",
    "gcd",
    "gsm_symbolic",
    "isomorphic_strings",
    "lcm",
    "leg_counting",
    "letter_counting",
    "mini_sudoku",
    "n_queens",
    "number_filtering",
    "number_sequence",
    "number_sorting",
    "prime_factorization",
    "products",
    "ransom_note",
    "simple_equations",
    "simple_geometry",
    "simple_integration",
    "spell_backward",
    "time_intervals",
    "word_ladder",
    "word_sorting",
)


def test_gym_right_variants(gym):
    """Every task's own answers, with spaces around them and in tags."""
    rng = random.Random(0)
    right, tried = 0, 0
    for task in TASKS:
        reward, entries = gym(task, 6)
        for entry in entries:
            said = rng.choice(
                ("{}", " {}", "{}\n", "so <answer> {} </answer>", "<answer>{}</answer>")
            )
            tried += 1
            right += reward.score(said.format(entry["answer"]), entry=entry) == 1.0
    assert tried >= 200
    assert right == tried


def test_gym_other_right_answers(gym):
    reward, entries = gym("countdown", 5)
    for entry in entries:
        assert reward.score(f"({entry['answer']})", entry=entry) == 1.0
    reward, entries = gym("prime_factorization", 5)
    for entry in entries:
        factors = entry["answer"].split(" × ")
        assert reward.score(" × ".join(reversed(factors)), entry=entry) == 1.0
    reward, entries = gym("gsm_symbolic", 5)
    for entry in entries:
        assert reward.score(f"{int(entry['answer']):,}.0".replace(",", ""), entry=entry) == 1.0


def test_gym_lenient_gives_the_scorers_credit(gym):
    _, entries = gym("chain_sum", 1)
    entry = entries[0]
    assert ReasoningGym("chain_sum").score(entry["answer"] + "1", entry=entry) == 0.0
    size = len(entry["answer"])
    credit = ReasoningGym("chain_sum", strict=False).score(entry["answer"] + "1", entry=entry)
    assert credit == pytest.approx(size / (size + 1))


@pytest.mark.parametrize("entry", [None, "x", {}, {"answer": "1"}, {"metadata": {}}])
def test_gym_entry_that_is_none(entry):
    pytest.importorskip("reasoning_gym")
    assert ReasoningGym("chain_sum").score("1", entry=entry) is None


def test_gym_entry_of_another_task_is_no_wrong_answer(gym):
    _, entries = gym("chain_sum", 1)
    assert ReasoningGym("prime_factorization").score("7 × 7", entry=entries[0]) is None


@pytest.mark.parametrize("task", ["puzzle24", "game_of_life_halting", "composite"])
def test_gym_broken_tasks_are_refused(task):
    with pytest.raises(ValueError, match=f"^ReasoningGym.task: {task} cannot be used, because"):
        ReasoningGym(task)


def test_gym_unknown_task_is_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="reasoning-gym has no task 'chain_sun'"):
        ReasoningGym("chain_sun").prepare()


# Functions


def all_arguments(prompts, completions, completion_ids, answer, other=None, **kwargs):
    assert sorted(kwargs) == ["max_completion_length", "numbers"]
    ((ids,), (length,)) = completion_ids, kwargs["max_completion_length"]
    assert (prompts, answer, other, ids, length) == (["p"], ["18"], [[]], [1, 2], 9)
    return [float(len(completions[0]))]


def chat(completions, **kwargs):
    return [float(completion[0]["content"] == "hi") for completion in completions]


async def later(completions):
    await asyncio.sleep(0)
    return [len(completions) + 1.5]


def test_function_gets_lists_of_one():
    columns = {"answer": "18", "other": [], "numbers": [1], "max_completion_length": 9}
    reward = FunctionReward(all_arguments)
    assert reward.score("abc", prompt="p", completion_ids=[1, 2], **columns) == 3.0
    assert reward.reads == ("answer",)
    assert reward.minimum == 0.0


def test_function_gets_messages_where_the_prompt_has_them():
    prompt = [{"role": "user", "content": "?"}]
    assert FunctionReward(chat).score("hi", prompt=prompt, completion_ids=[]) == 1.0


def test_function_may_be_a_coroutine_and_name_little():
    assert FunctionReward(later).score("a", prompt="p", completion_ids=[], answer=1) == 2.5


# How a config names them

MODULE = """
from gift_lightning.rewards import Reward

class Mine(Reward):
    reads = ("answer",)
    def __init__(self, power: float = 2.0, names: list[str] | None = None):
        self.power, self.names = power, names
    def score(self, completion, **columns):
        return self.power

class Needs(Mine):
    def score(self, completion, gold, *, hint, extra=None, **columns):
        return 0.0

class Outer:
    class Inner(Mine):
        pass

class NoColumns(Mine):
    def score(self, completion):
        return 0.0

class Unbounded(Mine):
    minimum = float("-inf")

class Named(Mine):
    minimum = "low"

class Own(Mine):
    reads = ("completion",)

class Picky(Mine):
    def __init__(self, size: int):
        raise ValueError(f"size {size} is odd.")

class Abstract(Reward):
    pass

class NoReward:
    pass

def short(completions):
    return [1.0 for _ in completions]

def low(completions, **columns):
    return [-1.0 for _ in completions]
low.minimum = -1.0

def none(prompts):
    return [1.0]

value = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "my_broken.py").write_text("import not_a_module_at_all\n")
    (tmp_path / "my_syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_rewards", "my_broken", "my_syntax"):
        sys.modules.pop(name, None)


def test_specs(module):
    built = build_rewards(
        [
            "ExactMatch",
            {"class_path": "Format", "init_args": {"regex": "a+"}, "weight": 2},
            {"class_path": "gift_lightning.rewards.Format", "init_args": {"regex": "b"}},
            "my_rewards.short",
            {"class_path": "my_rewards.Mine", "init_args": {"power": 3, "names": ["a"]}},
            {"class_path": "my_rewards.low", "weight": 0, "init_args": {}},
            "my_rewards.Outer.Inner",
            "MathAnswer",
            {"class_path": "LengthPenalty", "init_args": {"cache": 5}, "weight": 0.5},
            "Countdown",
        ]
    )
    assert [x.name for x in built] == (
        [
            "ExactMatch",
            "Format",
            "Format_2",
            "short",
            "Mine",
            "low",
            "Inner",
            "MathAnswer",
            "LengthPenalty",
            "Countdown",
        ]
    )
    assert [x.weight for x in built] == [1, 2, 1, 1, 1, 0, 1, 1, 0.5, 1]
    assert [x.reward.minimum for x in built] == [0, 0, 0, 0, 0, -1, 0, 0, -1, 0]
    assert (built[4].reward.power, built[4].reward.names) == (3.0, ["a"])
    for x in built:
        again = rebuild(json.loads(json.dumps(x.spec)))
        assert type(again) is type(x.reward)
        assert vars(again) == vars(x.reward)


def test_what_a_reward_needs(module):
    built = build_rewards(["my_rewards.Needs", "my_rewards.short", "Countdown", "MathAnswer"])
    assert [needs(x.reward) for x in built] == [
        {"answer", "gold", "hint"},
        set(),
        {"numbers", "target"},
        {"answer"},
    ]


@pytest.mark.parametrize(
    "specs, said",
    [
        ("Format", "rewards is a list"),
        (["Fromat"], r"rewards\[0\] \(Fromat\) names no reward: choose Countdown, ExactMatch,"),
        ([""], r"rewards\[0\].class_path must name a reward or a function, not ''"),
        ([{}], r"rewards\[0\].class_path must name a reward or a function, not None"),
        ([{"class": "Format"}], r"rewards\[0\]: 'class' is no key of a reward"),
        (["Countdown", "no.such"], r"rewards\[1\] \(no.such\) does not import \(ModuleNotFound"),
        (["my_rewards.nothing"], "does not import .AttributeError: .*has no attribute 'nothing'"),
        (["my_rewards.Mine.deeper"], "does not import .AttributeError"),
        (["my_broken.f"], "does not import .ModuleNotFoundError: No module .*not_a_module_at_all"),
        (["my_syntax.f"], "does not import .SyntaxError"),
        (["__main__.f"], "workers cannot import a script or notebook"),
        (["my_rewards.value"], "is neither a Reward nor a function"),
        (["my_rewards.NoReward"], "is neither a Reward nor a function"),
        (["my_rewards.Abstract"], "abstract"),
        (["my_rewards.none"], "the function takes no completions"),
        (["my_rewards.NoColumns"], r"its score must take \*\*columns"),
        (["my_rewards.Unbounded"], "its minimum must be finite"),
        (["my_rewards.Named"], "its minimum must be a number, got 'low'"),
        (["my_rewards.Own"], "cannot read the column 'completion'"),
        ([{"class_path": "MathAnswer", "init_args": {"answer": "completion"}}], "'completion'"),
        (["Format"], r"rewards\[0\] \(Format\).init_args: .*required: regex"),
        ([{"class_path": "Format", "init_args": {"regex": "("}}], "is no regular expression"),
        ([{"class_path": "Format", "init_args": {"regex": 3}}], "regex must be str, not '3'"),
        ([{"class_path": "Format", "init_args": {"regx": "a"}}], "Option 'regx' is not accepted"),
        ([{"class_path": "Format", "init_args": ["a"]}], "init_args must be a mapping"),
        ([{"class_path": "my_rewards.Mine", "init_args": {"power": "x"}}], "power must be float"),
        ([{"class_path": "my_rewards.Mine", "init_args": {"names": [1]}}], "names must be str"),
        ([{"class_path": "my_rewards.Picky", "init_args": {"size": 3}}], "size 3 is odd"),
        ([{"class_path": "my_rewards.short", "init_args": {"a": 1}}], "takes no init_args"),
        ([{"class_path": "LengthPenalty", "init_args": {"cache": 0}}], "cache must lie between 1"),
        ([{"class_path": "LengthPenalty", "init_args": {"cache": 9, "max_length": 8}}], "1 and 8"),
        ([{"class_path": "ReasoningGym", "init_args": {"task": "puzzle24"}}], "use countdown"),
        ([{"class_path": "Countdown", "weight": -1}], "weight must be a finite number of 0 or"),
        ([{"class_path": "Countdown", "weight": math.nan}], "weight must be a finite number"),
        ([{"class_path": "Countdown", "weight": math.inf}], "weight must be a finite number"),
        ([{"class_path": "Countdown", "weight": "1"}], "weight must be a finite number"),
        ([{"class_path": "Countdown", "weight": True}], "weight must be a finite number"),
    ],
)
def test_bad_spec_is_one_clear_sentence(module, specs, said):
    with pytest.raises(ValueError, match=said) as caught:
        build_rewards(specs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("rewards")
    assert len(message) < 300


def test_workers_import_no_torch():
    code = (
        "import sys, gift_lightning.worker, gift_lightning.workers, gift_lightning.math_answer; "
        "import gift_lightning.gym_answer; "
        "heavy = {'torch', 'numpy', 'sympy', 'math_verify', 'reasoning_gym', 'jsonargparse'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
