"""Is the simulator as hard as real data?  Margins, confounds and baseline accuracies, side by side.

    python benchmarks/simulator_difficulty.py [--pheme PATH] [--conversations 5235] [--seed 0] [--gold a] [--out FILE]

The same code measures both data sets.  Accuracy is on *clear* pairs: two replies to the same post, the higher with at
least 2 * max(lower, 1) + 1 likes.  Every learner is fitted on one half of the conversations and tested on the other
(averaged over `--splits` random halvings).  Only aggregate numbers are printed; no text leaves this script.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.stats import spearmanr
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from grpo_engage.data.simulator import World, simulate_pairs
from grpo_engage.data.truth import gold_of

CONFOUNDS = ("reply_author_followers", "reply_time_diff_seconds", "tweet_likes")


def load_pheme(path: Path) -> pd.DataFrame:
    """Read the real data set (JSON lines)."""
    return add_meta(pd.read_json(path, lines=True))


def add_meta(frame: pd.DataFrame) -> pd.DataFrame:
    """Unpack `meta` (a dict or its JSON): column `strategy`, empty where the rows are not simulated."""
    meta = [json.loads(m) if isinstance(m, str) else m for m in frame["meta"]]
    return frame.assign(strategy=[m.get("strategy", "") for m in meta])


def clear_pairs(frame: pd.DataFrame) -> np.ndarray:
    """(n_pairs, 2) positions (higher, lower) of replies to one post whose likes differ clearly."""
    likes = frame["reply_likes"].to_numpy()
    found = []
    for rows in frame.groupby("conversation_id", sort=False).indices.values():
        high, low = np.nonzero(likes[rows][:, None] >= 2 * np.maximum(likes[rows][None, :], 1) + 1)
        found.append(np.column_stack([rows[high], rows[low]]))
    return np.concatenate(found) if found else np.empty((0, 2), dtype=int)


def pair_accuracy(score: np.ndarray, pairs: np.ndarray) -> float:
    """Share of clear pairs that `score` orders as the likes do; a tie counts one half."""
    difference = score[pairs[:, 0]] - score[pairs[:, 1]]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def centred(values: pd.Series | np.ndarray, conversation: pd.Series) -> np.ndarray:
    """Values minus the mean of their own post, so that the post's popularity cancels."""
    values = pd.Series(np.asarray(values, dtype=float), index=conversation.index)
    return (values - values.groupby(conversation).transform("mean")).to_numpy()


def metadata_features(frame: pd.DataFrame) -> np.ndarray:
    """Context of a reply that is no text and no outcome: who wrote it, and when."""
    conversation = frame["conversation_id"]
    followers, delay = np.log1p(frame["reply_author_followers"]), np.log1p(frame["reply_time_diff_seconds"])
    order = delay.groupby(conversation).rank(pct=True)
    return np.column_stack([followers, delay, order, np.log1p(frame["tweet_likes"]),
                            centred(followers, conversation), centred(delay, conversation)])


def accuracies(frame: pd.DataFrame, seed: int, gold: np.ndarray | None = None) -> dict[str, float]:
    """Accuracy on clear pairs of the test half: length, TF-IDF ridge, metadata (ridge, boosted trees), gold."""
    frame = frame.reset_index(drop=True)
    conversation = frame["conversation_id"]
    names = np.array(sorted(conversation.unique()))
    train_names = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    is_train = conversation.isin(train_names).to_numpy()
    target = centred(np.log1p(frame["reply_likes"]), conversation)
    pairs = clear_pairs(frame)
    pairs = pairs[~is_train[pairs[:, 0]]]

    words = frame["reply"].str.split().str.len().to_numpy(dtype=float)
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    tfidf = Ridge(alpha=100.0).fit(vectoriser.fit_transform(frame["reply"][is_train]), target[is_train])
    features = metadata_features(frame)
    scale = features[is_train].mean(0), features[is_train].std(0) + 1e-9
    linear = Ridge(alpha=1.0).fit((features[is_train] - scale[0]) / scale[1], target[is_train])
    trees = HistGradientBoostingRegressor(max_iter=100, learning_rate=0.06, min_samples_leaf=40, random_state=seed)
    trees.fit(features[is_train], target[is_train])
    result = {
        "clear pairs (test)": float(len(pairs)),
        "length": pair_accuracy(words, pairs),
        "tfidf ridge": pair_accuracy(tfidf.predict(vectoriser.transform(frame["reply"])), pairs),
        "metadata ridge": pair_accuracy(linear.predict((features - scale[0]) / scale[1]), pairs),
        "metadata trees": pair_accuracy(trees.predict(features), pairs),
    }
    if gold is not None:
        result["gold (oracle)"] = pair_accuracy(gold, pairs)
        within = pd.DataFrame({"g": gold, "t": tfidf.predict(vectoriser.transform(frame["reply"]))})[~is_train]
        result["spearman tfidf, gold"] = float(spearmanr(within["g"], within["t"])[0])
    return result


def circumstances_within_posts(frame: pd.DataFrame) -> dict[str, float]:
    """Coefficients of log followers and log delay among replies to one post, every post with likes of equal weight.

    A conditional (multinomial) likelihood: which of a post's replies a like goes to. The text is not controlled for.
    """
    totals = frame.groupby("conversation_id")["reply_likes"].transform("sum")
    known = frame[totals > 0].sort_values("conversation_id", kind="stable")
    post = pd.factorize(known["conversation_id"])[0]
    starts = np.flatnonzero(np.diff(post, prepend=-1))
    share = (known["reply_likes"] / totals[known.index]).to_numpy()
    x = np.log1p(known[["reply_author_followers", "reply_time_diff_seconds"]].to_numpy(dtype=float))

    def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
        score = x @ beta
        score -= np.maximum.reduceat(score, starts)[post]
        log_chance = score - np.log(np.add.reduceat(np.exp(score), starts))[post]
        return -share @ log_chance, (np.exp(log_chance) - share) @ x

    followers, delay = minimize(loss, np.zeros(2), jac=True).x
    return {"within posts, log followers": float(followers), "within posts, log delay": float(delay)}


def difficulty(frame: pd.DataFrame, seed: int, splits: int, gold: np.ndarray | None = None) -> dict[str, float]:
    """Mean of `accuracies` over random halvings of the conversations."""
    return pd.DataFrame([accuracies(frame, seed + k, gold) for k in range(splits)]).mean().to_dict()


def margins(frame: pd.DataFrame) -> dict[str, float]:
    """Size and marginal distribution of the likes, the context and the lengths."""
    likes, per_post = frame["reply_likes"], frame.groupby("conversation_id").size()
    row = {"posts": len(per_post), "replies": len(frame), "replies a post, mean": per_post.mean(),
           "replies a post, median": per_post.median(), "replies a post, p90": per_post.quantile(0.9),
           "likes zero share": (likes == 0).mean(), "likes mean": likes.mean(), "likes max": likes.max(),
           "reply words, median": frame["reply"].str.split().str.len().median(),
           "distinct replies": frame["reply"].nunique() / len(frame),
           "distinct posts": frame.drop_duplicates("conversation_id")["tweet"].nunique() / len(per_post),
           "retweets zero share": (frame["reply_retweets"] == 0).mean()}
    row |= {f"likes p{q}": likes.quantile(q / 100) for q in (50, 90, 95, 99)}
    for column in CONFOUNDS:
        row |= {f"{column} p{q}": frame[column].quantile(q / 100) for q in (10, 50, 90)}
    return {name: float(value) for name, value in row.items()}


def confounds(frame: pd.DataFrame) -> dict[str, float]:
    """Spearman correlation of reply_likes with each confound, and with the length in words."""
    row = {f"spearman likes, {c}": spearmanr(frame[c], frame["reply_likes"])[0] for c in CONFOUNDS}
    row["spearman likes, words"] = spearmanr(frame["reply"].str.split().str.len(), frame["reply_likes"])[0]
    return {name: float(value) for name, value in row.items()}


def gold_by_strategy(frame: pd.DataFrame, gold: np.ndarray) -> dict[str, float]:
    """Mean gold of each strategy, and the share of posts (5 or more replies) whose best reply is of it."""
    table = frame.assign(gold=gold)
    row = {f"mean gold, {name}": value for name, value in table.groupby("strategy")["gold"].mean().items()}
    large = table[table.groupby("conversation_id")["gold"].transform("size") >= 5]
    best = large.loc[large.groupby("conversation_id")["gold"].idxmax(), "strategy"].value_counts(normalize=True)
    row |= {f"best reply of the post, {name}": value for name, value in best.items()}
    row["spearman likes, gold"] = spearmanr(frame["reply_likes"], gold)[0]
    return {name: float(value) for name, value in row.items()}


def main() -> None:
    """Print the table; write it with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pheme", type=Path, help="pheme_rnr.jsonl.gz; without it only the simulator is measured")
    parser.add_argument("--conversations", type=int, default=5235, help="simulated posts (default: PHEME's number)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gold", default="a", choices=["a", "b"], help="which gold appeal the likes follow")
    parser.add_argument("--splits", type=int, default=3, help="random halvings to average over")
    parser.add_argument("--out", type=Path, help="write the table as csv (columns quantity, simulator, pheme)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    simulated = add_meta(simulate_pairs(arguments.conversations, arguments.seed, World(gold=arguments.gold)))
    drawn = time.perf_counter()
    gold = gold_of(simulated)(simulated["tweet"], simulated["reply"])
    print(f"simulated in {drawn - started:.1f} s, gold in {time.perf_counter() - drawn:.1f} s")
    columns = {"simulator": margins(simulated) | confounds(simulated) | circumstances_within_posts(simulated)
               | difficulty(simulated, arguments.seed, arguments.splits, gold) | gold_by_strategy(simulated, gold)}
    if arguments.pheme:
        real = load_pheme(arguments.pheme)
        columns["pheme"] = (margins(real) | confounds(real) | circumstances_within_posts(real)
                            | difficulty(real, arguments.seed, arguments.splits))
    table = pd.DataFrame(columns).rename_axis("quantity")
    table = table.reindex(columns["simulator"])
    with pd.option_context("display.max_rows", None, "display.width", 120):
        print(table.map("{:,.3f}".format).replace("nan", "").to_string())
    if arguments.out:
        table.to_csv(arguments.out, float_format="%.4f")


if __name__ == "__main__":
    main()
