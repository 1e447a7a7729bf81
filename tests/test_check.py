"""What a later stage refuses, `check` refuses first, in the stage's own words."""

import json

import pytest

from grpo_engage.base.core import write_json
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.run.cli import main
from grpo_engage.run.demonstration import run_stage_function
from grpo_engage.run.graph import job_parameters
from grpo_engage.run.refusals import look_at_all, look_at_gate, look_at_labels
from grpo_engage.run.settings import load_preset, resolve_config


def rows(n, seed=5):
    return [row | {"meta": {}} for row in simulate_pairs(n, seed).drop(columns=["source"]).to_dict("records")]


def one_a_post(records):
    return list({row["conversation_id"]: row for row in records}.values())


def changed(records, **values):
    return [row | values for row in records]


def lines(records):
    return "".join(json.dumps(row) + "\n" for row in records)


def settings_for(path, *more):
    return resolve_config(load_preset("smoke"), [
        "data.source=file", f"data.data_path={path}", "arms=[baseline,grpo]", "watch_every=0", "train.warm_start=base",
        *more]) | {"preset": "smoke"}


def words_of(place, config, stage, arm=""):
    """What the stage itself says when it refuses, on the files that stages before it leave or stand-ins of them."""
    if stage != "data":
        pairs = run_stage_function(place, "data", **job_parameters(config, "data"))
        for name in ("heuristic_reward/scores.parquet", "reward_model/reward/x", "reward_model/judge/x",
                     "train/baseline/seed0/adapter/x", "train/grpo/seed0/adapter/x"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).touch()
        if stage in ("train", "evaluation"):
            write_json(place / "policy" / "policy.json", {"name": "nano", "sha256": None, "quantization": "none"})
        if stage == "train":
            look_at_labels(place, config, pairs)
            look_at_gate(place, config, pairs)
    with pytest.raises((ValueError, ImportError)) as refused:
        run_stage_function(place, stage, **job_parameters(config, stage, arm, 0 if arm else None))
    return str(refused.value).replace(f"{place}/", "")


CASES = {
    "a text": ("hello\n", "data", "", []),
    "too few conversations": (lines(rows(100)[:2]), "data", "", []),
    "likes all the same": (lines(changed(rows(60), reply_likes=2, reply_retweets=0)), "reward_model", "", []),
    "likes unknown": (lines(changed(rows(60), reply_likes=None, reply_retweets=None)), "reward_model", "", []),
    "one reply a post": (lines(one_a_post(rows(60))), "reward_model", "", []),
    "no such covariate": (lines(rows(60)), "reward_model", "", ["covariates=[meta.age]"]),
    "one reply a post, compared": (lines(one_a_post(rows(60))), "evaluation", "", []),
    "too few posts for a step": (lines(rows(60)), "train", "grpo", ["posts_per_step=64", "reward=heuristic"]),
    "too little for the gate": (lines(rows(60)), "train", "grpo", ["allow_unvalidated_reward=false"]),
    "no vLLM": (lines(rows(60)), "train", "grpo", ["generation_engine=vllm", "reward=heuristic"]),
    "no such logger": (lines(rows(60)), "train", "baseline", ["report_to=wandb"]),
}


@pytest.mark.parametrize("case", CASES)
def test_check_says_what_the_stage_would(case, tmp_path):
    text, stage, arm, more = CASES[case]
    path = tmp_path / "own 😀.jsonl"
    path.write_text(text, encoding="utf-8")
    config = settings_for(path, *more)
    words = words_of(tmp_path / "run", config, stage, arm)
    said, _ = look_at_all(tmp_path / "check", config)
    assert f"{stage}{' ' + arm if arm else ''}: {words}" in said, (words, said)


@pytest.mark.parametrize("name", ["hello.jsonl", "hello.csv", "hello.txt"])
def test_a_file_that_holds_hello_is_not_valid(name, tmp_path, capsys):
    (tmp_path / name).write_text("hello\n")
    assert main(["check", "--preset", "smoke", "--data", str(tmp_path / name), "--no-estimate"]) == 2
    assert "hello" in capsys.readouterr().err


def test_check_tells_what_is_left_and_exits_with_zero(tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text(lines(rows(120)) + "{broken\n", encoding="utf-8")
    words = ["check", "--preset", "smoke", "--data", str(tmp_path / "own.jsonl"), "--no-estimate",
             "-p", "policy=nano"]
    assert main(words) == 0
    shown = capsys.readouterr()
    for part in ("device: ", "policy: nano", "rejected 1", f"first: row {len(rows(120)) + 1}", "split judge: ",
                 "learns from", "clear pairs of", "grpo trains on", "test posts"):
        assert part in shown.out, part
    assert main([*words, "-p", "arms=[grpo]", "-p", "train.warm_start=base"]) == 2
    assert "'baseline' must be among them" in capsys.readouterr().err


def test_a_clean_file_is_counted_in_full(tmp_path):
    (tmp_path / "own.jsonl").write_text(lines(rows(120)), encoding="utf-8")
    said, counts = look_at_all(tmp_path / "check", settings_for(tmp_path / "own.jsonl"))
    assert said == [] and counts["rows"]["accepted"] == len(rows(120)) == sum(
        part["pairs"] for part in counts["rows"]["splits"].values())
