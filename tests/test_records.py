import json
import os
from pathlib import Path

import pytest

from gift_lightning.records import Record, Rejected, Source, read

DATA = Path(__file__).parents[2] / "shared" / "data"
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(path, **options):
    return list(read(Source(str(path), **options)))


def only(tmp_path, row, **options):
    """The record of one row."""
    (record,) = rows(write(tmp_path / "one.jsonl", [row]), **options)
    return record


# --- formats --------------------------------------------------------------------------------


def test_messages(tmp_path):
    tools = [{"type": "function", "function": {"name": "calc"}}]
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES, "tools": tools}])
    assert rows(path) == [
        Record(f"{path}:1", completion=MESSAGES, tools=tools, source=path, weight=1.0)
    ]
    record = only(tmp_path, {"messages": MESSAGES, "tools": json.dumps(tools)})
    assert record.tools == tools
    record = only(tmp_path, {"chat": MESSAGES}, format="messages", prompt="chat")
    assert record.completion == MESSAGES


def test_sharegpt(tmp_path):
    conversations = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "4"},
    ]
    record = only(tmp_path, {"id": "1", "conversations": conversations})
    assert record.completion == [{"role": "system", "content": "Be brief."}, *MESSAGES]


def test_parts_of_text_and_empty_keys_of_messages(tmp_path):
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": part} for part in ("2", "+2?")],
        },
        {"role": "assistant", "content": "4", "tool_calls": None},
    ]
    assert only(tmp_path, {"messages": messages}).completion == MESSAGES
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "calc"}}]}
    record = only(tmp_path, {"messages": [MESSAGES[0], call]})
    assert record.completion[1] == {"role": "assistant", "tool_calls": call["tool_calls"]}


def test_prompt_and_completion(tmp_path):
    record = only(tmp_path, {"prompt": "2+2?", "completion": "4"})
    assert (record.prompt, record.completion) == ("2+2?", "4")
    record = only(tmp_path, {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]})
    assert (record.prompt, record.completion) == (MESSAGES[:1], MESSAGES[1:])


def test_text(tmp_path):
    record = only(tmp_path, {"text": "Once upon a time", "meta": 1})
    assert (record.prompt, record.completion) == (None, "Once upon a time")


def test_alpaca(tmp_path):
    record = only(tmp_path, {"instruction": "Add {input}.", "input": "2, 2", "output": "4"})
    assert record.prompt.startswith("Below is an instruction that describes a task, paired")
    assert record.prompt.endswith("Add {input}.\n\n### Input:\n2, 2\n\n### Response:\n")
    assert (record.turn, record.completion) == ("Add {input}.\n\n2, 2", "4")
    record = only(tmp_path, {"instruction": "Say hi.", "input": "", "output": "hi"})
    assert record.prompt.endswith("### Instruction:\nSay hi.\n\n### Response:\n")
    assert record.turn == "Say hi."


def test_columns(tmp_path):
    record = only(tmp_path, {"question": "2+2?", "answer": "4"})
    assert (record.prompt, record.completion) == ("2+2?", "4")
    record = only(tmp_path, {"problem": "2+2?", "solution": "so 4", "answer": "4"})
    assert (record.prompt, record.completion) == ("2+2?", "so 4")
    record = only(tmp_path, {"input": "2+2?", "target": 4}, prompt="input", completion="target")
    assert (record.prompt, record.completion) == ("2+2?", "4")
    assert only(tmp_path, {"question": "q", "answer": 10**400}).completion == str(10**400)
    both = {"problem": "p", "solution": "s", "question": "q", "answer": "a"}
    with pytest.raises(ValueError, match="which columns hold prompt and completion"):
        only(tmp_path, both, format="columns")
    record = only(tmp_path, both, prompt="problem", completion="answer")
    assert (record.prompt, record.completion) == ("p", "a")


def test_verl_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def row(**extra):
        return {
            "data_source": "openai/gsm8k",
            "prompt": MESSAGES[:1],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "train", "index": 0, **extra},
        }

    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(answer="2+2=4")] * 3), path)
    found = rows(path)
    assert [record.origin for record in found] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert (found[0].prompt, found[0].completion) == (MESSAGES[:1], "2+2=4")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row()]), path)
    assert rows(path)[0].kind == "no completion"
    record = only(tmp_path, {**row(), "sft": "four"}, completion="sft")
    assert record.completion == "four"


def test_tokenized(tmp_path):
    record = only(tmp_path, {"input_ids": [1, 2, 3]})
    assert (record.input_ids, record.labels) == ([1, 2, 3], [1, 2, 3])
    record = only(tmp_path, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]})
    assert record.labels == [-100, 2, 3]
    record = only(tmp_path, {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]})
    assert record.labels == [-100, -100, 3]
    padded = {"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1], "labels": [-100, -100, 2]}
    record = only(tmp_path, padded)
    assert (record.input_ids, record.labels) == ([1, 2], [-100, 2])
    shifted = only(tmp_path, {"input_ids": [1, 2, 3], "labels": [2, 3, -100]})
    assert shifted.kind == "a label is neither -100 nor its own input id"
    assert only(tmp_path, {"input_ids": [1, 2], "labels": [1]}).kind == "lengths differ"
    assert only(tmp_path, {"input_ids": []}).kind == "field 'input_ids' is not a list of integers"


# --- files ----------------------------------------------------------------------------------


def test_json_list_and_json_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n  {"text": "a"},\n  {"text":\n "b"}, 7\n]', encoding="utf-8")
    first, second, third = rows(path)
    assert (first.origin, second.origin) == (f"{path}:2", f"{path}:3")
    assert third == Rejected("not a JSON object: int", f"{path}:4")
    path.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert [record.completion for record in rows(path)] == ["a", "b"]
    path.write_text('[{"text": "a"},\n{"text": }]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json:2: the JSON list cannot be read from here"):
        rows(path)


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfquestion,answer\r\n"1+1?\r\nsay",2\r\n2+2?,4,5\r\n3+3?,\xff6\r\n'
        b'4+4?,8\r\n\r\nx"y,"a"b\r\n5+5?,10\r\n6+6?,"1\r\n2\r\n'
    )
    found = {record.origin.removeprefix(f"{path}:"): record for record in rows(path)}
    assert found["2"].prompt == "1+1?\r\nsay" and found["2"].completion == "2"
    assert found["4"].kind == "wrong number of cells"
    assert found["5"].completion == "\udcff6"  # rejected when it is rendered
    assert found["6"].completion == "8"
    assert found["8"].kind == "invalid CSV"
    assert found["9"].completion == "10"
    assert found["10"].kind == "invalid CSV" and "up to line 1" in found["10"].reason
    assert len(found) == 7


def test_saved_folder_and_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"question": "2+2?", "answer": "4"}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "many")
    (record,) = rows(tmp_path / "one")
    assert (record.origin, record.completion) == (f"{tmp_path / 'one'}:1", "4")
    assert len(rows(tmp_path / "many", split="test")) == 1
    with pytest.raises(ValueError, match="many has no split 'train'; it has test"):
        rows(tmp_path / "many")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none is not a folder written by datasets"):
        rows(tmp_path / "none")

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if name == "no/such":
            raise ConnectionError("offline")
        return data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows("openai/gsm8k:main", split="test")[0].origin == "openai/gsm8k:main:1"
    assert calls == [("openai/gsm8k", "main", "test")]
    with pytest.raises(ValueError, match=r"no/such is no local file and cannot be loaded .* offl"):
        rows("no/such")


def test_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(9)])
    assert [record.completion for record in rows(path, limit=2)] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "count"),
    [
        ("gsm8k_train", None, None, 7473),
        ("gsm8k_test", None, None, 1319),
        ("multiarith", "input", "target", 600),
        ("amc23", None, None, 40),
        ("aime24", "problem", "solution", 30),
    ],
)
def test_real_files(name, prompt, completion, count):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    found = rows(path, prompt=prompt, completion=completion)
    assert len(found) == count
    assert all(isinstance(record, Record) and record.completion for record in found)


# --- what is wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"question": "a", "answer": ', "invalid JSON"),
        (b"not json", "invalid JSON"),
        (b'{"question": "a", "answer": "\x00"}', "invalid JSON"),
        (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "invalid JSON"),
        (b'{"question": "\xff", "answer": "b"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"question": "a", "answer": "b"}', "invalid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["a", "b"]', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "no field 'question'"),
        (b'{"question": "a"}', "no field 'answer'"),
        (b'{"question": "a", "answer": null}', "field 'answer' is null"),
        (b'{"question": "a", "answer": {}}', "field 'answer' is not text"),
        (b'{"question": "a", "answer": true}', "field 'answer' is not text"),
        (b'{"question": "a", "answer": NaN}', "field 'answer' is not text"),
        (b'{"question": [], "answer": "b"}', "field 'question' is not a list of messages"),
    ],
)
def test_a_bad_line_costs_only_itself(tmp_path, line, kind):
    good = b'{"question": "a", "answer": "b"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + line + b"\r\n\r\n" + good)
    first, bad, last = rows(path)
    assert (first.completion, last.completion) == ("b", "b")
    assert (bad.kind, bad.origin, last.origin) == (kind, f"{path}:2", f"{path}:4")


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ("hi", "field 'messages' is not a list of messages"),
        ([], "field 'messages' is not a list of messages"),
        (["hi"], "a message is not an object"),
        ([{"content": "hi"}], "a message has no role"),
        ([{"role": 7, "content": "hi"}], "a message has no role"),
        ([{"role": "user"}], "the content of a message is not text"),
        ([{"role": "user", "content": 7}], "the content of a message is not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a message holds something other"),
        ([{"from": "alien", "value": "hi"}], "a message has an unknown 'from'"),
    ],
)
def test_bad_messages(tmp_path, messages, kind):
    bad = only(tmp_path, {"messages": messages})
    assert isinstance(bad, Rejected) and bad.kind.startswith(kind)


def test_bad_sources(tmp_path):
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    cases = [
        (Source(str(tmp_path / "no.jsonl")), r"no\.jsonl does not exist; check"),
        (Source("no_such_thing"), "no_such_thing does not exist"),
        (Source(write(tmp_path / "a.txt", [])), r"a\.txt: unknown file type; use one of \.json"),
        (Source(write(tmp_path / "e.jsonl", [])), r"e\.jsonl is empty; give"),
        (Source(write(tmp_path / "e.parquet", [{}])), r"e\.parquet cannot be read as parquet"),
        (
            Source(text, prompt="q", completion="text"),
            "no column 'q' for format 'columns'; it has text",
        ),
        (Source(text, format="alpaca"), "no column 'instruction' for format 'alpaca'; it has text"),
        (Source(text, format="messages"), "no column 'messages'"),
        (Source(text, prompt="text"), "which columns hold prompt and completion"),
        (Source(write(tmp_path / "x.jsonl", [{"a": 1, "b": 2}])), r"columns \(a, b\) fit no known"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            list(read(source))
        assert "\n" not in str(error.value)
    if os.geteuid():
        Path(text).chmod(0)
        with pytest.raises(ValueError, match="cannot be read: Permission denied"):
            rows(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "a: weight must be above 0"),
        ({"weight": float("nan")}, "a: weight must be above 0"),
        ({"limit": 0}, "a: limit must be at least 1"),
        ({"path": ""}, "needs a path"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Source(**{"path": "a", **options})


def test_unknown_format():
    source = Source("a")
    source.format = "yaml"
    with pytest.raises(ValueError, match="a: unknown format 'yaml'; choose from auto, messages"):
        source.__post_init__()
