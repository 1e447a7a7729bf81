"""Criteria become met, not met or inconclusive; nothing is met without an interval."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

from grpo_engage.evaluation import conclusions
from grpo_engage.evaluation.conclusions import GUARDED, PROJECTED, beside_projection, compare_arms, decide, recommend
from grpo_engage.stats.crossed import crossed_difference

GOOD = {"pass@1": 0.5, "pass@5": 0.8, "pass@10": 0.9, "self_bleu": 0.2, "rouge_l": 0.4, "judge_engagement": 0.8}


def table(levels, n_seeds=4, n_posts=40, noise=0.02):
    rng, rows = np.random.default_rng(0), []
    for arm, level in levels.items():
        for metric, value in level.items():
            values = value + noise * (rng.normal(size=(n_seeds, 1)) / 4 + rng.normal(size=(n_seeds, n_posts)))
            rows += [{"arm": arm, "seed": s, "post": f"p{p}", "metric": metric, "value": values[s, p]}
                     for s in range(n_seeds) for p in range(n_posts)]
    return pd.DataFrame(rows)


BASE = {metric: value - (0.2 if GUARDED[metric] else -0.2) for metric, value in GOOD.items()}


def status(decision, criterion):
    return decision[decision["criterion"].str.startswith(criterion)]["status"].tolist()


@pytest.mark.parametrize(("value", "expected"), [(0.90, ["met", "met", "met"]), (0.72, ["met", "met", "not met"]),
                                                 (0.50, ["not met"] * 3),
                                                 (0.65, ["inconclusive", "not met", "not met"])])
def test_threshold_against_the_whole_interval(value, expected):
    decision = decide(table({"baseline": BASE, "grpo": GOOD | {"pass@10": value}}))
    assert decision[decision["criterion"].str.match("pass@10 >")]["status"].tolist() == expected


def test_lower_is_better_for_self_bleu_and_a_loss_is_named():
    decision = decide(table({"baseline": BASE, "grpo": GOOD | {"self_bleu": 0.6}}))
    assert status(decision, "self_bleu") == ["not met"] and status(decision, "no metric") == ["not met"]
    assert "self_bleu" in decision[decision["criterion"].str.startswith("no metric")]["reason"].item()
    assert recommend(decision).startswith("Proceed") and "minimum level reached" in recommend(decision)


def test_one_seed_is_decided_over_posts_and_says_so():
    one = decide(table({"baseline": BASE, "grpo": GOOD}, n_seeds=1))
    lead = one[one["criterion"].str.startswith("pass@10 above")].iloc[0]
    assert lead["status"] == "met" and lead["reason"] == "interval over posts, of one trained seed"
    single = table({"baseline": BASE, "grpo": GOOD}, n_seeds=1)
    values = [single[(single["arm"] == arm) & (single["metric"] == "pass@10")]["value"].to_numpy()
              for arm in ("grpo", "baseline")]
    expected = ttest_rel(*values).confidence_interval()
    assert (lead["ci_low"], lead["ci_high"]) == pytest.approx(tuple(expected))
    nothing = decide(table({"baseline": BASE, "grpo": GOOD}, n_seeds=1, n_posts=1))
    left = nothing[nothing["criterion"] != "training completes"]
    assert (left["status"] == "inconclusive").all() and (left["reason"] != "").all()


def test_a_missing_metric_is_inconclusive_with_a_reason():
    data = table({"baseline": BASE, "grpo": GOOD})
    data.loc[data["metric"] == "rouge_l", "value"] = np.nan
    decision = decide(data)
    assert status(decision, "rouge_l") == ["inconclusive"]
    assert decision[decision["criterion"].str.startswith("rouge_l")]["reason"].item() == "rouge_l was not computed"
    assert status(decision, "no metric") == ["inconclusive"]


def test_missing_seeds_are_not_a_completed_training():
    data = table({"baseline": BASE, "grpo": GOOD})
    assert status(decide(data[(data["arm"] == "baseline") | (data["seed"] < 3)]), "training") == ["not met"]


def test_comparison_pairs_by_post_and_seed_whatever_the_row_order():
    data = table({"baseline": BASE, "grpo": GOOD})
    result = compare_arms(data.sample(frac=1, random_state=0), "grpo", "baseline", "pass@10")
    a, b = (data[(data["arm"] == arm) & (data["metric"] == "pass@10")]["value"].to_numpy().reshape(4, 40)
            for arm in ("grpo", "baseline"))
    assert result["low"] == pytest.approx(crossed_difference(a, b).low)
    assert compare_arms(data, "grpo", "baseline", "absent")["reason"].startswith("absent has no post")


def test_projection_stands_beside_the_measurement_and_nan_has_its_reason():
    beside = beside_projection(table({"baseline": BASE, "hybrid": GOOD})).set_index(["arm", "metric"])
    assert beside.loc[("hybrid", "pass@10"), "projected"] == 0.75
    assert beside.loc[("hybrid", "pass@10"), "measured"] == pytest.approx(0.9, abs=0.01)
    missing = beside.loc[("hybrid", "semantic_diversity")]
    assert np.isnan(missing["measured"]) and missing["reason"] == "semantic_diversity was not computed"
    assert PROJECTED["polychromic"].tolist() == [.40, .55, .61, .28, .33, .42, .52]


def test_no_rival_and_no_baseline():
    assert recommend(decide(table({"baseline": BASE}))).startswith("Iterate: no arm")
    with pytest.raises(ValueError, match="no arm 'baseline'"):
        decide(table({"grpo": GOOD}))


def by_p_values(monkeypatch, p_values, difference=0.1):
    """`decide` for arms whose comparisons with the baseline have these p-values (metric or arm -> p)."""
    def compared(by_post, arm, versus, metric):
        p = p_values.get(arm, p_values.get(metric, 0.9))
        return {"difference": difference, "low": -1.0, "high": 1.0, "p_value": p, "reason": "", "over": ""}

    monkeypatch.setattr(conclusions, "compare_arms", compared)
    return decide(table({"baseline": BASE} | {arm: GOOD for arm in p_values if arm not in GUARDED} | {"other": GOOD}))


def test_the_lead_over_the_baseline_is_corrected_for_the_number_of_arms(monkeypatch):
    p_values = {"grpo": 0.02, "hybrid": 0.03, "polychromic": 0.001, "other": 0.5}
    lead = by_p_values(monkeypatch, p_values)
    lead = lead[lead["criterion"].str.startswith("pass@10 above")].set_index("arm")
    adjusted = dict(zip(p_values, multipletests(list(p_values.values()), method="holm")[1], strict=True))
    for arm, p in adjusted.items():
        assert lead.loc[arm, "p_holm"] == pytest.approx(p) and (lead.loc[arm, "status"] == "met") == (p < 0.05)
    assert lead.loc["grpo", "status"] == "inconclusive"  # 0.02 alone would have done


@pytest.mark.parametrize(("difference", "margin", "expected"), [
    (-0.01, 0.05, "met"), (-0.05, 0.05, "inconclusive"), (-0.2, 0.05, "not met"), (-0.2, 0.3, "met")])
def test_no_worse_is_a_margin_and_not_a_missing_proof(difference, margin, expected):
    """A wide interval around nothing used to count as "not significantly below"."""
    decision = decide(table({"baseline": BASE, "grpo": BASE | {"rouge_l": BASE["rouge_l"] + difference}}), margin=margin)
    row = decision[decision["criterion"].str.startswith("no metric below")].iloc[0]
    assert row["status"] == expected, row["reason"]
    noisy = decide(table({"baseline": BASE, "grpo": BASE}, n_seeds=2, n_posts=4, noise=0.5))
    assert noisy[noisy["criterion"].str.startswith("no metric below")]["status"].item() == "inconclusive"


def test_the_recommendation_is_one_paragraph_with_the_primary_endpoint():
    decision = decide(table({"baseline": BASE, "grpo": GOOD}))
    primary = pd.DataFrame([{"arm": "grpo", "temperature": 0.5, "versus_temperature": 0.7, "value": 0.91,
                             "baseline": 0.7, "difference": 0.21, "low": 0.1, "high": 0.32, "p_value": 1e-5, "p_holm": 1e-5,
                             "conclusion": "above", "over": "posts and seeds", "smallest": 0.15, "n_posts": 40,
                             "n_seeds": 4}])
    told = recommend(decision, primary)
    assert "\n" not in told and "+0.21 [+0.10, +0.32]" in told and "p < .001" in told and "nan" not in told.lower()
    assert "three seeds" not in told and "three seeds" in recommend(decision, primary.assign(n_seeds=1))
