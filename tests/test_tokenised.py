"""Tokens kept on disk: the same samples and the same account of them, and never another's."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from gift_lightning import tokenised
from gift_lightning.data import SFTData
from gift_lightning.records import Record, Rejected
from gift_lightning.render import Rendering
from test_render import CHATML, byte_tokenizer

VOCABULARY = 260
ROWS = [
    {"prompt": "one", "completion": "1"},
    {"prompt": "two", "completion": " "},
    {"prompt": "long", "completion": "x" * 99},
    {"prompt": "cut", "completion": "y" * 30},
    {"prompt": 4},
    {"prompt": "five", "completion": "5"},
]
RECORDS = [Record(f"r:{i}", x["completion"], x["prompt"]) for i, x in enumerate(ROWS[:4])]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenised, "WORTH", 1)
    return tmp_path / "cache" / "tokenised"


@pytest.fixture
def counted(monkeypatch):
    """How often records were tokenised."""
    calls = []

    def counting(*args):
        calls.append(args)
        return encode_all(*args)

    encode_all = tokenised.encode_all
    monkeypatch.setattr(tokenised, "encode_all", counting)
    return calls


def data(folder):
    (folder / "rows.jsonl").write_text("\n".join([*map(json.dumps, ROWS), "{"]))
    sources = {"train": str(folder / "rows.jsonl"), "val": str(folder / "rows.jsonl")}
    made = SFTData(**sources, max_length=20, truncation="keep_start", max_rejected=0.9)
    made.prepare(byte_tokenizer(), VOCABULARY)
    return made


def tokens(records=RECORDS, rendering=Rendering(), tokenizer=None):  # noqa: B008 (frozen)
    return tokenised.tokenise(records, tokenizer or byte_tokenizer(), rendering, VOCABULARY)


def test_a_second_start_reads_the_same_samples_and_ledger(cache, tmp_path, counted):
    first = data(tmp_path)
    assert len(counted) == 1, "the validation set has the same records as the training set"
    again = data(tmp_path)
    assert len(counted) == 1
    assert first.ledger["train"].file is None and again.ledger["train"].file.parent == cache
    for name in ("train", "val"):
        old, new = (dataclasses.replace(x.ledger[name], file=None) for x in (first, again))
        assert old == new
        assert [x.kind for x in new.rejected] == [
            "blank completion",
            "no field 'completion'",
            "invalid JSON",
        ]
        assert new.rejected[1].origin == f"{tmp_path / 'rows.jsonl'}:5"
        assert list(new.notes.values()) == [2], "two samples are cut"
        assert old.used == len(first.sets[name]) == 4
        for i in range(4):
            assert [x.tolist() for x in first.sets[name][i]] == [
                x.tolist() for x in again.sets[name][i]
            ]
        assert (first.sets[name].num_targets == again.sets[name].num_targets).all()
    assert first.identity == again.identity
    again.report(Console(file=(out := io.StringIO()), width=300))
    assert f"Tokens of train: read from {cache}" in out.getvalue()


def test_where_records_are_from_does_not_matter_and_what_they_say_does(cache, counted):
    tokens()
    tokens([dataclasses.replace(x, origin="moved", source="b", weight=2.0) for x in RECORDS])
    assert len(counted) == 1
    other = dataclasses.replace(RECORDS[0], completion="2")
    changed = tokens([other, *RECORDS[1:]])
    assert len(counted) == 2
    assert byte_tokenizer().decode(changed.examples[0][0]) == "<s>one2</s>"
    assert tokens([Rejected("other"), *RECORDS[1:]]).rejected[0] == "other"
    assert tokens([*RECORDS[1:], RECORDS[0]]).file is None, "another order"


@pytest.mark.parametrize(
    "change",
    [
        {"rendering": Rendering(max_length=50)},
        {"rendering": Rendering(loss_on="all")},
        {"rendering": Rendering(prompt_format="Q: {prompt}")},
        {"tokenizer": byte_tokenizer(CHATML)},
        {"tokenizer": byte_tokenizer(add_bos=False)},
    ],
)
def test_another_rendering_or_tokenizer_is_another_file(cache, counted, change):
    tokens()
    assert tokens(**change).file is None
    assert len(counted) == 2
    assert tokens().file is not None and tokens(**change).file is not None


def test_padding_in_an_earlier_call_does_not_change_the_name(cache):
    tokens()
    tokenizer = byte_tokenizer()
    tokens(tokenizer=tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokens(tokenizer=tokenizer).file is not None


def test_a_template_with_a_date_is_rendered_anew_each_day(cache, monkeypatch):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    tokens(tokenizer=tokenizer)
    assert tokens(tokenizer=tokenizer).file is not None

    class Tomorrow:
        today = staticmethod(lambda: "tomorrow")

    monkeypatch.setattr(tokenised, "date", Tomorrow)
    assert tokens(tokenizer=tokenizer).file is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "notes"])
def test_a_damaged_file_is_made_again(cache, counted, damage):
    made = tokens()
    (file,) = cache.iterdir()
    content = file.read_bytes()
    harm = {
        "cut": content[:-3],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
        "notes": content.replace(b"blank", b"blink"),
    }
    assert harm[damage] != content
    file.write_bytes(harm[damage])
    again = tokens()
    assert again.file is None and len(counted) == 2
    assert again.examples.digest == made.examples.digest and again.rejected == made.rejected
    assert tokens().file == file


def test_a_run_does_without_a_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_CACHE", "")
    assert tokens().file is None and not cache.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GIFT_CACHE", str(tmp_path / "file"))  # no folder can be made in it
    assert len(tokens().examples) == 3
    monkeypatch.delenv("GIFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tokenised.folder() == tmp_path / "xdg" / "gift-lightning" / "tokenised"


def test_few_records_and_refused_ones_are_not_kept(cache, monkeypatch):
    with pytest.raises(ValueError, match="above max_length"):
        tokens(rendering=Rendering(20, "error"))
    monkeypatch.setattr(tokenised, "WORTH", 5)
    tokens()
    assert not cache.exists()
