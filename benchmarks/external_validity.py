"""Do rewards rank as on real replies as in the simulator? engage-bench's rewards, learned anew from a file of pairs.

    python benchmarks/external_validity.py PAIRS.jsonl.gz [OUT] [--folds 5]

Each entry of benchmarks/engage_bench/baselines.py that learns, and random and length, is fitted on four folds of the
posts and scores the replies to the fifth, in PAIRS and in the release's default world. Both worlds have three figures:
accuracy on clear pairs, and Spearman's correlation among replies to one post with their likes, and with what
circumstances (followers, delay, place) leave of likes. In the simulator gold's is beside them. OUT: entries.csv, a row
an entry, and agreement.csv, rank correlations over the entries between columns; intervals over posts, the entries
fixed. Numbers alone are written, no text.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_engage.base.core import REPO_ROOT, child_seed, say, write_csv
from grpo_engage.bench.release import read_part
from grpo_engage.bench.simulated import SEEN
from grpo_engage.bench.within_posts import N_BOOT, of_sums, rank_sums
from grpo_engage.data.reading import read_pairs
from grpo_engage.evaluation.ladder import rank_correlation, resampled, with_interval
from grpo_engage.rewards.circumstances import engagement
from grpo_engage.rewards.heuristic import clear_pairs, pairwise_accuracy
from grpo_engage.text.embedding import embed

sys.path.insert(0, str(REPO_ROOT / "benchmarks" / "engage_bench"))
import baselines as entries

WORLD = "a default"


VECTORS: dict[str, np.ndarray] = {}


def sentences(posts: list[str], replies: list[str]) -> np.ndarray:
    """`entries.sentences`, with every text read once, since each is in four folds' training: (n, 768)."""
    if unread := [text for text in dict.fromkeys([*posts, *replies]) if text not in VECTORS]:
        VECTORS.update(zip(unread, embed(unread), strict=True))
    ours, theirs = (np.array([VECTORS[text] for text in texts]) for texts in (replies, posts))
    return np.hstack([ours, ours * theirs]) * np.sqrt(ours.shape[1])


def learn_embeddings(train: pd.DataFrame, posts: list[str], replies: list[str]) -> np.ndarray:
    """As the entry `embeddings`, from other rows."""
    weights = entries.learned_within(train, sentences(train["tweet"].tolist(), train["reply"].tolist()))
    return sentences(posts, replies) @ weights


LEARNERS = {"random": entries.learn_random, "length": entries.learn_length, "naive": entries.learn_naive,
            "between": entries.learn_between, "ngrams": entries.learn_within, "embeddings": learn_embeddings}


def left_of_likes(rows: pd.DataFrame) -> np.ndarray:
    """Log likes less what circumstances explain of them among replies to the same post, (n,)."""
    posts, likes = rows["conversation_id"].to_numpy(), np.log1p(rows["reply_likes"].to_numpy(float))
    table = pd.DataFrame(entries.circumstances(rows)).assign(likes=likes)
    table -= table.groupby(posts).transform("mean")
    known, likes = table.drop(columns="likes").to_numpy(), table["likes"].to_numpy()
    return likes - known @ np.linalg.lstsq(known, likes, rcond=None)[0]


def figures(scores: np.ndarray, rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Figure -> its values over posts drawn again, the first of all posts: (1 + n,)."""
    posts = pd.factorize(rows["conversation_id"])[0]
    truths = {"likes": rows["reply_likes"].to_numpy(), "likes_left": left_of_likes(rows)}
    if "gold" in rows:
        truths["gold"] = rows["gold"].to_numpy()
    found = {name: of_sums(rank_sums(scores, truth, posts)) for name, truth in truths.items()}
    higher, lower = clear_pairs(posts, rows["reply_likes"])
    right = pairwise_accuracy(scores, higher, lower)
    values = right, np.ones(len(right))
    sums = np.column_stack([np.bincount(posts[higher], value, posts.max() + 1) for value in values])
    # the posts that `of_sums` draws, so that figures of one world are drawn together
    correct, pairs = (resampled(len(sums), N_BOOT, child_seed(0, "engage-bench", "posts")) @ sums).T
    return found | {"clear_pairs": correct / pairs}


def simulated() -> pd.DataFrame:
    """The release's rows to learn from, as they were seen in the default world, with gold."""
    replies = read_part("replies")
    seen = read_part("worlds").query("world == @WORLD").set_index("row")[SEEN]
    return replies.loc[seen.index].join(seen).rename(columns={"gold_a": "gold"}).reset_index(drop=True)


def real(path: Path) -> pd.DataFrame:
    """The rows of a file of pairs whose likes and circumstances are known."""
    rows = read_pairs(path)[0]
    known = np.isfinite(engagement(rows)) & np.isfinite(rows[SEEN].to_numpy(float)).all(axis=1)
    say(f"{known.sum()} of {len(rows)} replies have likes and circumstances")
    return rows[known].reset_index(drop=True)


def cross_fitted(rows: pd.DataFrame, folds: int) -> dict[str, np.ndarray]:
    """Each learner's scores, every reply's from a fit on the other folds' posts."""
    codes = pd.factorize(rows["conversation_id"])[0]
    fold = (np.random.default_rng(child_seed(0, "folds")).permutation(codes.max() + 1) % folds)[codes]
    scores = {}
    for name, learn in LEARNERS.items():
        scores[name] = np.zeros(len(rows))
        for number in range(folds):
            train, test = rows[fold != number].reset_index(drop=True), rows[fold == number]
            scores[name][fold == number] = learn(train, test["tweet"].tolist(), test["reply"].tolist())
        say(f"{name}: {folds} folds done")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=REPO_ROOT / "benchmarks" / "external_validity")
    parser.add_argument("--folds", type=int, default=5)
    given = parser.parse_args()
    draws, rows, n_posts = {}, [], {}
    for world, replies in {"simulator": simulated(), "real": real(given.pairs)}.items():
        n_posts[world] = replies["conversation_id"].nunique()
        for name, values in cross_fitted(replies, given.folds).items():
            for figure, drawn in figures(values, replies).items():
                draws[name, world, figure] = drawn
    for name in LEARNERS:
        row = {"entry": name}
        for (entry, world, figure), drawn in draws.items():
            if entry == name:
                value, low, high = with_interval(drawn, n_posts[world])
                row |= {f"{world}_{figure}": value, f"{world}_{figure}_low": low, f"{world}_{figure}_high": high}
        rows.append(row)
    table = pd.DataFrame(rows)
    write_csv(given.out / "entries.csv", table.round(4))
    pairs = [("simulator", "gold", "real", "clear_pairs"), ("simulator", "gold", "real", "likes"),
             ("simulator", "gold", "real", "likes_left"), ("simulator", "clear_pairs", "real", "clear_pairs"),
             ("simulator", "likes", "real", "likes"), ("simulator", "gold", "simulator", "clear_pairs")]
    agreement = []
    for first_world, first, second_world, second in pairs:
        a, b = (np.array([draws[name, world, figure] for name in LEARNERS])
                for world, figure in ((first_world, first), (second_world, second)))
        drawn = rank_correlation(a.T, b.T)
        low, high = np.quantile(drawn[1:], [0.025, 0.975])
        learned = rank_correlation(a[1:].T, b[1:].T)[0]  # random is last in both worlds by what it is
        agreement.append({"first": f"{first_world} {first}", "second": f"{second_world} {second}",
                          "spearman": drawn[0], "ci_low": low, "ci_high": high, "without_random": learned,
                          "entries": len(LEARNERS)})
    write_csv(given.out / "agreement.csv", pd.DataFrame(agreement).round(4))
    say(f"{given.out}: {len(table)} entries, {n_posts}")


if __name__ == "__main__":
    main()
