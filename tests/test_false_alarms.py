"""The counting of proofs/false_alarms.py: on tables by hand, against scipy's exact interval, and what is shuffled."""

import importlib.util
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.data.simulator import simulate_pairs

_spec = importlib.util.spec_from_file_location("false_alarms", REPO_ROOT / "proofs" / "false_alarms.py")
false_alarms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(false_alarms)

ABOVE, BELOW = "pass@10 above the baseline, p < 0.05", "no metric significantly below the baseline's"


def tables(above="inconclusive", below="met", p_holm=(0.2, 0.06), conclusions=("not told apart",) * 3, primary=None):
    """The tables of a run that claims nothing, but for what is given."""
    made = {
        "decision": pd.DataFrame({"arm": "again", "criterion": ["training completes", "pass@10 > 0.65", ABOVE, BELOW],
                                  "status": ["met", "met", above, below]}),
        "comparisons": pd.DataFrame({"arm": ["again", "again", "again", "other"], "metric": list("abcd"),
                                     "p_holm": [*p_holm, math.nan, 0.001]}),
        "robustness": pd.DataFrame({"arm": "again", "metric": ["pass@10", "pass@10", "pass@1"],
                                    "view": ["judge", "second judge", "judge"], "conclusion": conclusions})}
    return made | ({} if primary is None else {"primary": pd.DataFrame({"arm": ["again"], "p_holm": [primary]})})


def made_claims(**changes):
    return {claim for claim, made in false_alarms.claims_of(tables(**changes)).items() if made}


def test_a_run_that_claims_nothing_is_counted_as_silent():
    assert made_claims() == set() == made_claims(primary=0.05)
    assert len(false_alarms.claims_of(tables(primary=0.5))) == len(false_alarms.claims_of(tables())) + 1 == 9


@pytest.mark.parametrize(("changes", "expected"), [
    ({"above": "met"}, {"decision.csv: pass@10 above the baseline",
                        "decision.csv: pass@10 above or below the baseline"}),
    ({"above": "not met"}, {"decision.csv: pass@10 above or below the baseline"}),
    ({"below": "not met"}, {"decision.csv: a metric below the baseline's"}),
    ({"below": "inconclusive"}, set()),
    ({"p_holm": (0.2, 0.049)}, {"comparisons.csv: any headline metric, p_holm < 0.05"}),
    ({"conclusions": ("not told apart", "below", "not told apart")},
     {"robustness.csv: pass@10 by second judge", "robustness.csv: any row"}),
    ({"primary": 0.01}, {"primary.csv: any arm, p_holm < 0.05"})])
def test_each_claim_is_found_and_no_other(changes, expected):
    assert made_claims(**changes) == expected


@pytest.mark.parametrize(("name", "change", "message"), [
    ("decision", lambda table: table[table["criterion"] != ABOVE], "no criterion like 'pass@10 above"),
    ("decision", lambda table: table[table["criterion"] != BELOW], "no criterion like 'below the baseline'"),
    ("comparisons", lambda table: table.assign(p_holm=math.nan), "0 adjusted p-values"),
    ("robustness", lambda table: table.assign(arm="other"), "0 rows"),
    ("primary", lambda table: table.assign(p_holm=math.nan), "primary.csv has no p_holm")])
def test_a_table_without_the_claim_is_no_silent_run(name, change, message):
    made = tables(primary=0.5)
    with pytest.raises(ValueError, match=message):
        false_alarms.claims_of(made | {name: change(made[name])})


def test_shares_intervals_and_what_was_promised():
    rows = [["A/A grpo", run, "comparisons.csv: x", int(run < 5), 0.05] for run in range(24)]
    rows += [["A/A baseline", run, "comparisons.csv: x", int(run < 1), 0.05] for run in range(24)]
    rows += [["shuffled likes", run, "gate: reward validated", made, 0.025] for made in (0,) for run in range(24)]
    rows += [["noise reward", run, "robustness.csv: any row", 1, math.nan] for run in range(3)]
    table = false_alarms.summarise(pd.DataFrame(rows, columns=false_alarms.COLUMNS))
    assert table["kind"].tolist() == list(false_alarms.KINDS) and table["claimed"].tolist() == [1, 5, 0, 3]
    for row in table.itertuples():
        exact = binomtest(row.claimed, row.runs).proportion_ci(0.95, "exact")
        assert (row.share, row.low, row.high) == pytest.approx((row.claimed / row.runs, exact.low, exact.high))
    assert table["found"].tolist() == ["", "too many", "", ""]


def test_what_is_promised_for_which_kind():
    promised = false_alarms.promised
    assert promised("A/A grpo", "comparisons.csv: any headline metric, p_holm < 0.05") == 0.05
    assert promised("A/A grpo", "decision.csv: pass@10 above the baseline") == 0.025
    assert promised("noise reward", "decision.csv: pass@10 above the baseline") == 0.025
    assert promised("shuffled likes", "gate: judge validated") == 0.025
    assert all(math.isnan(promised(kind, claim)) for kind, claim in [
        ("noise reward", "decision.csv: a metric below the baseline's"), ("A/A grpo", "robustness.csv: any row"),
        ("shuffled likes", "primary.csv: any arm, p_holm < 0.05"), ("noise reward", "gate: judge validated")])


def test_likes_are_shuffled_within_posts_and_carry_nothing_over():
    pairs = simulate_pairs(200, seed=3)
    shuffled = false_alarms.shuffled_within_posts(pairs, 0)
    kept = pairs.columns.drop(["reply_likes", "reply_retweets"])
    pd.testing.assert_frame_equal(shuffled[kept], pairs[kept])

    def sorted_outcomes(table):
        outcome = table[["conversation_id", "reply_likes", "reply_retweets"]]
        return outcome.sort_values(list(outcome)).reset_index(drop=True)

    pd.testing.assert_frame_equal(sorted_outcomes(shuffled), sorted_outcomes(pairs))  # the two of a reply stay together

    def inside(values):
        logs = np.log1p(values)
        return logs - logs.groupby(pairs["conversation_id"]).transform("mean")

    assert abs(inside(pairs["reply_likes"]).corr(inside(shuffled["reply_likes"]))) < 0.05


def test_every_deal_takes_each_adapter_once():
    for deal in (0, 1):
        taken = [seed for run in range(12 * deal, 12 * deal + 12) for seed in false_alarms.dealt(run, 48)]
        assert sorted(taken) == list(range(48))
    assert false_alarms.dealt(0, 48) != false_alarms.dealt(12, 48) and false_alarms.dealt(3, 48) == (
        false_alarms.dealt(3, 48))


def test_the_noise_reward_is_a_hash_of_the_texts_that_knows_no_quality():
    posts, replies = ["🙂 post"] * 2000, [f"reply {number} \ud800" for number in range(2000)]
    scores = false_alarms.noise(0)(posts, replies)
    assert np.array_equal(scores, false_alarms.noise(0)(posts, replies)) and len(set(scores)) == 2000
    assert abs(scores.mean() - 0.5) < 0.03 and abs(scores.std() - 12**-0.5) < 0.02  # uniform on [0, 1)
    assert abs(np.corrcoef(scores, false_alarms.noise(1)(posts, replies))[0, 1]) < 0.08
