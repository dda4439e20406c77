"""An ablation's file: the commands that it stands for, and what is refused."""

from pathlib import Path

import pytest
import yaml

from gift_lightning.ablate import main
from gift_lightning.experiment_file import read_experiment
from test_ablate import EXPERIMENT

TINY = """
model:
  class_path: SFT
  init_args:
    model: gift_lightning.models.tiny_llama
    target: {class_path: GIFT, init_args: {beta: 3}}
    reference: FrozenCopy
data: CountdownData
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the configs of both stages, as the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text("trainer: {max_epochs: 19}\n")
    Path("rl.yaml").write_text("trainer: {max_steps: 200}\n")
    return tmp_path


def write(path="lab.yaml", **changes) -> str:
    Path(path).write_text(yaml.safe_dump({**EXPERIMENT, **changes}, sort_keys=False))
    return path


def test_arms_seeds_and_stages_become_commands(here):
    runs = read_experiment(write(seeds=[4])).runs()
    assert [str(x) for x in runs] == [
        "base seed 4 rl",
        "sft seed 4 sft",
        "sft seed 4 rl",
        "gift seed 4 sft",
        "gift seed 4 rl",
    ]
    assert runs[3].words("sft.yaml") == [
        "fit",
        "--config",
        "sft.yaml",
        "--data.seed=4",
        "--beta=3",
        "--seed_everything=4",
        "--trainer.default_root_dir=runs/lab/gift/seed-4/sft",
    ]
    assert "--pretrained=runs/lab/gift/seed-4/sft/hf" in runs[4].words()
    assert "--pretrained=start" in runs[0].words()


def test_values_reach_the_command_line_as_they_are_meant(here):
    values = {"a": None, "b": True, "c": 1e-4, "d": [1, "{seed}"], "e": {"x": "{sft}/hf"}}
    values |= {"f": "{prompt}", "g": float("inf"), "h": "-1"}
    path = write(seeds=[7], arms={"one": {"rl": values}})
    words = read_experiment(path).runs()[1].words()
    assert {"--a=null", "--b=true", "--c=0.0001", "--d=[1, 7]", "--f={prompt}"} <= set(words)
    assert {'--e={"x": "runs/lab/one/seed-7/sft/hf"}', "--g=.inf", "--h=-1"} <= set(words)


def test_every_arm_is_tried_with_every_value(here):
    vary = {"sft": {"model.lr": [1e-4, 1.5e-5, 2]}, "rl": {"flag": [True, "x"]}}
    experiment = read_experiment(write(seeds=[0], vary=vary))
    names = [f"{arm}-lr{lr}" for arm in ("sft", "gift") for lr in ("1e-4", "1.5e-5", "2")]
    expected = [f"{name}-flag{value}" for name in ("base", *names) for value in ("True", "x")]
    assert list(experiment.arms) == expected
    found = next(x for x in experiment.runs(["gift-lr1.5e-5-flagx"]) if x.name == "sft")
    assert {"--beta=3", "--model.lr=1.5e-05"} <= set(found.words())


def test_a_file_may_begin_from_another(here):
    write("base.yaml")
    Path("tuning.yaml").write_text("from: base.yaml\noutput: elsewhere\nseeds: [100]\n")
    found, base = (read_experiment(x) for x in ("tuning.yaml", "base.yaml"))
    assert (str(found.output), found.seeds) == ("elsewhere", [100])
    assert found.arms == base.arms and found.stages.keys() == base.stages.keys()


def test_a_stage_for_all_arms_is_run_once(here):
    teacher = {"config": "sft.yaml", "once": True, "overrides": {"steps": 1}}
    runs = read_experiment(
        write(
            stages={"teacher": teacher, **EXPERIMENT["stages"]},
            arms={"a": {"sft": {"teacher": "{teacher}/hf"}}, "b": {}},
        )
    ).runs()
    assert [str(x) for x in runs].count("teacher") == 1 and len(runs) == 1 + 2 * 3 * 2
    assert "--teacher=runs/lab/teacher/hf" in runs[1].words()
    assert not any("seed_everything=" in word for word in runs[0].words())


STAGES = EXPERIMENT["stages"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sedes": [0]}, ["'sedes' is no key", "seeds"]),
        ({"seeds": []}, ["seeds", "[0, 1, 2]"]),
        ({"seeds": [0, 0]}, ["seeds", "different"]),
        ({"seeds": [-1]}, ["seeds"]),
        ({"seeds": [True]}, ["seeds"]),
        ({"seeds": 3}, ["seeds"]),
        ({"output": None}, ["output"]),
        ({"stages": {}}, ["stages is empty"]),
        ({"arms": {}}, ["arms is empty"]),
        ({"arms": []}, ["arms must be a mapping"]),
        ({"arms": {1.5: {}}}, ["1.5", "quotes"]),
        ({"arms": {"../up": {}}}, ["'../up'", "no name"]),
        ({"arms": {"x": {"sftt": {}}}}, ["arm x", "'sftt' is no stage", "rl, sft"]),
        ({"arms": {"x": {"sft": "skipp"}}}, ["arm x: sft", "'skipp'"]),
        ({"arms": {"x": {"sft": "skip", "rl": "skip"}}}, ["arm x", "skips every stage"]),
        ({"arms": {"x": {"sft": "skip"}}}, ["stage rl of arm x", "which this arm skips"]),
        ({"arms": {"x": {"rl": {"pretrained": "{sftt}/hf"}}}}, ["arm x", "'{sftt}/hf'", "sft"]),
        ({"arms": {"x": {"sft": {"p": "{rl}/hf"}}}}, ["comes before", "none"]),
        ({"arms": {"x": {"sft": {"seed_everything": 1}}}}, ["seed_everything", "drop it"]),
        ({"arms": {"configs": {}}}, ["'configs'", "another name"]),
        ({"stages": {"sft": {}}}, ["stage sft needs a config"]),
        ({"stages": {"sft": {"config": "gone.yaml"}}}, ["gone.yaml", "No such file"]),
        ({"stages": {"sft": {"config": "sft.yaml", "x": 1}}}, ["'x' is no key", "overrides"]),
        ({"stages": {"sft": {"config": "sft.yaml", "once": 1}}}, ["once is true or false"]),
        ({"vary": {"sftt": {}}}, ["vary", "'sftt' is no stage"]),
        ({"vary": {"sft": {"lr": 1e-4}}}, ["vary: sft: lr", "a list of values"]),
        ({"vary": {"sft": {"lr": [1, 1]}}}, ["'sft-lr1'", "twice"]),
        ({"vary": {"sft": {"path": ["a/b"]}}}, ["'sft-patha/b'", "no name"]),
        ({"from": 3}, ["from must be another ablation's file"]),
        ({"from": "gone.yaml"}, ["gone.yaml", "No such file"]),
        (
            {
                "stages": {"t": {"config": "sft.yaml", "once": True, "overrides": {"s": "{seed}"}}}
                | STAGES
            },
            ["stage t", "{seed}"],
        ),
    ],
    ids=str,
)
def test_a_wrong_file_is_one_sentence(here, capsys, changes, parts):
    refused(capsys, write(**changes), *parts)


def refused(capsys, path: str, *parts: str, only: tuple[str, ...] = ()) -> None:
    with pytest.raises(SystemExit) as stopped:
        from gift_lightning.cli import main as gift

        gift(["ablate", path, *(word for arm in only for word in ("--only", arm))])
    assert stopped.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("gift: error: "), said
    for part in parts:
        assert part in said[0], said[0]
    assert not Path("runs").exists()


def test_an_arm_that_stands_twice_is_refused(here, capsys):
    Path(write()).write_text(Path("lab.yaml").read_text() + "  sft: {}\n")
    refused(capsys, "lab.yaml", "lab.yaml:", "'sft' stands here and in line")


def test_an_unknown_arm_is_refused(here, capsys):
    refused(capsys, write(), "--only nope", "base, sft, gift", only=("sft", "nope"))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ({"model.target.betta": 3}, ["model.target", "'betta' is no option of GIFT"]),
        ({"model.target": "Nope"}, ["model.target", "'Nope' names no class", "OneHot"]),
        ({"trainer.max_stepz": 3}, ["--trainer.max_stepz"]),
    ],
)
def test_an_arm_that_does_not_parse_is_refused_before_anything_is_trained(
    here, capsys, override, parts
):
    Path("tiny.yaml").write_text(TINY)
    path = write(
        stages={"sft": {"config": "tiny.yaml", "overrides": {"data.seed": "{seed}"}}},
        arms={"good": {"sft": {"model.target.beta": 5}}, "last": {"sft": override}},
    )
    refused(capsys, path, "lab.yaml: stage sft of arm last", *parts)


def test_help_and_wrong_words(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "--only ARM" in capsys.readouterr().out
    for words in ([], ["x.yaml", "--jobs", "0"], ["x.yaml", "--jobs", "two"], ["x.yaml", "--no"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith("gift: error: ")
