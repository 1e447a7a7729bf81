"""How much of gold does each way of treating circumstances recover as the simulator's dials turn?

    python benchmarks/deconfounding.py [--conversations 1500] [--seed 0] [--out benchmarks/deconfounding.csv]
                                       [--figure docs/figures/deconfounding.png]

One text model (n-grams of the reply, in a likelihood of which of a post's replies a like goes to) is fitted in three
ways: *naive*, without circumstances; *between*, with the expectation of a pooled regression as its offset; *within*,
with circumstances as covariates of the same likelihood.  Each scores the half of the posts that it was not fitted on.
The three fits are written out here, smaller than the stage's own, so that the figure does not depend on it.

The fitted coefficients shrink as confounding grows, because a bag of the reply's n-grams knows only a part of gold and
circumstances stand in for the rest; with gold itself beside them the true ones come back (the test of this file).

Beside them stand the coefficients of the package's own fit (`package_...`, with intervals: `rewards/circumstances` and
its text columns), and `package_inside`: whether the true one lies in the interval. `no_text_...` is the same without
text columns, `gold_...` the same with gold as the only text column: what is lost between them is what text is unknown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from grpo_engage.data.simulator import LIKES, World, simulate_pairs
from grpo_engage.data.truth import GOLDS, gold_of
from grpo_engage.rewards.circumstances import deconfound
from grpo_engage.rewards.text_columns import text_columns

DIALS = {"confounding": (0.0, 0.3, 0.6), "hidden": (0.0, 0.3, 0.6), "early": (0.0, 0.3, 0.6)}
OFF = {"confounding": 0.3, "hidden": 0.0, "early": 0.1}  # where the other dials stand: the default world
NAMES = ("followers", "delay", "arrival")
PENALTY = 0.002  # ridge on the text's weights, per post


def circumstances(pairs: pd.DataFrame) -> np.ndarray:
    """Log followers, log delay, log place among the post's replies: (n, 3)."""
    place = pairs.groupby("conversation_id")["reply_time_diff_seconds"].rank(method="first")
    return np.column_stack([np.log1p(pairs["reply_author_followers"]), np.log1p(pairs["reply_time_diff_seconds"]),
                            np.log(place)])


def fit_within(likes: np.ndarray, post: np.ndarray, x: np.ndarray, free: int, offset: np.ndarray) -> np.ndarray:
    """Weights of x's columns in the chance that a post's like goes to a reply; the first `free` are not penalised."""
    totals = np.bincount(post, likes)
    rows = (totals > 0)[post]
    likes, x, offset, post = likes[rows], x[rows], offset[rows], pd.factorize(post[rows])[0]
    starts, totals = np.flatnonzero(np.diff(post, prepend=-1)), np.bincount(post, likes)
    weight = np.sqrt(totals) / np.sqrt(totals).sum()  # between a like and a post as the unit: no post rules
    share, weight = likes / totals[post], weight[post]
    penalty = np.where(np.arange(x.shape[1]) < free, 0.0, PENALTY)

    def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
        score = x @ beta + offset
        score -= np.maximum.reduceat(score, starts)[post]
        log_chance = score - np.log(np.add.reduceat(np.exp(score), starts))[post]
        return (-(weight * share) @ log_chance + penalty @ beta**2 / 2,
                (weight * (np.exp(log_chance) - share)) @ x + penalty * beta)

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


def pooled_coefficients(pairs: pd.DataFrame, x: np.ndarray) -> np.ndarray:
    """Coefficients of the circumstances in a negative binomial regression over all rows, post's likes beside them."""
    design = sm.add_constant(np.column_stack([x, np.log1p(pairs["tweet_likes"])]))
    return sm.GLM(pairs["reply_likes"], design, family=sm.families.NegativeBinomial(alpha=2.0)).fit().params[1:4]


def within_spearman(first: np.ndarray, second: np.ndarray, post: np.ndarray) -> float:
    """Correlation of ranks among replies to one post, pooled over posts."""
    ranks = pd.DataFrame({"first": first, "second": second}).groupby(post).rank()
    ranks -= ranks.groupby(post).transform("mean")
    return float(ranks.corr().iloc[0, 1])


def residual_agreement(likes: np.ndarray, explained: np.ndarray, gold: np.ndarray, post: np.ndarray) -> float:
    """Correlation within posts of gold with likes beyond the share that circumstances explain.

    Not a rank correlation: most replies have no like, and their ranks would be those of the circumstances.
    """
    table = pd.DataFrame({"chance": np.exp(explained), "likes": likes, "gold": gold})
    totals = table.groupby(post).transform("sum")
    rest = (likes - totals["likes"] * table["chance"] / totals["chance"]) / np.sqrt(np.maximum(totals["likes"], 1))
    return float(np.corrcoef(rest, gold - table.groupby(post)["gold"].transform("mean"))[0, 1])


def recovered(pairs: pd.DataFrame, text: np.ndarray) -> pd.DataFrame:
    """One row a way: agreement with gold of `labels` and `learned` text score, and the coefficients of `NAMES`."""
    likes, post = pairs["reply_likes"].to_numpy(float), pd.factorize(pairs["conversation_id"])[0]
    gold, x = gold_of(pairs)(pairs["tweet"], pairs["reply"]), circumstances(pairs)
    x = x - x.mean(axis=0)
    none, ways = np.zeros(len(pairs)), ("naive", "between", "within")
    learned, explained = ({way: np.zeros(len(pairs)) for way in ways} for _ in range(2))
    found = {way: [] for way in ways}
    for fold in (0, 1):
        train, test = post % 2 == fold, post % 2 != fold
        pooled = pooled_coefficients(pairs[train], x[train])
        joint = fit_within(likes[train], post[train], np.hstack([x, text])[train], 3, none[train])
        weights = {"naive": fit_within(likes[train], post[train], text[train], 0, none[train]),
                   "between": fit_within(likes[train], post[train], text[train], 0, (x @ pooled)[train]),
                   "within": joint[3:]}
        for way, coefficients in zip(ways, (np.zeros(3), pooled, joint[:3]), strict=True):
            learned[way][test] = text[test] @ weights[way]
            explained[way][test] = x[test] @ coefficients
            found[way].append(coefficients)
    return pd.DataFrame([{"way": way, "labels": residual_agreement(likes, explained[way], gold, post),
                          "learned": within_spearman(learned[way], gold, post)}
                         | dict(zip(NAMES, np.mean(found[way], axis=0), strict=True)) for way in ways])


def package_fit(pairs: pd.DataFrame, text: pd.DataFrame, world: World) -> dict:
    """Coefficients of the package's fit with its text columns, with none, and with gold in their place."""
    rows, found = np.ones(len(pairs), dtype=bool), {}
    gold = pd.DataFrame({"gold": gold_of(pairs)(pairs["tweet"], pairs["reply"])}, index=pairs.index)
    true = {"followers": LIKES["followers"], "delay": LIKES["delay"], "order": -world.early}
    for way, columns in (("package", text), ("no_text", text[[]]), ("gold", gold)):
        for name, row in deconfound(pairs, rows, retweet_weight=0, text=columns)[1]["intervals"].items():
            name = name.removeprefix("log_")
            found[f"{way}_{name}"] = row["estimate"]
            if way != "no_text":
                found[f"{way}_{name}_low"], found[f"{way}_{name}_high"] = row["ci_low"], row["ci_high"]
                found[f"{way}_{name}_inside"] = row["ci_low"] <= true[name] <= row["ci_high"]
    return found


def turn_dials(n_conversations: int, seed: int) -> pd.DataFrame:
    """`recovered` in every world, with the true coefficients (`true_…`) beside the fitted ones."""
    rows, text, columns = [], None, None
    for gold in GOLDS:
        for dial, values in DIALS.items():
            for value in values:
                world = World(**OFF | {dial: value}, gold=gold)
                pairs = simulate_pairs(n_conversations, seed, world)
                if text is None:  # the texts are the same in every world
                    grams = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
                    grams = grams.fit_transform(pairs["reply"])
                    text = TruncatedSVD(min(60, grams.shape[1] - 1), random_state=seed).fit_transform(grams)
                    text /= text.std()
                    columns = text_columns(pairs)
                true = {"followers": LIKES["followers"], "delay": LIKES["delay"], "arrival": -world.early}
                rows.append(recovered(pairs, text).assign(gold=gold, dial=dial, value=value, **{
                    f"true_{name}": number for name, number in true.items()}, **package_fit(pairs, columns, world)))
    return pd.concat(rows, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """The learned text model's correlation with gold against each dial, a line for each way and gold."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, dial in zip(figure.subplots(1, len(DIALS), sharey=True, squeeze=False)[0], DIALS, strict=True):
        for colour, way in zip(("tab:red", "tab:orange", "tab:blue"), ("naive", "between", "within"), strict=True):
            for gold, line in (("a", "o-"), ("b", "o--")):
                part = table[(table["dial"] == dial) & (table["way"] == way) & (table["gold"] == gold)]
                axis.plot(part["value"], part["learned"], line, color=colour, markersize=4, label=f"{way}, gold {gold}")
        axis.set(xlabel=dial, xticks=DIALS[dial])
        axis.axhline(0, color="grey", linewidth=0.6)
    figure.axes[0].set_ylabel("Spearman with gold within posts")
    figure.axes[-1].legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/deconfounding.csv"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/deconfounding.png"))
    given = parser.parse_args()
    table = turn_dials(given.conversations, given.seed)
    table.to_csv(given.out, index=False, float_format="%.4f")
    given.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(table).savefig(given.figure, dpi=110)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
