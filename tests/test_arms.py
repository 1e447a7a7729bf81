"""What the training stage makes of its settings: phases, warm starts, the pass indicator, and the strategy's list."""

import shutil

import numpy as np
import pandas as pd
import pytest
from test_grpo_trainer import KillAfter, Killed, brevity
from training import make_trainer, train_arm

from grpo_engage.base.core import file_sha256, write_json, write_parquet
from grpo_engage.base.settings import default_of, described
from grpo_engage.data.gold import gold_appeal
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.run.settings import load_preset, resolve_config, user_parameters
from grpo_engage.train import hybrid
from grpo_engage.train.loop import tidy_log
from grpo_engage.train.objective import ARMS, Objective
from grpo_engage.train.trainer import ReplyTrainer
from grpo_engage.train.watching import training_judge, watched_posts


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with data, labels and adapters as the stages before would leave them; nothing in it was trained."""
    folder = tmp_path_factory.mktemp("run")
    pairs = simulate_pairs(60, seed=4).reset_index(drop=True)
    names = {name: index for index, name in enumerate(pairs["conversation_id"].unique())}
    pairs = pairs.assign(row=pairs.index, split=["validation" if names[name] % 4 == 3 else "policy"
                                                 for name in pairs["conversation_id"]])
    write_parquet(folder / "data" / "pairs.parquet", pairs)
    write_parquet(folder / "reward_model" / "labels.parquet", pd.DataFrame({"row": pairs["row"], "reference": True}))
    write_json(folder / "policy" / "policy.json", {"name": "nano", "sha256": None, "quantization": "none"})
    for arm in ("baseline", "polychromic"):
        for seed in (0, 1):
            write_json(folder / "train" / arm / f"seed{seed}" / "adapter" / "adapter_config.json", [arm, seed])
    return folder


class Caught(Exception):
    pass


@pytest.fixture
def stage(run_dir, monkeypatch):
    """`train_stage` up to the moment when training would start: the arguments that `train_arm` gets."""
    def catch(base, examples, folder, settings, **others):
        raise Caught({"examples": examples, "folder": folder, "settings": settings, **others})

    monkeypatch.setattr(hybrid, "train_arm", catch)
    monkeypatch.setattr(hybrid, "heldout_nll", lambda *_: 1.0)

    def call(**settings):
        with pytest.raises(Caught) as caught:
            hybrid.train_stage(run_dir, reward="heuristic", report_to="none", **settings)
        return caught.value.args[0]

    return call


def conversations(arguments):
    return set(arguments["examples"]["conversation_id"])


def test_disjoint_phases_share_no_conversation_and_leave_none_out(stage):
    whole = {arm: conversations(stage(arm=arm)) for arm in ARMS}
    assert whole["baseline"] == whole["grpo"] == whole["polychromic"] == whole["hybrid"]
    halves = {arm: conversations(stage(arm=arm, phase_split="disjoint")) for arm in ARMS}
    assert halves["baseline"] == halves["polychromic"] and halves["grpo"] == halves["hybrid"]
    assert not halves["baseline"] & halves["grpo"] and halves["baseline"] | halves["grpo"] == whole["grpo"]
    assert min(map(len, halves.values())) > len(whole["grpo"]) / 4
    assert halves["grpo"] == conversations(stage(arm="grpo", phase_split="disjoint", seed=1))  # for every seed the same


def test_an_unknown_phase_split_is_refused(run_dir):
    with pytest.raises(ValueError, match="'phase_split' = 'both' is not one of same, disjoint"):
        hybrid.train_stage(run_dir, phase_split="both")


@pytest.mark.parametrize(("arm", "warm_start", "origin"), [
    ("baseline", "arm", None), ("polychromic", "arm", None), ("grpo", "arm", "baseline"), ("hybrid", "arm", "baseline"),
    ("grpo", "base", None), ("grpo", "baseline", "baseline"), ("grpo", "polychromic", "polychromic"),
    ("baseline", "polychromic", "polychromic")])
def test_warm_start_is_what_was_asked_for_and_of_the_same_seed(stage, run_dir, arm, warm_start, origin):
    for seed in (0, 1):
        expected = None if origin is None else run_dir / "train" / origin / f"seed{seed}" / "adapter"
        assert stage(arm=arm, warm_start=warm_start, seed=seed)["warm_start"] == expected


def test_an_arm_of_ones_own_name_has_a_folder_and_a_seed_of_its_own(stage, run_dir):
    plain, other = stage(arm="grpo"), stage(arm="grpo_2", like="grpo")
    assert other["folder"] == run_dir / "train" / "grpo_2" / "seed0" and other["objective"] == plain["objective"]
    assert other["seed"] != plain["seed"] and other["label"] == "grpo_2"  # two draws of one arm: an A/A comparison


def test_rejection_sampling_trains_on_the_best_of_its_own_replies(stage, run_dir, monkeypatch):
    """Each reference is the reply with the highest training reward among those that were drawn for its post."""
    drawn = []

    def generate(model, tokenizer, posts, n, temperature, **options):
        rows = pd.DataFrame([(post, sample, f"reply {(7 * post + 5 * sample) % 11} of {sample}")
                             for post in range(len(posts)) for sample in range(n)], columns=["post", "sample", "text"])
        drawn.append((posts, rows, options["seed"]))
        return rows.assign(finish_reason="stop")

    monkeypatch.setattr(hybrid, "load_adapted", lambda base, adapter, **_: drawn.append(adapter) or (None, None))
    monkeypatch.setattr(hybrid, "generate_replies", generate)
    monkeypatch.setattr(hybrid, "training_reward", lambda *_: (
        lambda posts, replies: np.array([float(reply.split()[1]) for reply in replies]), "by number", None))
    settings = dict(arm="rejection", like="baseline", warm_start="baseline", own_samples=4, batch_size=8, max_steps=2)
    taken = stage(**settings)["examples"]
    adapter, (posts, rows, seed) = drawn
    assert adapter == run_dir / "train" / "baseline" / "seed0" / "adapter"  # of the same seed
    best = {posts[post]: max(group["text"], key=lambda text: int(text.split()[1]))
            for post, group in rows.groupby("post")}
    assert dict(zip(taken["tweet"], taken["reply"], strict=True)) == best and len(best) > 3
    assert set(posts) <= set(stage(arm="grpo")["examples"]["tweet"])  # posts of the policy's split alone
    two = stage(**settings, own_kept=2)["examples"]
    assert (two.groupby("tweet").size() == 2).all()
    assert [found[2] for found in drawn[1::2]] == [seed, seed]  # again the same draw: a run that goes on is the same


def test_the_simulators_truth_trains_an_oracle_and_nothing_else(run_dir, monkeypatch):
    def catch(*_, reward, reward_id, **__):
        raise Caught(reward, reward_id)

    monkeypatch.setattr(hybrid, "train_arm", catch)
    monkeypatch.setattr(hybrid, "heldout_nll", lambda *_: 1.0)
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet").head(20)
    texts = pairs["tweet"].tolist(), pairs["reply"].tolist()
    with pytest.raises(Caught) as caught:
        hybrid.train_stage(run_dir, arm="oracle", reward="oracle", watch_every=0)
    assert (caught.value.args[0](*texts) == gold_appeal(*texts)).all() and caught.value.args[1] == "oracle"
    for arm in ("grpo", "hybrid", "baseline", "polychromic"):
        with pytest.raises(ValueError, match="a ceiling and no method"):
            hybrid.train_stage(run_dir, arm=arm, reward="oracle")
    with pytest.raises(ValueError, match="there is none for data of source 'file'"):
        resolve_config(load_preset("smoke"), ["arms=[baseline, oracle]", "source=file", "data_path=x.csv"])


def test_a_missing_warm_start_of_this_seed_is_not_replaced_by_another_seeds(run_dir):
    with pytest.raises(FileNotFoundError, match="train/baseline/seed2/adapter"):
        hybrid.train_stage(run_dir, arm="grpo", seed=2)


def test_the_same_posts_are_watched_in_every_arm_and_seed_and_none_is_trained_on(stage, run_dir):
    first = stage(arm="baseline")["watch"]
    for arguments in (stage(arm="grpo", seed=1), stage(arm="hybrid", watch_posts=8)):
        assert arguments["watch"].posts == first.posts and len(first.posts) == 8
    assert not set(first.posts) & set(stage(arm="grpo")["examples"]["tweet"])
    assert stage(arm="baseline", watch_every=0)["watch"] is None
    assert len(stage(arm="baseline", watch_posts=10**5)["watch"].posts) == 15  # all that there are
    assert first.seed != stage(arm="baseline", seed=1)["watch"].seed


def test_an_arm_that_is_not_watched_keeps_no_other_runs_looks(stage, run_dir):
    left = run_dir / "train" / "grpo" / "seed0" / "watch.csv"
    write_json(left, "an earlier run's")
    stage(arm="grpo")
    assert left.exists()  # its own looks, if it goes on after a kill
    stage(arm="grpo", watch_every=0)
    assert not left.exists()


def test_the_judge_of_real_posts_gives_the_probability_of_beating_their_real_replies(tmp_path, monkeypatch):
    class Model:
        def logits(self, posts, replies):
            return np.array([float(len(reply)) for reply in replies])

    monkeypatch.setattr("grpo_engage.train.watching.EngagementRewardModel.load", lambda folder: Model())
    pairs = pd.DataFrame({"tweet": ["a", "a", "b"], "reply": ["1", "333", "22"], "split": "validation",
                          "source": "twitter"})
    judge = training_judge(tmp_path, pairs, watched_posts(pairs, 2))
    sigmoid = [1 / (1 + np.exp(-(3 - other))) for other in (1, 3, 2)]
    assert judge(["a", "b"], ["xyz", "uvw"]) == pytest.approx([np.mean(sigmoid[:2]), sigmoid[2]])


def test_a_pass_indicator_is_what_training_sees(base, pairs, tmp_path):
    """1 where the score reaches the mark, else 0; so the logged mean is the share that passes."""
    scored = []

    def noted(posts, replies):  # some pass and some do not, whichever `nano` this machine has
        scored.extend(sum(map(ord, reply)) % 10 / 10 for reply in replies)
        return scored[-len(replies):]

    trainer = make_trainer(base, pairs, tmp_path, objective=Objective(0.0, 1.0, 0.0), reward=noted, max_steps=1,
                           learning_rate=1e-3, posts_per_step=4, num_generations=4, max_new_tokens=12,
                           reward_pass_threshold=0.35, cut_replies="keep")
    trainer.train()
    passes = np.array(scored) >= 0.35
    assert 0 < passes.mean() < 1
    assert list(trainer._logs["rewards"]["reward"]) == passes.astype(float).tolist()
    assert tidy_log(trainer.state.log_history)["reward"][0] == pytest.approx(passes.mean())


def test_policy_every_keeps_its_phase_after_a_kill(base, pairs, tmp_path):
    """Killed in a step between: the resumed run samples groups in the same steps, and ends with the same bytes."""
    options = dict(objective=Objective(0.5, 0.5, 0.0), reward=brevity, reward_id="brevity", max_steps=5, save_steps=1,
                   learning_rate=1e-3, posts_per_step=2, num_generations=2, max_new_tokens=8, policy_every=3,
                   cut_replies="keep")
    whole = train_arm(base, pairs, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        train_arm(base, pairs, tmp_path / "cut", **options, callbacks=[KillAfter(3)])
    log = train_arm(base, pairs, tmp_path / "cut", **options)
    assert log["reward"].notna().tolist() == whole["reward"].notna().tolist() == [True, False, False, True, False]
    assert file_sha256(tmp_path / "cut") == file_sha256(tmp_path / "whole")


def test_k_goes_down_by_the_step_and_keeps_its_place_after_a_kill(base, pairs, tmp_path, monkeypatch):
    """Killed between two values of k: the resumed run takes up the one that it would have had, and ends alike."""
    seen, plain = [], ReplyTrainer._max_k
    monkeypatch.setattr(ReplyTrainer, "_max_k", lambda self: seen.append(plain(self)) or seen[-1])
    options = dict(objective=Objective(0.0, 1.0, 0.0), reward=brevity, reward_id="brevity", max_steps=4, save_steps=1,
                   learning_rate=1e-3, posts_per_step=2, num_generations=4, max_new_tokens=8, advantage="max_at_k",
                   max_k_end=1, max_k_steps=3, cut_replies="keep")
    train_arm(base, pairs, tmp_path / "whole", **options)
    assert seen == [4, 3, 2, 1]
    with pytest.raises(Killed):
        train_arm(base, pairs, tmp_path / "cut", **options, callbacks=[KillAfter(3)])
    seen.clear()
    train_arm(base, pairs, tmp_path / "cut", **options)
    assert seen == [2, 1]
    assert file_sha256(tmp_path / "cut" / "adapter") == file_sha256(tmp_path / "whole" / "adapter")
    options["max_k_end"] = 4  # k stays: another run
    train_arm(base, pairs, tmp_path / "other", **options)
    assert file_sha256(tmp_path / "other" / "adapter") != file_sha256(tmp_path / "whole" / "adapter")


# the strategy's hyperparameters: our name, and its value where it names one that is not a matter of model or machine
STRATEGY = {
    "num_generations": 4, "learning_rate_policy": None, "learning_rate_supervised": None, "advantage_clip": 10.0,
    "gradient_accumulation": 8, "kl_weight": None, "temperature": None, "policy_every": None, "loss_type": None,
    "advantage": None, "reward_pass_threshold": None, "diversity_metric": None, "gradient_checkpointing": None,
    "warm_start": None, "phase_split": None, "alpha": None, "beta": None, "lam": None, "max_k": None}


def test_every_hyperparameter_of_the_strategy_is_documented_with_its_range():
    known = user_parameters("policy") | user_parameters("train")
    for name, default in (STRATEGY | {"attention": "auto", "quantization": "none"}).items():
        parameter = known[name]
        facts = parameter.metadata
        assert facts["choices"] or parameter.type in (bool, str) or facts["high"] < np.inf, name
        assert len(described(parameter).split()) > 3, name
        assert default is None or default_of(parameter) == default, name


def test_presets_follow_the_strategy_where_the_model_is_large():
    train = resolve_config(load_preset("gpu"))["stages"]["train"]
    for arm in ARMS:
        assert train[arm]["learning_rate_policy"] == 1e-5 and train[arm]["learning_rate_supervised"] == 2e-4
        assert train[arm]["gradient_accumulation"] == 8 and train[arm]["watch_every"] > 0
        replies = train[arm]["batch_size"] if arm == "baseline" else (
            train[arm]["posts_per_step"] * train[arm]["num_generations"])
        assert replies % 8 == 0
    smoke = resolve_config(load_preset("smoke"))["stages"]["train"]
    assert all(smoke[arm]["watch_every"] and smoke[arm]["report_to"] == "tensorboard" for arm in smoke)


def test_a_kill_between_training_and_the_end_of_its_stage(run_dir, tmp_path, monkeypatch, capsys):
    """The adapter of an unfinished stage is removed then; what was trained is not trained again."""
    def stage(run, **more):
        shutil.copytree(run_dir, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("train"))  # needs no arm before
        hybrid.train_stage(run, arm="polychromic", reward="heuristic", report_to="none", max_steps=3, posts_per_step=2,
                           num_generations=2, gradient_accumulation=0, max_new_tokens=6, watch_posts=2, watch_replies=1,
                           validation_replies=2, **more)
        return run / "train" / "polychromic" / "seed0"

    def die(log):
        raise Killed

    whole = stage(tmp_path / "whole")
    assert not (whole / "checkpoints").exists()
    with monkeypatch.context() as patch:
        patch.setattr(hybrid, "pilot_verdict", die)
        with pytest.raises(Killed):
            stage(tmp_path / "cut", keep_checkpoints=True)
    cut = tmp_path / "cut" / "train" / "polychromic" / "seed0"
    shutil.rmtree(cut / "adapter")
    (cut / "train_log.csv").unlink()
    capsys.readouterr()
    stage(tmp_path / "cut", keep_checkpoints=True)
    assert "polychromic: goes on after step 3" in capsys.readouterr().out
    for name in ("adapter", "train_log.csv", "watch.csv", "samples.parquet", "samples.html", "verdict.json"):
        assert file_sha256(cut / name) == file_sha256(whole / name), name
    assert (cut / "checkpoints" / "checkpoint-3").exists()
