import json
import math
import random
import time

import pytest

from gift_lightning.answers import final_answer
from gift_lightning.math_answer import MathAnswer

BOX = "\\boxed{%s}"


@pytest.fixture(scope="module")
def reward():
    reward = MathAnswer()
    reward.prepare()
    return reward


# Attacks: the reference is 18, or what the last table says. No one may score.

UNANCHORED = {
    "empty": "",
    "spaces": "  \n ",
    "the number alone": "18",
    "a sentence": "The answer is 18",
    "an answer by colon": "answer: 18",
    "final answer": "The final answer is $18$. I hope it is correct.",
    "inline math": "$18$",
    "display math": "\\[ 18 \\]",
    "echo of the prompt": "How many eggs? Put the answer in \\boxed{}.",
    "empty box": "\\boxed{}",
    "box without content": "\\boxed",
    "empty hashes": "####",
    "hashes without number": "#### the answer",
    "three hashes": "### 18",
    "open box": "\\boxed{18",
    "open outer box": "\\boxed{17 \\boxed{18}",
    "nested box": "\\boxed{\\boxed{18}}",
    "box in a wrong box": "\\boxed{17 \\boxed{18}}",
    "box with a longer name": "\\boxeds{18}",
    "box in capitals": "\\BOXED{18}",
    "box with another bracket": "\\boxed(18)",
    "box of two digits without braces": "\\boxed 18",
    "two boxes": "\\boxed{17}\\boxed{18}",
    "two boxes, right first": "\\boxed{18}\\boxed{17}",
    "two boxes with or": "\\boxed{17} or \\boxed{18}",
    "two boxes with a text or": "\\boxed{18} \\text{ or } \\boxed{19}",
    "two boxes in math": "$\\boxed{17}$, $\\boxed{18}$",
    "all candidates in boxes": "".join(BOX % n for n in range(100)),
    "right box, then wrong": "\\boxed{18}. No, wait: it is \\boxed{17}.",
    "hashes twice in a line": "#### 17 #### 18",
    "two numbers after hashes": "#### 17 18",
    "right line, then wrong": "#### 18\n#### 17",
    "candidates after hashes": "#### " + " ".join(map(str, range(30))),
    "hashes and a remark": "#### 18 or 19",
    "hashes with a box of another": "#### 18\n\\boxed{17}",
    "answer tags": "<answer>18</answer>",
    "json": '{"answer": 18}',
}
CONTENTS = {
    "other": "17",
    "negative": "-18",
    "twice negative": "--18",
    "prefix": "1",
    "longer": "180",
    "substring": "218",
    "near": "18.0000001",
    "near below": "17.9999999",
    "rounded up": "18.4",
    "sum": "9+9",
    "difference": "20-2",
    "product": "2*9",
    "product in LaTeX": "2 \\cdot 9",
    "plus nothing": "18+0",
    "spaced digits": "1 8",
    "digits by comma": "1,8",
    "braced digits": "{1}{8}",
    "digits by thin space": "1\\,8",
    "side by side": "9 9",
    "mixed with an improper fraction": "17\\frac{2}{2}",
    "fraction over nothing": "\\frac{18}{0}",
    "slash over nothing": "18/0",
    "list": "17, 18",
    "list, right first": "18, 19",
    "semicolon": "18; 19",
    "set": "\\{17, 18\\}",
    "pair": "(17, 18)",
    "interval": "[17, 18]",
    "or": "17 or 18",
    "or in text": "17 \\text{ or } 18",
    "logical or": "18 \\lor 19",
    "plus or minus": "18 \\pm 1",
    "chain": "17 = 18",
    "long chain": "17 = 17 = 18",
    "about": "18 \\approx 17",
    "about alone": "\\approx 18",
    "unequal": "\\neq 18",
    "at least": "\\ge 18",
    "bounds": "17 < x < 19",
    "two assignments": "a = 17, b = 18",
    "largest of some": "\\max(17, 18)",
    "greatest divisor": "\\gcd(18, 36)",
    "sum over one": "\\sum_{n=18}^{18} n",
    "integral": "\\int_0^{18} 1 dx",
    "base eight": "18_8",
    "factorial": "18!",
    "remainder": "18 \\mod 7",
    "times a letter": "18x",
    "times a spaced letter": "18 x",
    "imaginary": "18i",
    "scaled": "18 thousand",
    "dozen": "18 dozen",
    "million in text": "18\\text{ million}",
    "denied": "\\text{not } 18",
    "word": "\\text{eighteen}",
    "dots": "18\\ldots",
    "trailing dots": "18...",
    "question mark": "18?",
    "exponent": "1e999",
    "huge exponent": "18e99999999",
    "power of ten": "1.8 \\times 10^{999999}",
    "infinity": "\\infty",
    "nan": "nan",
    "true": "True",
    "hex": "0x12",
    "underscore": "1_8",
    "full-width digits": "１８",
    "arabic digits": "١٨",
    "superscript digits": "¹⁸",
    "roman": "XVIII",
    "letter": "x",
    "the column's name": "\\text{answer}",
    "import": "__import__('os').system('true')",
    "eval": "eval('18')",
    "print": "print(18)",
    "condition": "18 if True else 0",
    "lambda": "(lambda: 18)()",
    "macro": "\\def\\x{18}\\x",
    "surrogate": "18\ud800",
    "zero byte": "18\0",
    "long": "18" + " " * 50 + "x" * 300,
    "deep": "(" * 60 + "18" + ")" * 60,
    "many digits": "1" * 200,
}
OTHERS = [  # reference, answer
    ("\\sqrt{2}", "2"),
    ("\\sqrt{2}", "1.41"),
    ("\\sqrt{2}", "17 = \\sqrt{2}"),
    ("\\frac{1}{3}", "0.33"),
    ("\\frac{1}{3}", "0.3333"),
    ("0.5", "0.5\\%"),
    ("50\\%", "5000"),
    ("5 \\text{ km}", "5 \\text{ m}"),
    ("\\$5", "5 \\text{ cents}"),
    ("x = 5", "y = 5"),
    ("A", "B"),
    ("A", "a"),
    ("A", "A, B"),
    ("A", "\\text{A or B}"),
    ("\\text{Monday}", "\\text{Tuesday}"),
    ("blue", "bule"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2)"),
    ("x^2+1", "x^2"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("3:2", "2:3"),
]


@pytest.mark.parametrize("text", UNANCHORED.values(), ids=UNANCHORED.keys())
def test_text_without_one_anchored_answer_scores_nothing(reward, text):
    for gold in ("18", "So she has 18.\n#### 18", 18, 18.0):
        assert reward.score(text, answer=gold) == 0.0


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_hack_scores_nothing(reward, content):
    assert len(UNANCHORED) + len(CONTENTS) >= 60
    assert reward.score(BOX % content, answer="18") == 0.0
    assert reward.score(f"#### {content}", answer="18") == 0.0


@pytest.mark.parametrize("gold, content", OTHERS)
def test_wrong_is_wrong(reward, gold, content):
    assert reward.score(BOX % content, answer=gold) == 0.0
    assert reward.score(BOX % gold, answer=gold) == 1.0


def test_ninety_nine_guesses_are_not_better_than_one(reward):
    for n in range(100):
        said = f"{BOX % n} " * 2 + f"#### {n}"
        assert reward.score(said, answer="18") == float(n == 18)


# Right answers


def forms(n: int) -> list[str]:
    """Ways to write a whole number."""
    found = [f"{n}", f"{n}.", f"${n}$", f" {n} ", f"{n}.0", f"{n}.00", f"\\text{{{n}}}", f"({n})"]
    found += [f"x = {n}", f"{n} \\text{{ eggs}}", f"{n}\\,\\text{{cm}}", f"{n} dollars", f"+{n}"]
    found += [f"\\${n}", f"${n}", f"\\frac{{{2 * n}}}{{2}}", f"{3 * n}/3", f"\\textbf{{{n}}}"]
    found += [f"{n}\\%", f"{n}^\\circ", f"{{{n}}}", f"\\left({n}\\right)", f"\\displaystyle {n}"]
    if n >= 1000:
        found += [f"{n:,}", f"{n:,}.00", f"{n:,}".replace(",", "{,}"), f"${n:,}$"]
        found += [f"{n:,}".replace(",", "\\,"), f"\\${n:,}", f"{n:,} miles per hour"]
    return found


SENTENCES = (
    "\\boxed{%s}",
    "So the answer is $\\boxed{%s}$.",
    "First \\boxed{1234567} looks right. It is not:\n\\[\n\\boxed{%s}\n\\]",
    "16 - 3 = 13\n#### %s",
    "####%s\n",
    "Thus \\fbox{ %s }",
)
RIGHT = [  # reference, answer
    ("\\frac{3}{4}", "0.75"),
    ("\\frac{3}{4}", "3/4"),
    ("\\frac{3}{4}", "\\dfrac{3}{4}"),
    ("\\frac{3}{4}", "\\tfrac34"),
    ("\\frac{3}{4}", "\\frac34"),
    ("\\frac{3}{4}", "\\frac{6}{8}"),
    ("\\frac{3}{4}", ".75"),
    ("\\frac{3}{4}", "75\\%"),
    ("0.75", "\\frac{3}{4}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("-\\frac{1}{2}", "-0.5"),
    ("-\\frac{1}{2}", "−1/2"),
    ("\\frac{7}{2}", "3\\frac{1}{2}"),
    ("\\frac{7}{2}", "3 1/2"),
    ("3\\frac12", "3.5"),
    ("\\frac13", "0.333333"),
    ("\\frac13", "0.33333333"),
    ("0.333333", "\\frac{1}{3}"),
    ("50\\%", "50"),
    ("50\\%", "0.5"),
    ("50\\%", "\\frac{1}{2}"),
    ("12.5", "12.5\\%"),
    ("-7", "-7"),
    ("-7", "−7"),
    ("-7", "-7 \\text{ degrees}"),
    ("5", "x = 5"),
    ("x = 5", "5"),
    ("5 \\text{ km}", "5"),
    ("5 \\text{ km}", "5\\text{ km}"),
    ("5 \\text{ cm}^2", "5 \\text{ cm}^2"),
    ("\\$5", "5 dollars"),
    ("90^\\circ", "90"),
    ("90", "90°"),
    ("45^{\\circ}", "45^\\circ"),
    ("45^{\\circ}", "45 \\text{ degrees}"),
    ("45 \\text{ deg}", "45°"),
    ("45^{\\circ}", "45^\\circ \\text{C}"),
    ("45", "45^\\circ F"),
    ("5 \\text{ hours}", "5\\text{ hrs}"),
    ("5 \\text{ hr}", "5\\text{ h}"),
    ("5 \\text{ minutes}", "5\\text{ min}"),
    ("10 \\text{ inches}", "10\\text{ in}"),
    ("3 \\text{ feet}", "3\\text{ ft}"),
    ("1 \\text{ foot}", "1\\text{ feet}"),
    ("5 \\text{ kg}", "5\\text{ kilograms}"),
    ("5 \\text{ cm}^2", "5 \\text{ centimetres}^2"),
    ("60 \\text{ mph}", "60 \\text{ miles per hour}"),
    ("2 \\text{ boxes}", "2\\text{ box}"),
    ("3 \\text{ classes}", "3\\text{ class}"),
    ("4 \\text{ houses}", "4\\text{ house}"),
    ("2000", "2 \\times 10^3"),
    ("2000", "2 × 10^{3}"),
    ("1024", "2^{10}"),
    ("120", "5!"),
    ("10", "\\binom{5}{2}"),
    ("4", "\\sqrt{16}"),
    ("96", "3 \\cdot 2^{5}"),
    ("A", "\\text{A}"),
    ("A", "(A)"),
    ("A", "\\textbf{(A)}"),
    ("\\text{(C)}", "C"),
    ("\\text{Monday}", "Monday"),
    ("Monday", "\\text{monday}"),
    ("\\text{no solution}", "\\text{No solution}"),
    ("\\sqrt{2}", "\\sqrt2"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("\\frac{\\sqrt{3}}{2}", "\\frac12\\sqrt3"),
    ("\\frac{\\pi}{4}", "\\pi/4"),
    ("\\frac{\\pi}{4}", "π/4"),
    ("1+\\sqrt{5}", "\\sqrt{5}+1"),
    ("x^2+1", "1 + x^2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x+1", "y = x + 1"),
    ("(1,2)", "(1, 2)"),
    ("(1,2)", "\\left(1,2\\right)"),
    ("[1,2)", "[1, 2)"),
    ("(-\\infty, 3]", "(-\\infty,3]"),
    ("1,2", "2, 1"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("x \\le 3", "x \\leq 3"),
    ("3+4i", "3 + 4i"),
    ("3:2", "3:2"),
    ("\\log 2", "\\log(2)"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
]


def test_right_variants_score(reward):
    cases = [(str(n), form) for n in (0, 3, 18, 72, 1234, 80000, 1234567) for form in forms(n)]
    cases += RIGHT
    assert len(cases) >= 200
    rng = random.Random(0)
    wrong = []
    for gold, content in cases:
        sentence = SENTENCES[0] if "\n" in content else rng.choice(SENTENCES)
        if reward.score(sentence % content, answer=gold) != 1.0:
            wrong.append((gold, sentence % content))
    assert not wrong


def test_real_references(reward, shared):
    """GSM8K's, AIME's, AMC's and MultiArith's, in as many ways as there are, and none by chance."""

    def rows(name):
        return map(json.loads, (shared / "data" / name).read_text().splitlines())

    golds = [row["answer"] for row in rows("gsm8k_test.jsonl")]
    golds += [row["answer"] for row in list(rows("gsm8k_train.jsonl"))[::10]]
    golds += [row["target"] for row in rows("multiarith.jsonl")]
    golds += [row["answer"] for name in ("aime24.jsonl", "amc23.jsonl") for row in rows(name)]
    rng = random.Random(0)
    right = fooled = 0
    for gold in golds:
        said = final_answer(gold) if isinstance(gold, str) and "####" in gold else str(gold)
        number = float(said.replace(",", ""))
        form = rng.choice(forms(int(number))) if number.is_integer() else said
        right += reward.score(rng.choice(SENTENCES) % form, answer=gold) == 1.0
        wrong = rng.choice(forms(int(number) + rng.choice((-1, 1, 10))))
        fooled += reward.score(rng.choice(SENTENCES) % wrong, answer=gold) != 0.0
    assert len(golds) > 2500
    assert right == len(golds)
    assert fooled == 0


def test_worked_solutions_as_references(reward, shared):
    """The `solution` column of AIME ends in one of several boxes, one of them in bold brackets."""
    lines = (shared / "data" / "aime24.jsonl").read_text().splitlines()
    boxed = [row for row in map(json.loads, lines) if "\\boxed" in row["solution"]]
    found = [reward.score(f"\\boxed{{{row['answer']}}}", answer=row["solution"]) for row in boxed]
    assert len(found) >= 25
    assert found.count(1.0) >= len(found) - 1


# References that cannot be used


@pytest.mark.parametrize(
    "gold",
    [
        "",
        "  ",
        "\\boxed{}",
        "####",
        None,
        True,
        math.nan,
        math.inf,
        ["18"],
        {"a": 1},
        "\\frac{1}{",
        "She sells 18 eggs in all.",
        "the answer",
        "18\n19",
        "17 18",
        "9" * 300,
        "\\boxed{18",
    ],
)
def test_unusable_reference_is_not_scorable(reward, gold):
    for said in ("", "18", "\\boxed{18}", "\\boxed{\\sqrt{2}}"):
        assert reward.score(said, answer=gold) is None


def test_column_is_named(reward):
    other = MathAnswer(answer="solution")
    assert (reward.reads, other.reads) == (("answer",), ("solution",))
    assert other.score("\\boxed{18}", solution="#### 18", answer="17") == 1.0


def test_answer_is_what_votes_count(reward):
    assert reward.answer("so \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert reward.answer("#### **18**") == "18"
    assert reward.answer("18") is None
    assert reward.answer("\\boxed{1}, \\boxed{2}") == "1, 2"
    assert reward.answer("\\boxed{1} \\boxed{1}") == "1"
    assert reward.answer("\\boxed{a\\}b}") == "a\\}b"


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 30000,
        "\\boxed{1}" * 20000,
        "\\boxed{1" * 9000 + "}",
        "####" * 50000,
        "\\boxed{1}" + ", and or " * 30000 + "x\\boxed{2}",
        "{" * 100000 + "\\boxed{1}",
        "\\boxed{1}" + " " * 200000 + "\\boxed{2}",
        "\\boxed{" + "{}" * 50000 + "}",
    ],
)
def test_reading_takes_linear_time(reward, text):
    """Votes are counted in the main process, which nothing guards."""
    start = time.process_time()
    reward.answer(text)
    assert time.process_time() - start < 2
    reward.score(text, answer="18")
    assert time.process_time() - start < 4
