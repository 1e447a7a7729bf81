"""What circumstances explain among replies to one post, on a file of pairs: the table of PHEME.

    python benchmarks/within_posts.py PAIRS.jsonl.gz [OUT.csv] [--folds 5] [--seed 0]

Rows: coefficients of the package's fit over the whole file (clustered by post), the correlation within posts of
followers with raw likes and with the residual label, and how often circumstances order a clear pair rightly (higher
>= 2 max(lower, 1) + 1), out of fold (folds are conversations): fitted within posts, by a pooled regression, and by the
delay alone. Intervals resample conversations. No text is written. Every event of PHEME has been read before: no figure
of it is fresh.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_engage.base.core import child_seed, say, write_csv
from grpo_engage.data.reading import read_pairs
from grpo_engage.rewards.circumstances import COVARIATES, covariates, deconfound, engagement
from grpo_engage.rewards.heuristic import clear_pairs, pairwise_accuracy
from grpo_engage.rewards.pooled_expectation import pooled_expectation
from grpo_engage.stats.intervals import cluster_bootstrap


def out_of_fold(pairs: pd.DataFrame, fold: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (n,) of every reply by circumstances alone, from fits on the other folds; higher means more likes."""
    scores = {"within posts": np.zeros(len(pairs)), "pooled": np.zeros(len(pairs))}
    for number in range(fold.max() + 1):
        judged = fold == number
        _, report = deconfound(pairs, ~judged)
        values = covariates(pairs).fillna(covariates(pairs)[~judged].median())
        weights = pd.Series(report["coefficients"]).reindex(values.columns).fillna(0)
        scores["within posts"][judged] = (values @ weights)[judged]
        expected, _ = pooled_expectation(pairs, ~judged)
        scores["pooled"][judged] = np.log(expected)[judged]
        say(f"fold {number + 1} of {fold.max() + 1} done")
    scores["delay alone"] = -pairs["reply_time_diff_seconds"].to_numpy(dtype=float)
    return scores


def within_correlation(first: np.ndarray, second: np.ndarray, posts: np.ndarray, seed: int) -> tuple[float, ...]:
    """Correlation of two columns less their means over each post, and its interval over posts."""
    table = pd.DataFrame({"a": first, "b": second}).dropna()
    own = posts[table.index]
    apart = table - table.groupby(own).transform("mean")
    sums = pd.DataFrame({"ab": apart.a * apart.b, "aa": apart.a**2, "bb": apart.b**2}).groupby(own).sum().to_numpy()
    random = np.random.default_rng(seed)
    drawn = [sums[random.integers(len(sums), size=len(sums))].sum(axis=0) for _ in range(1000)]
    values = [ab / np.sqrt(aa * bb) for ab, aa, bb in [sums.sum(axis=0), *drawn]]
    return values[0], *np.quantile(values[1:], [0.025, 0.975])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("benchmarks/within_posts.csv"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    pairs = read_pairs(given.pairs)[0]
    pairs = pairs[np.isfinite(engagement(pairs)) & pairs["reply_time_diff_seconds"].notna()].reset_index(drop=True)
    likes, codes = engagement(pairs), pd.factorize(pairs["conversation_id"])[0]
    labels, report = deconfound(pairs, np.ones(len(pairs), dtype=bool))
    rows = [{"what": f"coefficient of {name}", "value": row["estimate"], "ci_low": row["ci_low"],
             "ci_high": row["ci_high"], "n": len(pairs)} for name, row in report["intervals"].items()]
    followers = covariates(pairs, ["followers"])["log_followers"].to_numpy()
    for name, column in (("raw log(1 + engagement)", np.log1p(likes)), ("residual label", labels["residual"])):
        value, low, high = within_correlation(followers, np.asarray(column), codes, child_seed(given.seed, name))
        rows.append({"what": f"followers with {name}, within posts", "value": value, "ci_low": low, "ci_high": high,
                     "n": len(pairs)})
    fold = (np.random.default_rng(child_seed(given.seed, "folds")).permutation(codes.max() + 1) % given.folds)[codes]
    higher_lower = clear_pairs(codes, likes)
    correct = {}
    for name, scores in out_of_fold(pairs, fold).items():
        correct[name] = pairwise_accuracy(scores, *higher_lower)
        value, low, high = cluster_bootstrap(correct[name], codes[higher_lower[0]], seed=given.seed)
        rows.append({"what": f"clear pairs ordered by circumstances, {name}", "value": value, "ci_low": low,
                     "ci_high": high, "n": len(correct[name])})
    gain, low, high = cluster_bootstrap(correct["within posts"] - correct["pooled"], codes[higher_lower[0]],
                                        seed=given.seed)
    rows.append({"what": "clear pairs, within posts less pooled", "value": gain, "ci_low": low, "ci_high": high,
                 "n": len(correct["pooled"])})
    table = pd.DataFrame(rows)
    say(f"covariates {', '.join(COVARIATES)}; {report['notes'] or 'no notes'}")
    write_csv(given.out, table)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
