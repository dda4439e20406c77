"""Metrics over problems: golden and hand-computed values, errors, and exactness over processes."""

import json
import math
import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from gift_lightning.metrics import (
    AvgAtN,
    DistinctSolutions,
    MajAtN,
    PassAtK,
    ProblemMean,
    TruncationRate,
    majority,
    normalised,
)

CORRECT = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "passk.json").read_text())


def first(count, n):
    """One problem whose first `count` of n samples are right."""
    return torch.arange(n)[None] < count


def test_golden_pass_at_k(golden):
    for n, c, k, expected in golden["table"]:
        metric = PassAtK(k)
        metric.update(first(c, n))
        assert metric.compute().item() == pytest.approx(expected, abs=1e-14)
    for dataset in golden["datasets"]:
        for k, expected in dataset["pass_at"].items():
            metric = PassAtK(int(k))
            for c in dataset["correct_counts"]:
                metric.update(first(c, dataset["n"]))
            assert metric.compute().item() == pytest.approx(expected, abs=1e-14)


def test_golden_average(golden):
    for case in golden["avg"]:
        correct, k = torch.tensor(case["correct"]).bool(), case["k"]
        average, passed = AvgAtN(), PassAtK(k)
        average.update(correct[:, :k])
        passed.update(correct)
        assert average.compute().item() == pytest.approx(case["avg_at_k"], abs=1e-14)
        assert passed.compute().item() == pytest.approx(case["pass_at_k_unbiased"], abs=1e-14)


def test_golden_majority(golden):
    def measured(answers, gold):
        metric = MajAtN()
        metric.update([answers], torch.tensor([[x == gold for x in answers]]))
        return metric.compute().item()

    assert len(golden["maj"]) > 50 and len(golden["maj_none"]) > 3
    for case in golden["maj"]:
        answers = case["answers"][: case["k"]]
        assert majority(answers) == case["majority_first_seen"]
        assert measured(answers, case["gold"]) == case["maj_at_k_first_seen"]
    for case in golden["maj_none"]:
        assert majority(case["answers"]) == case["majority_excluding_none"]
        assert measured(case["answers"], case["gold"]) == case["maj_excluding_none"]


def test_by_hand():
    # pass@2 of 4: 1 - C(3,2)/C(4,2) = 1/2, certain, 0
    metric = PassAtK(2)
    metric.update(CORRECT)
    assert metric.compute().item() == pytest.approx(1.5 / 3, abs=1e-15)
    average = AvgAtN()
    average.update(CORRECT[:1])
    average.update(CORRECT[1:])
    assert average.compute().item() == pytest.approx((1 / 4 + 3 / 4) / 3, abs=1e-15)
    truncated = TruncationRate()
    truncated.update(CORRECT)
    assert truncated.compute().item() == average.compute().item()


def test_majority_is_over_normalised_answers():
    metric = MajAtN()
    answers = [["1 / 2", "7", "1/2", None], ["3", "4", None, "4 "], [None] * 4]
    metric.update(answers, torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]).bool())
    assert metric.compute().item() == pytest.approx(1 / 3)  # wrong, right, no answer


def test_distinct_solutions():
    metric = DistinctSolutions()
    texts = [["= 1+2", "=1 + 2", "=2+1", "=9"], ["=3", "=3", "=3", "=4"], ["=5"] * 4]
    metric.update(texts, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]).bool())
    assert metric.compute().item() == pytest.approx((2 + 2 + 0) / 3)
    assert normalised(" a\tb \n") == "ab"


def test_the_error_is_that_of_a_mean():
    """The bootstrap's limit is the population's standard deviation over the root of its size."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    metric = ProblemMean()
    metric.update(values)
    expected = (values.var(correction=0) / 40).sqrt().item()
    # 20,000 resamples know a standard deviation to 1/sqrt(40,000) = 0.5 %
    assert metric.standard_error(20_000).item() == pytest.approx(expected, rel=0.02)
    assert metric.standard_error().item() == pytest.approx(expected, rel=0.1)
    assert metric.standard_error(seed=1) == metric.standard_error(seed=1)
    assert metric.standard_error(seed=1) != metric.standard_error(seed=2)


def test_the_error_of_many_problems_is_drawn_in_parts(monkeypatch):
    from gift_lightning import metrics

    metric = ProblemMean()
    metric.update(torch.arange(50.0) / 50)
    monkeypatch.setattr(metrics, "_CHUNK", 50 * 7)  # 1000 is no multiple of 7
    expected = math.sqrt((50**2 - 1) / 12) / 50 / math.sqrt(50)
    assert metric.standard_error().item() == pytest.approx(expected, rel=0.1)


def test_few_problems():
    metric = PassAtK(1)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()
    assert metric.standard_error().isnan()
    metric.update(CORRECT[1:2])
    assert metric.compute().item() == 0.75 and metric.standard_error().isnan()
    metric.update(CORRECT[1:2])
    assert metric.standard_error().item() == 0  # two equal problems
    metric.reset()
    metric.update(CORRECT[:1])
    assert metric.compute().item() == 0.25


def test_bad_budgets():
    with pytest.raises(ValueError, match="at least 1"):
        PassAtK(0)
    with pytest.raises(ValueError, match="pass@5 needs 5 samples"):
        PassAtK(5).update(CORRECT)


def test_merging_and_order_change_nothing():
    problems = torch.rand(31, 8, generator=torch.Generator().manual_seed(2)) < 0.3
    whole = PassAtK(3)
    whole.update(problems)
    parts = [PassAtK(3) for _ in range(3)]
    for part, rows in zip(parts, (problems[20:], problems[:3], problems[3:20]), strict=True):
        part.update(rows)
    for part in parts[1:]:
        parts[0].merge_state(part)
    assert parts[0].compute() == whole.compute()
    assert parts[0].standard_error() == whole.standard_error()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_of_two(rank, port, problems, shares, folder):
    """One of two processes: what it computes from its share, and from that together."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for share in shares:
        metric = PassAtK(2)
        for row in problems[share[rank][0] : share[rank][1]]:
            metric.update(row[None])
        alone = len(metric.values)
        found.append([metric.compute().item(), metric.standard_error().item(), alone])
        assert len(metric.values) == alone, "a rank keeps its own problems only"
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_shares(tmp_path):
    problems = torch.rand(7, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    whole = PassAtK(2)
    whole.update(problems)
    # odd, with a rank that has none, and all on the second
    shares = [((0, 4), (4, 7)), ((0, 7), (7, 7)), ((0, 0), (0, 7)), ((0, 1), (1, 7))]
    arguments = (free_port(), problems, shares, str(tmp_path))
    torch.multiprocessing.start_processes(rank_of_two, arguments, 2, start_method="forkserver")
    for rank in range(2):
        for share, (value, error, alone) in zip(
            shares, torch.load(tmp_path / f"{rank}.pt"), strict=True
        ):
            assert value == whole.compute().item() and error == whole.standard_error().item()
            assert alone == share[rank][1] - share[rank][0]
