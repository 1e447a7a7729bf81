"""Text-only ways to order replies to one post, cross-fitted over all conversations of a file of pairs.

    python benchmarks/pheme_crossfit.py PAIRS.jsonl.gz OUT.csv [--folds 5] [--seed 0]
                                       [--language-model NAME] [--ways W]

Every score is out of fold (folds are conversations). Accuracy is over clear pairs, as they are and with every post
weighted equally; intervals resample conversations. The pair models are logistic regressions on differences of
features, posts weighted equally; `by ratio` weights a pair by the logarithm of its ratio of likes besides. Strengths
of the ridge are chosen by an inner fold of the training conversations. `stack` is a logistic regression of the out-
of-fold scores, cross-fitted again with the same folds: its inputs for a training row come from models that saw the
judged fold, which flatters it if anything. `language model` reads the replies (up to 64 tokens, without their posts)
with a frozen language model: the mean of its states after two thirds of its layers. Rows are written as they come, so
that a run that is stopped leaves what it had; --ways names those to fit (without `stack`), whose rows go into OUT.csv
beside the others that are there.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from grpo_engage.base.core import child_seed, say, write_csv
from grpo_engage.data.reading import read_pairs
from grpo_engage.rewards.circumstances import engagement
from grpo_engage.rewards.heuristic import clear_pairs, pairwise_accuracy
from grpo_engage.stats.intervals import cluster_bootstrap
from grpo_engage.text.embedding import HashingBackbone, embed, text_features

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
PAIRS_PER_POST = 200


def kept_pairs(higher: np.ndarray, codes: np.ndarray, seed: int) -> np.ndarray:
    """Positions of at most PAIRS_PER_POST pairs of each post."""
    random = np.random.default_rng(child_seed(seed, "kept pairs"))
    shuffled = pd.Series(codes[higher]).sample(frac=1, random_state=int(random.integers(2**31)))
    return np.sort(shuffled.groupby(shuffled).head(PAIRS_PER_POST).index.to_numpy())


def pair_fit(features, higher, lower, weight, strength, seed) -> np.ndarray:
    """Coefficients (p,) of the pair model; every second pair is turned round, so that there are two classes."""
    turned = np.where(np.arange(len(higher)) % 2, 1, -1)
    difference = features[higher] - features[lower]
    difference = (sparse.diags(turned) @ difference).tocsr() if sparse.issparse(difference) else (
        difference * turned[:, None])
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=200, random_state=seed)
    return model.fit(difference, turned > 0, sample_weight=weight / weight.mean()).coef_[0]


def cross_fitted(make, codes, fold, pairs, weight, seed, strengths=STRENGTHS) -> np.ndarray:
    """Out-of-fold scores (n,); make(train) -> features (n, p), fitted on the rows `train` alone."""
    higher, lower = pairs
    scores = np.zeros(len(codes))
    for number in range(fold.max() + 1):
        train = fold != number
        features, inside = make(train), train[higher]
        inner = fold[higher] == (number + 1) % (fold.max() + 1)
        first, second = inside & ~inner, inside & inner
        losses = []
        for strength in strengths if len(strengths) > 1 else ():
            own = features @ pair_fit(features, higher[first], lower[first], weight[first], strength, seed)
            loss = np.logaddexp(0, own[lower[second]] - own[higher[second]])
            losses.append(np.average(loss, weights=weight[second]))
        strength = strengths[int(np.argmin(losses))] if losses else strengths[0]
        chosen = features @ pair_fit(features, higher[inside], lower[inside], weight[inside], strength, seed)
        scores[~train] = chosen[~train]
    return scores


def language_states(replies: list[str], name: str, wanted: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Mean state of each reply's tokens after two thirds of the layers, (n, width); 0 where not `wanted` (n,)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from grpo_engage.policy.base_models import ensure_policy

    folder = str(ensure_policy(name))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    model.layers = model.layers[: round(len(model.layers) * 2 / 3)]
    model.norm = torch.nn.Identity()  # belongs behind the last layer
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "right"
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort([len(replies[row]) for row in rows])]
    states = np.zeros((len(replies), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for part in np.array_split(rows, max(1, len(rows) // batch_size)):
            read = tokenizer([replies[row] or " " for row in part], return_tensors="pt", padding=True, truncation=True,
                             max_length=64)
            mask = read["attention_mask"][..., None]
            state = model(**read).last_hidden_state
            states[part] = ((state * mask).sum(dim=1) / mask.sum(dim=1)).numpy()
    return states


def judged(way: str, scores: np.ndarray, codes, pairs, length: np.ndarray, seed: int, seconds: float) -> dict:
    """One row of the table: accuracy over clear pairs and with posts weighted equally, and gain over length."""
    correct, posts = pairwise_accuracy(scores, *pairs), codes[pairs[0]]
    accuracy, low, high = cluster_bootstrap(correct, posts, seed=seed)
    by_post = pd.Series(correct).groupby(posts).mean()
    equal, equal_low, equal_high = cluster_bootstrap(by_post.to_numpy(), by_post.index.to_numpy(), seed=seed)
    gain = pd.Series(correct - pairwise_accuracy(length, *pairs)).groupby(posts).mean()
    more, more_low, more_high = cluster_bootstrap(gain.to_numpy(), gain.index.to_numpy(), seed=seed)
    say(f"{way}: {accuracy:.3f} [{low:.3f}, {high:.3f}], posts equal {equal:.3f}, over length {more:+.3f} "
        f"[{more_low:+.3f}, {more_high:+.3f}], {seconds:.0f} s")
    return {"way": way, "accuracy": accuracy, "ci_low": low, "ci_high": high, "posts_equal": equal,
            "posts_equal_low": equal_low, "posts_equal_high": equal_high, "over_length": more,
            "over_length_low": more_low, "over_length_high": more_high, "clear_pairs": len(correct),
            "posts": len(by_post), "seconds": round(seconds)}


def beside(given: argparse.Namespace, rows: list[dict]) -> pd.DataFrame:
    """`rows`, and with --ways the other rows of the file that is there, `stack` last."""
    table = pd.DataFrame(rows)
    if given.ways and given.out.exists():
        old = pd.read_csv(given.out)
        table = pd.concat([old[~old["way"].isin(table["way"])], table], ignore_index=True)
    return table.sort_values("way", key=lambda way: way == "stack", kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language-model", default="", help="smollm2-135m or a folder; read once, ten minutes or more")
    parser.add_argument("--ways", nargs="+", default=[], help="fit these alone")
    given = parser.parse_args()
    table = read_pairs(given.pairs)[0]
    likes = engagement(table)
    table = table[np.isfinite(likes)].reset_index(drop=True)
    likes = likes[np.isfinite(likes)]
    codes = pd.factorize(table["conversation_id"])[0]
    shuffled = np.random.default_rng(child_seed(given.seed, "folds")).permutation(codes.max() + 1)
    fold = (shuffled % given.folds)[codes]
    every = clear_pairs(codes, likes)
    kept = kept_pairs(every[0], codes, given.seed)
    pairs = every[0][kept], every[1][kept]
    equal = 1 / np.bincount(codes[pairs[0]], minlength=codes.max() + 1)[codes[pairs[0]]]
    ratio = equal * np.log((likes[pairs[0]] + 1) / (likes[pairs[1]] + 1))
    posts, replies = table["tweet"].tolist(), table["reply"].tolist()
    say(f"{len(table)} replies, {len(every[0])} clear pairs, {len(kept)} to train on")
    surface = text_features(replies)
    length = surface[:, 0]

    def tfidf(train):
        words = TfidfVectorizer(sublinear_tf=True, min_df=3, ngram_range=(1, 2))
        runs = TfidfVectorizer(sublinear_tf=True, min_df=3, analyzer="char_wb", ngram_range=(3, 5))
        known = [replies[row] for row in np.flatnonzero(train)]
        return sparse.hstack([maker.fit(known).transform(replies) for maker in (words, runs)], format="csr")

    def with_vectors(vectors, train):
        reply, post = vectors
        values = np.hstack([reply, reply * post * reply.shape[1] ** 0.5, surface])
        return (values - values[train].mean(axis=0)) / (values[train].std(axis=0) + 1e-6)

    def hashing(train):
        known = [replies[row] for row in np.flatnonzero(train)]
        backbone = HashingBackbone().fit(known, given.seed)
        return with_vectors((backbone.encode(replies), backbone.encode(posts)), train)

    minilm = (embed(replies), embed(posts)) if not given.ways or any("minilm" in way for way in given.ways) else None
    dense = (1e-4, 1e-3, 1e-2)
    makers = {"surface": (lambda train: with_vectors((surface, np.zeros_like(surface)), train), equal, STRENGTHS),
              "minilm": (lambda train: with_vectors(minilm, train), equal, dense),
              "minilm by ratio": (lambda train: with_vectors(minilm, train), ratio, dense),
              "hashing": (hashing, equal, dense),
              "tuned TF-IDF": (tfidf, equal, STRENGTHS[1:]),
              "tuned TF-IDF by ratio": (tfidf, ratio, STRENGTHS[1:])}
    if given.language_model:
        in_pairs = np.isin(np.arange(len(replies)), np.concatenate(every))
        states = language_states(replies, given.language_model, in_pairs)
        say(f"{int(in_pairs.sum())} replies read by {given.language_model}")

        def read(train):
            own = train & in_pairs
            return np.hstack([(states - states[own].mean(axis=0)) / (states[own].std(axis=0) + 1e-6),
                              (surface - surface[own].mean(axis=0)) / (surface[own].std(axis=0) + 1e-6)])

        makers |= {"language model": (read, equal, (1e-5, *dense)),
                   "language model by ratio": (read, ratio, (1e-5, *dense))}
    if given.ways:
        makers = {way: makers[way] for way in given.ways}
    found, rows = {"length": length}, [judged("length", length, codes, every, length, given.seed, 0.0)]
    for way, (make, weight, strengths) in makers.items():
        start = time.perf_counter()
        found[way] = cross_fitted(make, codes, fold, pairs, weight, given.seed, strengths)
        rows.append(judged(way, found[way], codes, every, length, given.seed, time.perf_counter() - start))
        write_csv(given.out, beside(given, rows))
    if given.ways:
        return
    scores = np.column_stack([rankdata(values) / len(values) for values in found.values()])
    stacked = cross_fitted(lambda train: scores, codes, fold, pairs, equal, given.seed, (1.0,))
    rows.append(judged("stack", stacked, codes, every, length, given.seed, 0.0))
    write_csv(given.out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
