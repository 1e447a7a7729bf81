"""The learning study passes replies by the pipeline's rule, and writes the other one beside it."""

import importlib.util
import itertools

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import REPO_ROOT, write_parquet
from grpo_engage.data.gold import gold_appeal
from grpo_engage.data.pairs import load_pairs
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.evaluation.evaluation import posts_with_replies
from grpo_engage.evaluation.scoring import BLOCKING_GUARDS, frozen_mark
from grpo_engage.studies.learning_study import Setting, sample_setting, study_by_post, study_marks, study_setting
from grpo_engage.train.objective import Objective

specification = importlib.util.spec_from_file_location("learning", REPO_ROOT / "benchmarks" / "learning.py")
learning = importlib.util.module_from_spec(specification)
specification.loader.exec_module(learning)

LAST = {"baseline": 80, "grpo": 30}


def replies(setting, seed, split, n_posts=12, n_samples=11):
    """Samples of one setting whose gold lies at one level under all posts, while their rivals' does not."""
    rng = np.random.default_rng([seed, len(setting), len(split)])
    level, rivals = {"baseline": 0.4, "grpo": 0.5}[setting], np.linspace(0.1, 0.9, n_posts)
    rows = [(f"{split}{post}", sample, f"word {sample}", gold, np.clip(0.5 + gold - rivals[post], 0, 1))
            for post in range(n_posts) for sample, gold in enumerate(np.clip(rng.normal(level, 0.2, n_samples), 0, 1))]
    table = pd.DataFrame(rows, columns=["post", "sample", "text", "gold", "judge"])
    return table.assign(reward=0.5, kl=0.4, rouge_l=0.3, **{
        f"guard_{name}": rng.random(len(table)) < 0.05 for name in BLOCKING_GUARDS})


def together(*parts):
    return pd.concat([replies(*part).assign(setting=part[0], seed=part[1], split=part[2]) for part in parts],
                     ignore_index=True)


def test_passes_are_counted_as_over_every_ten_of_the_replies():
    samples = together(("baseline", 0, "validation"))
    found = study_by_post(samples, {"relative": ("judge", 0.6), "absolute": ("gold", 0.5)}, 50).set_index("post")
    guarded = samples[[f"guard_{name}" for name in BLOCKING_GUARDS]].any(axis=1)
    assert guarded.any()
    for name, column, tau in (("", "judge", 0.6), (" absolute", "gold", 0.5)):
        for post, group in samples.assign(passed=(samples[column] >= tau) & ~guarded).groupby("post"):
            shares = [any(ten) for ten in itertools.combinations(group["passed"], 10)]
            assert found.loc[post, f"pass@10{name}"] == pytest.approx(np.mean(shares))
            assert found.loc[post, f"pass@1{name}"] == pytest.approx(group["passed"].mean())
    ease = found["pass@1"].to_numpy()[np.argsort([int(post.removeprefix("validation")) for post in found.index])]
    assert ease[:4].mean() > ease[-4:].mean() + 0.3  # by the rule: some posts have rivals that are hard to beat
    assert not np.allclose(found["pass@1"], found["pass@1 absolute"])


def test_the_studys_marks_are_the_pipelines(tmp_path):
    samples = together(("baseline", 0, "validation"), ("baseline", 1, "validation"), ("grpo", 0, "validation"),
                       ("baseline", 0, "test"))
    marks = study_marks(samples)
    frozen, _ = frozen_mark(tmp_path / "pass.json", samples.assign(arm=samples["setting"], second_judge=0.5 + (
        samples["sample"] % 3) / 10), 0.6, "gold", "model")
    assert marks == {"relative": ("judge", frozen["tau"]), "absolute": ("gold", frozen["absolute"]["tau"])}
    moved = samples["judge"].where((samples["setting"] == "baseline") & (samples["split"] == "validation"), 0.0)
    assert study_marks(samples.assign(judge=moved))["relative"] == marks["relative"]  # by the baseline's alone
    assert study_marks(samples, target=0.9)["relative"][1] < marks["relative"][1]


def test_a_sample_is_judged_against_the_real_replies_to_its_own_post(base):
    posts = posts_with_replies(simulate_pairs(40, seed=3).assign(split="validation"), "validation").head(3)
    found = sample_setting(base, None, None, posts, lambda texts, replies: np.full(len(replies), 0.25), gold_appeal, 4,
                           seed=5, max_new_tokens=8)
    assert len(found) == 12 and (found["reward"] == 0.25).all() and found["kl"].abs().max() < 1e-5
    for row in found.itertuples():
        post = posts.set_index("post").loc[row.post]
        gold = gold_appeal([post["tweet"]], [row.text])[0]
        rivals = gold_appeal([post["tweet"]] * len(post["replies"]), post["replies"])
        assert row.gold == gold
        assert row.judge == pytest.approx(np.mean([1.0 if gold > other else 0.5 if gold == other else 0.0
                                                   for other in rivals]))


def test_a_setting_is_trained_and_sampled_with_what_both_rules_need(base, small_world, tmp_path):
    tiny = {"posts_per_step": 2, "num_generations": 4, "max_steps": 2, "max_new_tokens": 20}
    settings = {"baseline": Setting(Objective(1, 0, 0), options={"batch_size": 4, "max_steps": 2}),
                "grpo": Setting(Objective(0, 1, 0), "baseline", tiny)}
    examples = load_pairs(small_world).query("split == 'policy'")[["tweet", "reply"]]
    held = learning.held_out(small_world, 3)
    for name, setting in settings.items():
        study_setting(name, setting, 0, tmp_path, base, examples, held, lambda posts, replies: np.array(
            [len(reply) / 100 for reply in replies]), "length", gold_appeal, n_samples=10)
    samples = learning.gather(tmp_path, settings)
    assert samples.groupby(["setting", "split", "step"]).size().to_dict() == {
        ("baseline", "test", 2): 30, ("baseline", "validation", 2): 30, ("grpo", "test", 2): 30,
        ("grpo", "validation", 1): 30, ("grpo", "validation", 2): 30}
    marks = study_marks(samples[samples["step"] == 2])
    found = study_by_post(samples[(samples["setting"] == "grpo") & (samples["split"] == "test")], marks, 100)
    assert len(found) == 3 and found[["pass@10", "pass@10 absolute"]].isin([0.0, 1.0]).all().all()  # ten of ten replies
    assert found["kl"].gt(0).all()  # it moved


def test_the_report_holds_both_rules_and_refuses_samples_of_the_old_one(tmp_path):
    for setting, steps in LAST.items():
        for seed in (0, 1):
            for split, step in (("validation", steps), ("validation", steps // 2), ("test", steps)):
                if setting == "baseline" and step < steps:
                    continue
                made = replies(setting, seed, split).assign(kl=0.4 * step / steps)
                folder = tmp_path / setting / f"seed{seed}"
                write_parquet(folder / f"{split}-{step}.parquet", made)
                write_parquet(folder / f"nll-{split}-{step}.parquet",
                              pd.DataFrame({"post": made["post"].unique(), "nll": 1.0}))
    settings = {name: learning.SETTINGS[name] for name in LAST}
    learning.report(tmp_path, settings, 100)
    compared = pd.read_csv(tmp_path / "comparisons.csv").query("split == 'test' and at == 'last step'")
    last = compared.set_index("metric")["difference"][["pass@10", "pass@10 absolute"]]
    assert last.notna().all() and last.nunique() == 2
    rules = pd.read_csv(tmp_path / "pass_rule.csv").set_index(["system", "rule"])
    means = pd.read_csv(tmp_path / "means.csv").query("split == 'validation' and step == 80").iloc[0]
    assert rules.loc[("baseline", "relative"), "pass@1"] == pytest.approx(means["pass@1"])
    assert rules.loc[("baseline", "absolute"), "pass@1"] == pytest.approx(means["pass@1 absolute"])
    for path in tmp_path.glob("*/seed*/[tv]*.parquet"):
        write_parquet(path, pd.read_parquet(path).drop(columns="judge"))
    with pytest.raises(ValueError, match="lack judge: .* sample again"):
        learning.report(tmp_path, settings, 100)
