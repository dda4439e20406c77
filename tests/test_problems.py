"""Where problems come from: what is read, what is refused, and by which line."""

import datetime
import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from gift_lightning import countdown, countdown_data
from gift_lightning.problems import (
    ConcatProblems,
    CountdownProblems,
    JSONLProblems,
    Problem,
    ReasoningGymProblems,
    check_columns,
    prompt_text,
    prompt_tokens,
)

ROWS = [
    {"prompt": "1 + 1?", "solution": "2", "level": 3},
    {"prompt": "2 + 2?", "solution": "4", "level": 1},
    {"prompt": "3 + 3?", "solution": "6", "level": 2},
]
TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1 + 1?"}]


def written(folder, *lines, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def test_rows_of_a_file(tmp_path):
    path = written(tmp_path, *ROWS)
    found = JSONLProblems(path, columns={"answer": "solution"}, limit=2).load()
    assert found == [
        Problem("1 + 1?", {"answer": "2", "level": 3}, f"{path}:1"),
        Problem("2 + 2?", {"answer": "4", "level": 1}, f"{path}:2"),
    ]
    assert JSONLProblems(path).load()[2].columns == {"solution": "6", "level": 2}


def test_every_kind_of_file_gives_the_same(tmp_path):
    expected = [Problem(x["prompt"], {"answer": x["solution"]}) for x in ROWS]
    bare = [{k: x[k] for k in ("prompt", "solution")} for x in ROWS]
    paths = [written(tmp_path, *bare), written(tmp_path, json.dumps(bare), name="rows.json")]
    lines = ["prompt,solution", *(f"{x['prompt']},{x['solution']}" for x in ROWS)]
    paths.append(written(tmp_path, *lines, name="rows.csv"))
    paths.append(str(tmp_path / "rows.parquet"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bare), paths[-1])
    for path in paths:
        found = JSONLProblems(path, columns={"answer": "solution"}).load()
        assert [Problem(p.prompt, p.columns) for p in found] == expected


def test_what_rewards_are_called_with_is_no_column(tmp_path):
    row = {"prompt": "not this", "question": "1?", "completion": "1", "prompts": 1, "answer": "1"}
    (problem,) = JSONLProblems(written(tmp_path, row), prompt="question").load()
    assert problem.prompt == "1?" and problem.columns == {"answer": "1"}


def test_a_mapped_column_wins(tmp_path):
    row = {"prompt": "1?", "answer": "reasoning ... 1", "final": "1"}
    (problem,) = JSONLProblems(written(tmp_path, row), columns={"answer": "final"}).load()
    assert problem.columns == {"answer": "1"}


def test_what_json_cannot_hold_is_left_out(tmp_path):
    path = str(tmp_path / "rows.parquet")
    rows = [{"prompt": "1?", "answer": "1", "made": datetime.datetime(2020, 1, 1)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert JSONLProblems(path).load()[0].columns == {"answer": "1"}


def test_prompt_format_and_messages(tmp_path):
    path = written(tmp_path, ROWS[0], {"prompt": TURNS, "solution": "2"})
    text, chat = JSONLProblems(path, prompt_format="Q: {prompt} A:").load()
    assert text.prompt == "Q: 1 + 1? A:" and chat.prompt == TURNS
    assert prompt_text(text.prompt) == text.prompt
    assert json.loads(prompt_text(chat.prompt)) == TURNS


@pytest.mark.parametrize(
    ("lines", "options", "parts"),
    [
        ([ROWS[0], "no json"], {}, [":2 cannot be read", "invalid JSON"]),
        ([ROWS[0], "[1]"], {}, [":2 cannot be read", "not a JSON object"]),
        ([ROWS[0]], {"prompt": "question"}, [":1 has no column 'question'", "'solution'"]),
        ([ROWS[0]], {"columns": {"answer": "gold"}}, [":1 has no column 'gold'"]),
        ([ROWS[0], {"prompt": " ", "solution": "2"}], {}, [":2", "'prompt' must hold a text"]),
        ([{"prompt": None}], {}, [":1", "not None"]),
        ([{"prompt": []}], {}, [":1", "not []"]),
        ([{"prompt": ["x"]}], {}, [":1", "role and content"]),
        ([{"prompt": [{"role": "user"}]}], {}, [":1", "role and content"]),
        ([], {}, ["holds no problems"]),
        ([ROWS[0]], {"columns": {"prompt": "solution"}}, ["cannot be named 'prompt'"]),
        ([ROWS[0]], {"prompt_format": "Q:"}, ["prompt_format 'Q:'"]),
        ([ROWS[0]], {"limit": 0}, ["limit must be at least 1"]),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, lines, options, parts):
    path = written(tmp_path, *lines)
    with pytest.raises(ValueError) as refused:
        JSONLProblems(path, **options).load()
    for part in [*parts, *([path] if "prompt_format" not in options else [])]:
        assert part in str(refused.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist"):
        JSONLProblems("gone.jsonl").load()


def test_countdown():
    found = CountdownProblems("validation", "out", 20, seed=3).load()
    assert len({p.prompt for p in found}) == 20
    for problem, made in zip(found, countdown.problems("validation", 20, 3, "out"), strict=True):
        assert problem.prompt == made.prompt and json.dumps(problem.columns)
        answer = countdown.solutions(**problem.columns)[0]
        assert countdown.verify(f"= {answer}", **problem.columns)
    assert found == CountdownProblems("validation", "out", 20, seed=3).load()
    with pytest.raises(ValueError, match="ask for fewer"):
        CountdownProblems(size=10**6).load()
    with pytest.raises(ValueError, match="size"):
        CountdownProblems(size=0)


class FakeGym:
    """reasoning_gym, as far as it is used."""

    def __init__(self, entries):
        self.entries, self.asked = entries, None

    def create_dataset(self, task, **options):
        if task == "gone":
            raise ValueError("Dataset 'gone' not registered")
        assert options.get("min_terms", 1) > 0, "min_terms must be positive"
        self.asked = (task, options)
        return self.entries


def entry(**changes):
    return {"question": "1 + 1?", "answer": "2", "metadata": {"grid": (1, 2)}} | changes


def test_reasoning_gym(monkeypatch):
    gym = FakeGym([entry(), entry(answer=None)])
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    options = {"config": {"max_terms": 2}, "prompt_format": "{prompt} ="}
    first, second = ReasoningGymProblems("chain_sum", 2, seed=5, **options).load()
    task, asked = gym.asked
    assert task == "chain_sum" and 0 <= asked.pop("seed") < 2**31
    assert asked == {"size": 2, "max_terms": 2}
    assert first.prompt == "1 + 1? =" and first.origin == "reasoning-gym chain_sum 0"
    assert first.columns == {"answer": "2", "entry": entry(metadata={"grid": [1, 2]})}
    assert second.columns["answer"] is None


def test_reasoning_gym_refusals(monkeypatch):
    with pytest.raises(ValueError, match="puzzle24"):
        ReasoningGymProblems("puzzle24")
    with pytest.raises(ValueError, match="size"):
        ReasoningGymProblems("chain_sum", 0)
    monkeypatch.setitem(sys.modules, "reasoning_gym", FakeGym([entry(metadata={"grid": {1}})]))
    with pytest.raises(ValueError, match="x 0: the task's entry cannot be kept as JSON"):
        ReasoningGymProblems("x", 1).load()
    with pytest.raises(ValueError, match=r"'gone'.*not registered"):
        ReasoningGymProblems("gone").load()
    with pytest.raises(ValueError, match="min_terms must be positive"):
        ReasoningGymProblems("chain_sum", config={"min_terms": -1}).load()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        ReasoningGymProblems("chain_sum").load()


def test_real_reasoning_gym():
    gym = pytest.importorskip("reasoning_gym")
    found = ReasoningGymProblems("chain_sum", 5, seed=1, config={"max_terms": 2}).load()
    assert found == ReasoningGymProblems("chain_sum", 5, seed=1, config={"max_terms": 2}).load()
    # reasoning-gym's own seeds 1 and 2 have four of five problems in common.
    others = ReasoningGymProblems("chain_sum", 5, seed=2, config={"max_terms": 2}).load()
    assert not {x.prompt for x in found} & {x.prompt for x in others}
    scorer = gym.create_dataset("chain_sum")
    for problem in found:
        columns = json.loads(json.dumps(problem.columns))
        assert problem.prompt == columns["entry"]["question"]
        assert scorer.score_answer(columns["answer"], columns["entry"]) == 1
    with pytest.raises(ValueError, match="not registered"):
        ReasoningGymProblems("no_such_task", 1).load()


def test_columns_that_rewards_read():
    problems = [Problem("1?", {"answer": "1"}, "a:1"), Problem("2?", {}, "a:2")]
    check_columns("MathAnswer", problems[:1], ("answer", "prompt"))
    with pytest.raises(ValueError, match=r"a:2 has no column 'answer', which the reward Math"):
        check_columns("MathAnswer", problems, {"answer"})


def test_tokens_of_a_prompt():
    tokenizer = countdown_data.tokenizer()
    plain = tokenizer("1 2 > 3 : ")["input_ids"]
    assert prompt_tokens(tokenizer, Problem("1 2 > 3 : ", {})) == plain
    with pytest.raises(ValueError, match=r"b:7.*chat template"):
        prompt_tokens(tokenizer, Problem("1", {}, "b:7"), chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
        "{% if add_generation_prompt %}answer{% endif %}"
    )
    expected = tokenizer("<1 2>answer")["input_ids"]
    assert prompt_tokens(tokenizer, Problem("1 2", {}), chat=True) == expected
    turns = Problem([{"role": "user", "content": "1 2"}], {})
    assert prompt_tokens(tokenizer, turns) == prompt_tokens(tokenizer, turns, chat=True) == expected
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="b:8: the chat template raised: no system role"):
        prompt_tokens(tokenizer, Problem(TURNS, {}, "b:8"))
    with pytest.raises(ValueError, match=r"b:9.*no token"):
        prompt_tokens(tokenizer, Problem("", {}, "b:9"))


def test_an_end_token_of_the_tokenizer_is_not_part_of_a_prompt():
    class Closing(SimpleNamespace):
        def __call__(self, text):
            return {"input_ids": [5, 6, self.eos_token_id]}

    assert prompt_tokens(Closing(eos_token_id=1), Problem("x", {})) == [5, 6]


def test_workers_can_import_problems_without_torch():
    code = "import sys, gift_lightning.problems; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_sets_are_one_in_their_order():
    parts = [CountdownProblems("train", "in", 3), CountdownProblems("train", "out", 2)]
    assert ConcatProblems(parts).load() == [*parts[0].load(), *parts[1].load()]
    with pytest.raises(ValueError, match="parts is empty"):
        ConcatProblems([])
