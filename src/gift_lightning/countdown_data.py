"""Countdown as training data: two corpora, a tokenizer and a data module, all made in memory."""

import random
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gift_lightning.countdown import (
    COUNT,
    FORMATS,
    LARGEST,
    OPERATORS,
    TARGETS,
    Kind,
    Problem,
    Split,
    parse,
    problems,
    random_tree,
    render,
    solutions,
    split_of,
)
from gift_lightning.data import SFTData
from gift_lightning.problems import CountdownProblems
from gift_lightning.problems import Problem as EvalProblem
from gift_lightning.records import Record, Rejected
from gift_lightning.seeds import keyed_seed

CHARACTERS = " 0123456789+-*/()=<>:.,?answer"
_KINDS: tuple[Kind, ...] = ("in", "out", "any")


def demonstrations(
    n: int = 512, seed: int = 0, kind: Kind = "in", split: Split = "demonstration"
) -> list[tuple[str, str]]:
    """(prompt, completion) pairs in the first format: one right answer each.

    What + and - can solve is answered by them, without parentheses if possible: ``= 9-1-1+7``.
    """
    rng = random.Random(keyed_seed(seed, "countdown demonstrations", split, kind))
    pairs = []
    for problem in problems(split, n, seed, kind):
        found = solutions(problem.numbers, problem.target, "+-")
        found = found or solutions(problem.numbers, problem.target, OPERATORS)
        plain = [solution for solution in found if "(" not in solution]
        pairs.append((problem.prompt, FORMATS[0].format(rng.choice(plain or found))))
    return pairs


def pretraining(n: int, seed: int = 0, wrong: float = 0.3) -> list[tuple[str, str]]:
    """(prompt, completion) pairs over the train split, varied and partly wrong.

    Any operators, four formats, with and without spaces and needless parentheses. In a share
    `wrong` of them the prompt asks for a random target, whatever value the expression has.
    """
    rng = random.Random(keyed_seed(seed, "countdown pretraining"))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        numbers = [rng.randint(1, LARGEST) for _ in range(COUNT)]
        tree = random_tree(rng, numbers)
        text = render(tree, every=rng.random() < 0.2)
        parsed = parse(text)
        assert parsed is not None
        if parsed[0] not in TARGETS:
            continue
        target = rng.choice(TARGETS) if rng.random() < wrong else parsed[0]
        if split_of(numbers, target) != "train":
            continue
        if rng.random() < 0.2:
            text = re.sub(r"([-+*])", r" \1 ", text)
        form = rng.choice(FORMATS)
        shown = Problem(tuple(rng.sample(numbers, COUNT)), target)
        pairs.append((shown.prompt, form.format(text, target=target)))
    return pairs


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `CHARACTERS`, besides pad, end and unknown; none is added to a text."""
    special = ["<pad>", "<eos>", "<unk>"]
    symbols = special + sorted(set(CHARACTERS))
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


class CountdownData(SFTData):
    """Countdown as training data; made in memory, the same for the same arguments.

    Validation: the sets ``in`` (solvable with + and -) and ``out`` (solvable only with a ``*``),
    with right answers in the demonstrations' format, and the same problems for sampling. No seed
    changes them, so that runs compare.

    Args:
        corpus: what to train on: `demonstrations`, or the base model's `pretraining` corpus.
        num_demonstrations: rows of the first.
        num_pretraining: rows of the second.
        wrong: share of the pretraining rows whose expression misses its target.
        num_eval: problems in each validation set.
        batch_size: samples per micro-batch and device.
        packing: put short samples into one row.
        seed: of the corpus and the order of its samples.
    """

    def __init__(
        self,
        corpus: Literal["demonstrations", "pretraining"] = "demonstrations",
        num_demonstrations: int = 512,
        num_pretraining: int = 192_000,
        wrong: float = 0.3,
        num_eval: int = 256,
        batch_size: int = 64,
        packing: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(train=[], batch_size=batch_size, packing=packing, seed=seed)
        if not 0 <= wrong <= 1:
            raise ValueError(f"data.wrong is a share between 0 and 1, not {wrong}: change it.")
        self.corpus, self.num_eval = corpus, num_eval
        self.num_demonstrations = num_demonstrations
        self.num_pretraining, self.wrong = num_pretraining, wrong

    def train_records(self) -> Iterator[Record]:
        if self.corpus == "demonstrations":
            return _records(self.corpus, demonstrations(self.num_demonstrations, self.seed))
        return _records(self.corpus, pretraining(self.num_pretraining, self.seed, self.wrong))

    def val_records(self) -> dict[str, Iterable[Record | Rejected]]:
        return {
            kind: _records(kind, demonstrations(self.num_eval, 0, kind, "validation"))
            for kind in _KINDS
        }

    def eval_problems(self) -> dict[str, list[EvalProblem]]:
        """The problems of `val_records`, for sampling."""
        return {
            kind: CountdownProblems("validation", kind, self.num_eval).load() for kind in _KINDS
        }


def _records(name: str, pairs: list[tuple[str, str]]) -> Iterator[Record]:
    for i, (prompt, completion) in enumerate(pairs):
        yield Record(f"countdown {name} {i}", completion, prompt)
