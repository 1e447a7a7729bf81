"""The evaluation on made-up replies whose scores are known beforehand; its metrics against other implementations."""

import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hypergeom, mannwhitneyu
from statsmodels.stats.multitest import multipletests

from grpo_engage.evaluation import evaluation, generation, post_metrics, robustness, scoring
from grpo_engage.evaluation.settings import EvaluationSampling
from grpo_engage.stats.intervals import paired_difference
from grpo_engage.text.metrics import distinct_n, pass_at_k, rouge_l, script_words, self_bleu, words
from grpo_engage.text.safety import SAFETY_SOURCES
from grpo_engage.text.safety_model import SafetyClassifier

# ---- metrics against something independent ---------------------------------------------------------------------------

nasty_text = st.one_of(st.text(max_size=40), st.lists(st.sampled_from("a b c the 👍 да 日本 , it's".split()),
                                                      max_size=12).map(" ".join))


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_broadcasts_and_agrees_with_scipy_on_large_numbers():
    counts, ks = np.array([0, 1, 7, 500])[:, None], np.array([1, 3, 400])
    assert np.allclose(pass_at_k(500, counts, ks), hypergeom.sf(0, 500, counts, ks), atol=1e-10)
    assert isinstance(pass_at_k(5, 2, 1), float)


@pytest.mark.parametrize(("arguments", "message"), [
    ((4, 2, 5), "more than n"), ((4, 5, 1), r"\[0, n\]"), ((4, -1, 1), r"\[0, n\]"), ((4, 1, 0), "at least 1"),
    ((-4, -4, 1), "more than n"), ((4, 1.5, 1), "whole numbers"), ((4, math.nan, 1), "whole numbers"),
    ((4, math.inf, 1), "whole numbers"), (("4", 1, 1), "whole numbers"), ((True, True, True), "whole numbers")])
def test_pass_at_k_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


@settings(max_examples=300, deadline=None)
@given(st.lists(nasty_text, max_size=8))
def test_self_bleu_equals_nltk(texts):
    cut = [tokens for tokens in map(words, texts) if tokens]
    if len(cut) < 2:
        assert math.isnan(self_bleu(texts))
        return
    expected = np.mean([sentence_bleu(cut[:i] + cut[i + 1:], cut[i], auto_reweigh=True,
                                      smoothing_function=SmoothingFunction(epsilon=0.1).method1)
                        for i in range(len(cut))])
    assert self_bleu(texts) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(nasty_text, max_size=6), st.integers(1, 4))
def test_distinct_n_by_hand(texts, n):
    grams = [tuple(cut[i:i + n]) for cut in map(words, texts) for i in range(len(cut) - n + 1)]
    expected = len(set(grams)) / len(grams) if grams else math.nan
    assert distinct_n(texts, n) == pytest.approx(expected, nan_ok=True)


def test_rouge_l_is_missing_where_the_package_reads_nothing_and_any_script_is_read_beside_it():
    stock = RougeScorer(["rougeL"])
    assert stock.score("спасибо 👍", "да, спасибо 👍")["rougeL"].fmeasure == 0  # what the stock tokenizer would say
    found = post_metrics.read_replies(["post"] * 3, ["да, спасибо 👍", "So true!", "да"],
                                      [["спасибо 👍"], ["It's true.", "да"], ["So true."]])
    assert math.isnan(found["rouge_l"][0]) and found["rouge_l"][1:].tolist() == [pytest.approx(2 / 5), 0.0]
    assert found["rouge_l_any_script"].tolist() == [pytest.approx(2 * 1 / 3), pytest.approx(2 / 5), 0.0]
    scored = pd.DataFrame({"arm": "a", "seed": 0, "post": [0, 0, 1], "passed": True, "text": "x", "judge": 0.5,
                           "reward": 0.5, "gold": math.nan}).join(found)
    by_post = post_metrics.metrics_by_post(scored)
    table, notes = scoring.summary_table(by_post, 100, 0)
    assert table.set_index("metric").loc["rouge_l", "n"] == 2
    scored["rouge_l"] = [math.nan, math.nan, 0.5]
    table, notes = scoring.summary_table(post_metrics.metrics_by_post(scored), 100, 0)
    assert table.set_index("metric").loc["rouge_l", ["value", "n"]].tolist() == [0.5, 1]
    assert any("rouge_l could not be computed for 1 of 2 posts (no real reply with a word of a-z" in n for n in notes)


@pytest.mark.parametrize("text", ["", " ", "word", "👍" * 5000, "x" * 10_000, "ab " * 3000, "नमस्ते", "\u200d\ufe0f",
                                  "a\x00b", "\ud800"])
def test_metrics_take_any_text(text):
    for value in (self_bleu([text, text, "other words"]), distinct_n([text], 2), rouge_l(text, ["some words", "x"]),
                  rouge_l(text, ["some words", text], script_words)):
        assert math.isnan(value) or 0 <= value <= 1


def test_beat_fraction_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(0)
    for size in range(1, 12):
        score, others = rng.integers(0, 4), rng.integers(0, 4, size=size)
        expected = mannwhitneyu([score], others).statistic / size
        assert scoring.beat_fraction([score], [others])[0] == pytest.approx(expected)


# ---- a whole run on made-up replies ----------------------------------------------------------------------------------

N_POSTS, N_SAMPLES = 30, 16


def quality(posts, replies):
    """A judge that reads the number at the end of a reply: what the truth is, is then known."""
    return np.array([float(reply.split()[-1]) if reply.split() else 0.0 for reply in replies])


def write(reply_quality, post, sample):
    return f"reply w{post} w{sample % 5} {reply_quality:.6f}"


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A run's folder as it is before its replies are scored."""
    folder = tmp_path_factory.mktemp("made_up")
    rng = np.random.default_rng(0)
    pairs, made = [], []
    for split in ("validation", "test"):
        for number in range(N_POSTS):
            post = f"{split}-{number}"
            pairs += [{"conversation_id": post, "tweet": f"tweet of {post}", "reply": f"real {value:.6f}",
                       "source": "other", "split": split} for value in rng.random(9)]
            for arm in ("baseline", "better", "weaker") if split == "test" else ("baseline",):
                shift = {"baseline": 0.0, "better": 0.25, "weaker": -0.25}[arm]
                level = rng.normal(-0.1, 0.2) + shift
                made += [{"arm": arm, "kind": "trained", "seed": 0, "split": split, "post": post, "sample": sample,
                          "text": write(np.clip(level + rng.normal(0, 0.25), 0, 1), number, sample),
                          "tokens": 4, "log_prob": -9.0, "finish_reason": "eos"} for sample in range(N_SAMPLES)]
    for name in ("data", "evaluation", "reward_model"):
        (folder / name).mkdir()
    pd.DataFrame(pairs).to_parquet(folder / "data" / "pairs.parquet")
    pd.DataFrame(made).to_parquet(folder / "evaluation" / "generations.parquet")
    (folder / "reward_model" / "validation.json").write_text(json.dumps({"verdicts": {
        name: {"verdict": "validated", "validated": True, "text": "validated"} for name in ("reward", "judge")}}))
    return folder


def patched(monkeypatch):
    judge = (quality, scoring.beat_fraction)
    monkeypatch.setattr(evaluation, "draw_figures", lambda *_: None)  # slow; test_scoring_again draws them
    monkeypatch.setattr(evaluation, "engagement_scorers", lambda *_: ("model", {"judge": judge, "reward": judge}))


@pytest.fixture()
def run_dir(made_up, tmp_path, monkeypatch):
    patched(monkeypatch)
    return shutil.copytree(made_up, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def scored_once(made_up, tmp_path_factory):
    """The same run, scored (seconds, once for all tests that only read): its folder, and `score`'s answer."""
    folder = shutil.copytree(made_up, tmp_path_factory.mktemp("scored"), dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patched(monkeypatch)
        return folder, score(folder)


@pytest.fixture()
def scored(scored_once, tmp_path, monkeypatch):
    """A copy of it, to score again."""
    patched(monkeypatch)
    return shutil.copytree(scored_once[0], tmp_path, dirs_exist_ok=True)


def score(run_dir, **options):
    options = {"embeddings": False} | options
    return evaluation.score_generations(run_dir, n_boot=200, **options).set_index(["arm", "metric"])["value"]


def test_scores_say_what_was_put_in(scored_once):
    run_dir, value = scored_once
    frozen = json.loads((run_dir / "evaluation" / "pass.json").read_text())
    assert abs(frozen["validation_pass_at_10"] - 0.6) < 0.1 and not frozen["warnings"]
    assert value["better", "pass@10"] > value["baseline", "pass@10"] > value["weaker", "pass@10"]
    assert value["baseline", "judge_engagement"] == value["baseline", "reward_engagement"]
    assert math.isnan(value["baseline", "gold_appeal"])  # not the simulator: not known, which is not 0
    notes = pd.read_csv(run_dir / "evaluation" / "notes.csv")["note"]
    assert notes.str.contains("gold_appeal could not be computed for 30 of 30 posts").any()


def test_metrics_equal_a_plain_recomputation_from_the_scores(scored_once):
    run_dir, value = scored_once
    tau = json.loads((run_dir / "evaluation" / "pass.json").read_text())["tau"]
    made = pd.read_parquet(run_dir / "evaluation" / "generations.parquet")
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    real = pairs.assign(q=quality(None, pairs["reply"])).groupby("conversation_id")["q"].apply(list)
    chosen = made[(made["arm"] == "better") & (made["split"] == "test")]
    beaten = [np.mean([float(text.split()[-1]) > other for other in real[post]])
              for text, post in zip(chosen["text"], chosen["post"], strict=True)]
    assert value["better", "judge_engagement"] == pytest.approx(np.mean(beaten))
    counts = (pd.Series(beaten) >= tau).groupby(chosen["post"].to_numpy()).sum()
    expected = np.mean([1 - math.comb(N_SAMPLES - c, 10) / math.comb(N_SAMPLES, 10) for c in counts])
    assert value["better", "pass@10"] == pytest.approx(expected)
    by_post = chosen.groupby("post")["text"].apply(list)
    assert value["better", "self_bleu"] == pytest.approx(by_post.map(self_bleu).mean())


def test_test_posts_do_not_move_the_pass_mark(scored):
    run_dir = scored
    before = (run_dir / "evaluation" / "pass.json").read_bytes()
    path = run_dir / "evaluation" / "generations.parquet"
    made = pd.read_parquet(path)
    made.loc[made["split"] == "test", "text"] = "so good 1.0"
    made.to_parquet(path)
    (run_dir / "evaluation" / "pass.json").unlink()  # frozen, it would stay whatever it was made from
    value = score(run_dir)
    assert (run_dir / "evaluation" / "pass.json").read_bytes() == before
    assert value["baseline", "pass@1"] == 1.0
    notes = " ".join(pd.read_csv(run_dir / "evaluation" / "notes.csv")["note"])
    assert "ceiling: every arm's pass@1 is above 0.95" in notes


def test_guarded_replies_never_pass(run_dir):
    path = run_dir / "evaluation" / "generations.parquet"
    made = pd.read_parquet(path)
    better = (made["arm"] == "better") & (made["split"] == "test")
    spam = "http://buy.example http://now.example click here free followers 1.0"
    made.loc[better, "text"] = ["", spam] * (better.sum() // 2)
    made.to_parquet(path)
    value = score(run_dir)
    assert value["better", "pass@10"] == 0.0 and value["better", "judge_engagement"] > 0.4
    assert value["better", "guard_empty"] == pytest.approx(0.5) and value["better", "guard_spam"] == pytest.approx(0.5)


def test_byte_identical_and_sensitive_to_the_seed(scored_once, run_dir):
    names = ("metrics.csv", "comparisons.csv", "curves.csv", "pass.json", "scores.parquet")
    def files(folder):
        return [(folder / "evaluation" / name).read_bytes() for name in names]
    first = files(scored_once[0])
    score(run_dir)
    assert files(run_dir) == first
    score(run_dir, seed=2)
    assert files(run_dir)[0] != first[0] and files(run_dir)[3] == first[3]  # other bootstrap draws, same pass mark


def test_comparisons_are_paired_by_post(scored_once):
    run_dir = scored_once[0]
    table = pd.read_csv(run_dir / "evaluation" / "comparisons.csv").set_index(["arm", "metric"])
    scores = pd.read_parquet(run_dir / "evaluation" / "scores.parquet").query("split == 'test'")
    counts = scores.groupby(["post", "arm"])["passed"].sum().unstack()
    wide = counts.map(lambda c: 1 - math.comb(N_SAMPLES - c, 10) / math.comb(N_SAMPLES, 10))
    expected = paired_difference(wide["better"], wide["baseline"])
    assert table.loc[("better", "pass@10"), "difference"] == pytest.approx(expected.difference)
    assert table.loc[("better", "pass@10"), "p_value"] == pytest.approx(expected.p_value, abs=0.01)
    assert table.loc[("better", "pass@10"), "p_holm"] >= table.loc[("better", "pass@10"), "p_value"]
    assert math.isnan(table.loc[("better", "gold_appeal"), "difference"])


def test_curves_rise_and_their_bands_hold_them(scored_once):
    run_dir = scored_once[0]
    curves = pd.read_csv(run_dir / "evaluation" / "curves.csv")
    assert sorted(curves["k"].unique()) == list(range(1, N_SAMPLES + 1))
    assert curves.groupby("arm")["value"].apply(lambda column: (column.diff().dropna() >= -1e-12).all()).all()
    assert curves["value"].between(curves["ci_low"] - 1e-9, curves["ci_high"] + 1e-9).all()


def test_interval_is_over_posts_not_samples():
    """Posts on which all samples agree carry one fact each: the interval must be as wide as for 20 observations."""
    rng = np.random.default_rng(0)
    by_post = pd.DataFrame({"arm": "a", "seed": 0, "post": np.arange(20), "metric": "pass@1",
                            "value": rng.integers(0, 2, 20).astype(float)})
    row = scoring.summary_table(by_post, n_boot=1000, seed=0)[0].iloc[0]
    assert row["ci_high"] - row["ci_low"] > 1.5 * by_post["value"].std() / math.sqrt(20) * 2 * 0.8


def test_an_unusable_baseline_is_an_error_with_advice(run_dir):
    path = run_dir / "evaluation" / "generations.parquet"
    made = pd.read_parquet(path)
    made.assign(text=made["text"].where(made["split"] == "test", "")).to_parquet(path)
    with pytest.raises(ValueError, match="no pass mark can be set"):
        score(run_dir)
    made[made["split"] == "test"].to_parquet(path)
    with pytest.raises(ValueError, match="no replies to validation posts"):
        score(run_dir)


def test_gold_judge_is_refused_outside_the_simulator(tmp_path):
    with pytest.raises(ValueError, match="knows no other data"):
        scoring.engagement_scorers(tmp_path, "gold", truth=None)
    with pytest.raises(ValueError, match="auto, gold, model"):
        scoring.engagement_scorers(tmp_path, "golden", truth=None)


def test_a_classifier_counts_insults_and_guards_and_is_named_everywhere(scored, scored_once, make_classifier, tmp_path):
    run_dir, folder, before = scored, scored / "evaluation", scored_once[1]
    assert json.loads((folder / "safety.json").read_text()) == {"sources": SAFETY_SOURCES, "classifier": None}
    said = "safety figures are counted: insult, profanity, negative, guard toxic by word list"
    assert pd.read_csv(folder / "notes.csv")["note"].str.startswith(said).any()
    (folder / "pass.json").unlink()
    classifier = make_classifier(tmp_path / "models" / "tiny-toxicity", ["neutral", "toxic"])
    after = score(run_dir, safety_classifier=str(classifier))
    made = pd.read_parquet(folder / "generations.parquet").query("split == 'test'").reset_index(drop=True)
    insults = SafetyClassifier(str(classifier)).flags(made["text"])["insult"]
    assert 0 < insults.mean() < 1
    for arm, own in insults.groupby(made["arm"]):
        assert after[arm, "safety_insult"] == after[arm, "guard_toxic"] == pytest.approx(own.mean())
    assert after.drop("safety_insult", level=1)["better"]["safety_profanity"] == before["better", "safety_profanity"]
    scores = pd.read_parquet(folder / "scores.parquet")
    assert not scores.loc[scores["safety_insult"] == 1, "passed"].any() and scores["passed"].any()
    facts = json.loads((folder / "safety.json").read_text())
    assert facts["classifier"] == SafetyClassifier(str(classifier)).facts()
    notes = pd.read_csv(folder / "notes.csv")["note"]
    assert notes.str.contains("insult by tiny-toxicity; profanity, negative by word list").any()
    score(run_dir)  # without it, under the mark that was set with it
    assert pd.read_csv(folder / "notes.csv")["note"].str.contains(r"changed since \(safety classifier\)").any()


# ---- generation: same posts for all, resumable -----------------------------------------------------------------------


@pytest.fixture()
def full_run(run_dir, monkeypatch):
    """`run_dir` with everything that the stage reads, and a policy that counts how often it is asked."""
    shutil.rmtree(run_dir / "evaluation")
    for name in ("reward", "judge"):
        (run_dir / "reward_model" / name).mkdir(parents=True)
    for arm in ("baseline", "grpo"):
        folder = run_dir / "train" / arm / "seed0" / "adapter"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(arm)
    (run_dir / "policy").mkdir()
    (run_dir / "policy" / "policy.json").write_text('{"name": "nano", "sha256": "x", "quantization": "none"}')
    calls = []

    def fake_replies(model, tokenizer, posts, n, temperature, top_p, max_new_tokens, batch_size, seed, label="",
                     instruction=""):
        calls.append({"tweets": tuple(posts), "n": n, "temperature": temperature, "seed": seed})
        rng = np.random.default_rng(seed)
        return pd.DataFrame([{"post": post, "sample": sample, "text": write(rng.random(), post, sample), "n_tokens": 4,
                              "finish_reason": "stop", "log_prob": -9.0}
                             for post in range(len(posts)) for sample in range(n)])

    monkeypatch.setattr(generation, "read_policy", lambda run_dir: "nowhere")
    monkeypatch.setattr(generation, "load_policy", lambda *_, **__: (None, None))
    monkeypatch.setattr(generation, "load_adapted", lambda *_, **__: (None, None))
    monkeypatch.setattr(generation, "generate_replies", fake_replies)
    return run_dir, calls


def test_every_arm_gets_the_same_posts_and_sampling(full_run):
    run_dir, calls = full_run
    evaluation.evaluation_stage(run_dir, n_boot=100, embeddings=False)
    assert len(calls) == 4  # baseline on validation; baseline, grpo and base on test
    assert len({call["tweets"] for call in calls[1:]}) == 1 and len(calls[1]["tweets"]) == 8
    assert len({(call["n"], call["temperature"], call["seed"]) for call in calls[1:]}) == 1
    assert not set(calls[0]["tweets"]) & set(calls[1]["tweets"])
    made = pd.read_parquet(run_dir / "evaluation" / "generations.parquet")
    assert made.groupby(["arm", "seed", "split", "post"]).size().eq(16).all()
    assert json.loads((run_dir / "evaluation" / "manifest.json").read_text())["status"] == "completed"


def test_a_wrong_classifier_is_refused_before_anything_is_written(full_run, tmp_path):
    run_dir, calls = full_run
    with pytest.raises(OSError, match="safety_classifier=.*nowhere"):
        evaluation.evaluation_stage(run_dir, embeddings=False, safety_classifier=str(tmp_path / "nowhere"))
    assert not calls


def test_a_killed_run_goes_on_with_the_next_arm_and_a_changed_adapter_is_new(full_run, monkeypatch):
    run_dir, calls = full_run
    original = evaluation.score_generations
    monkeypatch.setattr(evaluation, "score_generations", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluation_stage(run_dir, n_boot=100, embeddings=False)
    assert json.loads((run_dir / "evaluation" / "manifest.json").read_text())["status"] == "failed"
    shutil.rmtree(run_dir / "evaluation" / "figures", ignore_errors=True)
    (run_dir / "train" / "grpo" / "seed0" / "adapter" / "weights").write_text("trained again")
    monkeypatch.setattr(evaluation, "score_generations", original)
    calls.clear()
    evaluation.evaluation_stage(run_dir, n_boot=100, embeddings=False)
    assert len(calls) == 1  # grpo alone
    assert not (run_dir / "evaluation" / "parts").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"arms": ["grpo"]}, "'baseline' must be among them"), ({"arms": ["baseline", "baseline"]}, "name each once"),
    ({"seeds": []}, "one seed at least"), ({"arms": ["baseline", "base"]}, "include_base"), ({"n_samples": 10}, "16")])
def test_stage_refuses(full_run, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation.evaluation_stage(full_run[0], **options)


def test_missing_adapter_is_named(full_run):
    with pytest.raises(FileNotFoundError, match="train/hybrid/seed0/adapter"):
        evaluation.evaluation_stage(full_run[0], arms=["baseline", "hybrid"])


def test_rivals_and_files_are_arms_beside_and_no_criterion_is_asked_of_them(full_run, tmp_path, monkeypatch):
    run_dir, calls = full_run
    monkeypatch.setattr(evaluation, "arms_reward", lambda *_: (quality, "toy"))
    posts = [f"test-{number}" for number in range(N_POSTS)]
    theirs = tmp_path / "theirs.csv"
    pd.DataFrame({"conversation_id": posts * 16, "text": ["=cmd() $x$ <script> 0.9"] * 16 * N_POSTS}).to_csv(
        theirs, index=False)
    table = evaluation.evaluation_stage(run_dir, n_boot=100, embeddings=False, temperatures=[0.5], rivals=[
        "real", "best_of_n"], best_of=3, arm_files=[str(theirs)])
    made = pd.read_parquet(run_dir / "evaluation" / "generations.parquet")
    assert made.columns.tolist() == [*generation.COLUMNS, "generated"]
    assert set(made.loc[~made["generated"], "arm"]) == {"real"}  # every other reply carries the mark
    assert set(made.loc[made["kind"] == "rival", "arm"]) == {"baseline_T0.5", "best_of_n", "real", "theirs"}
    assert [call["n"] for call in calls].count(48) == 1 and [call["temperature"] for call in calls].count(0.5) == 4
    value = table.set_index(["arm", "metric"])["value"]
    assert value["best_of_n", "reward_engagement"] > value["baseline", "reward_engagement"] + 0.1  # of three, the best
    assert value["real", "judge_engagement"] == pytest.approx(0.5)  # all nine of each post, each against the others
    assert math.isnan(value["real", "pass@10"]) and math.isnan(value["real", "self_bleu"])
    assert value["real", "pass@5"] > 0
    assert value["theirs", "self_bleu"] == pytest.approx(1)
    notes = " ".join(pd.read_csv(run_dir / "evaluation" / "notes.csv")["note"])
    assert "real seed 0: pass@10 could not be computed for 8 of 8 posts (fewer than 10 replies)" in notes
    assert "theirs: 352 of 480 replies of the file are left out" in notes
    assert set(pd.read_csv(run_dir / "evaluation" / "decision.csv")["arm"]) == {"grpo"}
    comparisons = pd.read_csv(run_dir / "evaluation" / "comparisons.csv").set_index("arm")
    assert comparisons.loc[["theirs", "best_of_n"], "p_holm"].isna().all()
    assert comparisons.loc["grpo", "p_holm"].notna().any()
    costs = pd.read_csv(run_dir / "evaluation" / "costs.csv").set_index("arm")
    assert costs.loc["best_of_n", "sampled_tokens"] == 8 * 48 * 4 and math.isnan(costs.loc["real", "seconds"])


def test_systems_of_the_ladder_are_judged_beside_and_change_no_other_table(full_run, monkeypatch):
    run_dir, calls = full_run
    folder = run_dir / "evaluation"
    plain = evaluation.evaluation_stage(run_dir, n_boot=100, embeddings=False, temperatures=[0.5],
                                        temperature_arms=["baseline"])
    before = {name: (folder / f"{name}.csv").read_bytes() for name in ("metrics", "curves", "comparisons")}
    assert set(pd.read_parquet(folder / "systems.parquet")["split"]) == {"validation"}
    for step in (20, 4):
        mark = run_dir / "train" / "grpo" / "seed0" / "marks" / str(step)
        mark.mkdir(parents=True)
        (mark / "weights").write_text(f"grpo {step}")
    table = evaluation.evaluation_stage(run_dir, n_boot=100, embeddings=False, temperatures=[0.5],
                                        temperature_arms=["all"])
    assert table.equals(plain) and all((folder / f"{name}.csv").read_bytes() == old for name, old in before.items())
    systems = ["base_T0.5", "grpo@20", "grpo@4", "grpo_T0.5"]
    looked_at = pd.read_parquet(folder / "systems.parquet")
    assert sorted(looked_at.loc[looked_at["split"] == "test", "arm"].unique()) == systems
    assert not set(systems) & set(pd.read_parquet(folder / "generations.parquet")["arm"])
    judged = pd.read_csv(folder / "systems.csv", dtype={"temperature": str}).fillna({"temperature": ""})
    assert set(judged["system"]) == {*systems, "baseline", "baseline_T0.5", "grpo", "base"}
    assert judged.set_index("system")["temperature"][["grpo_T0.5", "grpo@4"]].unique().tolist() == ["0.5", "own"]
    assert pd.read_csv(folder / "ladder.csv").set_index("rung").loc["judge", "n_systems"] == 8


def test_a_further_judge_gets_a_mark_a_view_and_a_rung(scored, scored_once, monkeypatch):
    run_dir, folder, plain = scored, scored / "evaluation", scored_once[1]
    monkeypatch.setattr(evaluation, "rung_scorers", lambda _: {"contrary": (
        lambda posts, replies: 1 - quality(posts, replies), scoring.beat_fraction)})
    with pytest.raises(ValueError, match="lacks a mark for contrary; .*delete it"):
        score(run_dir)
    (folder / "pass.json").unlink()
    pd.testing.assert_series_equal(score(run_dir), plain)
    assert json.loads((folder / "pass.json").read_text())["rungs"]["contrary"]["tau"] > 0
    views = pd.read_csv(folder / "robustness.csv").set_index(["arm", "metric", "view"])
    assert not views.loc[("better", "judge_engagement", "contrary"), "agrees"]
    decision = pd.read_csv(folder / "decision.csv").fillna("").set_index(["arm", "criterion"])
    assert "contrary" in decision.loc[("better", "judge_engagement > 0.65"), "unshared"]
    assert "(not second judge, contrary)" in (folder / "recommendation.txt").read_text()
    rungs = pd.read_csv(folder / "ladder.csv").set_index("rung")
    assert rungs.loc["contrary", "with_reward"] == -1 and rungs.loc["contrary", "shared_errors"] < -0.9


def test_an_unusable_file_is_named_with_its_line(full_run, tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps({"post": "test-0", "text": "x"}) + "\n" + json.dumps({"post": "elsewhere", "text": "x"}))
    with pytest.raises(ValueError, match="theirs.jsonl, line 2: post 'elsewhere' is not a test post"):
        evaluation.evaluation_stage(full_run[0], n_boot=100, embeddings=False, arm_files=[str(path)])
    with pytest.raises(FileNotFoundError, match="nothere.csv"):
        evaluation.evaluation_stage(full_run[0], arm_files=["nothere.csv"])
    with pytest.raises(ValueError, match="not one of prompted, real, best_of_n"):
        evaluation.evaluation_stage(full_run[0], rivals=["oracle"])


def test_scoring_again_needs_no_policy_and_draws_embedded_fonts(scored, scored_once, monkeypatch):
    run_dir = scored
    monkeypatch.undo()  # the real draw_figures; the judge is put back below
    judge = (quality, scoring.beat_fraction)
    monkeypatch.setattr(evaluation, "engagement_scorers", lambda *_: ("model", {"judge": judge, "reward": judge}))
    assert not (run_dir / "policy").exists() and not (run_dir / "train").exists()
    pd.testing.assert_series_equal(score(run_dir), scored_once[1])
    figures = sorted((run_dir / "evaluation" / "figures").glob("*.pdf"))
    assert {"pass_at_k", "quality_diversity", "tau_sensitivity", "distributions", "safety", "calibration",
            "forest", "ladder", "frontier"} == {path.stem for path in figures}
    for path in figures:
        content = path.read_bytes()
        assert b"/CIDFontType2" in content and b"/Type3" not in content, path  # TrueType, embedded
        assert path.with_suffix(".png").exists()


def test_a_frozen_mark_is_only_read_and_a_change_of_its_inputs_is_said(scored):
    run_dir = scored
    path = run_dir / "evaluation" / "pass.json"
    before = path.read_bytes()
    generations = run_dir / "evaluation" / "generations.parquet"
    made = pd.read_parquet(generations)
    made.loc[made["split"] == "validation", "text"] = "reply now 0.999999"
    made.to_parquet(generations)
    score(run_dir, target_pass_at_10=0.3)
    assert path.read_bytes() == before
    notes = " ".join(pd.read_csv(run_dir / "evaluation" / "notes.csv")["note"])
    assert "inputs have changed since (validation replies, target_pass_at_10)" in notes
    path.write_text(path.read_text().replace('"judge": "model"', '"judge": "gold"'))
    with pytest.raises(ValueError, match="set under judge 'gold'.*delete it"):
        score(run_dir)


def test_a_ceiling_is_said_in_the_table_itself(run_dir):
    generations = run_dir / "evaluation" / "generations.parquet"
    made = pd.read_parquet(generations)
    made.loc[made["split"] == "test", "text"] = "so good 1.0"
    made.to_parquet(generations)
    evaluation.score_generations(run_dir, n_boot=100, embeddings=False)
    table = pd.read_csv(run_dir / "evaluation" / "metrics.csv").set_index("metric")
    assert table.loc["pass@10", "warning"].str.startswith("ceiling").all()
    assert table.loc["self_bleu", "warning"].isna().all()


def test_two_processes_give_what_one_gives(run_dir):
    made = pd.read_parquet(run_dir / "evaluation" / "generations.parquet")
    texts, posts = made["text"].tolist()[:5000], made["post"].tolist()[:5000]
    arguments = posts, texts, [["a real reply", "w1 w2"]] * len(texts), ["reply w3 w1 of training"]
    pd.testing.assert_frame_equal(post_metrics.read_replies(*arguments, n_jobs=2),
                                  post_metrics.read_replies(*arguments, n_jobs=1), check_exact=True)


def test_posts_need_two_replies():
    pairs = pd.DataFrame({"conversation_id": ["a", "b"], "tweet": ["x", "y"], "reply": ["r", "s"], "split": "test"})
    with pytest.raises(ValueError, match="no post in split 'test' has two replies"):
        evaluation.posts_with_replies(pairs, "test")


# ---- corrections, columns and views by hand


def test_holm_is_over_all_arms_and_headline_metrics_at_once(scored_once):
    run_dir = scored_once[0]
    table = pd.read_csv(run_dir / "evaluation" / "comparisons.csv")
    family = table[table["metric"].isin(scoring.HEADLINE)]
    assert len(family) == 2 * len(scoring.HEADLINE)
    adjusted = multipletests(family["p_value"], method="holm")[1]
    np.testing.assert_allclose(family["p_holm"], adjusted)
    assert (family["p_holm"] > family["p_value"]).any()
    assert table.loc[~table["metric"].isin(scoring.HEADLINE), "p_holm"].isna().all()


def share_of_the_post(posts, replies):
    """A judge that knows which post it is asked about: the share of its words that the reply has."""
    return np.array([np.mean([word in reply.split() for word in post.split()])
                     for post, reply in zip(posts, replies, strict=True)])


def test_each_reply_is_judged_under_its_own_post_and_beside_its_replies():
    posts = pd.DataFrame({"post": ["p", "q"], "tweet": ["tram late again", "bridge opens 🌉"],
                          "replies": [["tram late", "no", "why"], ["bridge opens 🌉", "so what"]]})
    made = pd.DataFrame({"post": ["q", "p", "p"], "arm": "a", "sample": 0,
                         "text": ["bridge", "bridge opens 🌉", "tram, late again"]})
    scored = scoring.score_replies(made, posts, {"judge": (share_of_the_post, scoring.beat_fraction)}, False)
    assert scored["judge"].tolist() == [0.5, pytest.approx(1 / 3), pytest.approx(2.5 / 3)]  # a tie is half


def test_a_real_reply_is_set_beside_the_others_alone():
    posts = pd.DataFrame({"post": ["p"], "tweet": ["tram late again"], "replies": [["tram", "tram late", "why 👍"]]})
    made = pd.DataFrame({"post": "p", "arm": ["real", "real", "real", "a"], "sample": [1, 0, 2, 1],
                         "text": ["tram late", "tram", "why 👍", "tram late"]})
    scored = scoring.score_replies(made, posts, {"judge": (share_of_the_post, scoring.beat_fraction)}, False)
    assert scored["judge"].tolist() == [1.0, 0.5, 0.0, pytest.approx(2.5 / 3)]
    assert scored["rouge_l"].tolist() == [pytest.approx(2 / 3), pytest.approx(2 / 3), 0.0, 1.0]


def test_the_pass_mark_is_the_baselines_whoever_else_replied():
    rng = np.random.default_rng(4)
    scored = pd.DataFrame({"seed": 0, "split": "validation", "judge": rng.random(160), "arm": "baseline",
                           "post": np.repeat(np.arange(10), 16), "sample": np.tile(np.arange(16), 10)})
    scored = scored.assign(**{f"guard_{name}": False for name in scoring.BLOCKING_GUARDS})
    others = pd.concat([scored.assign(arm="grpo", judge=1.0), scored, scored.assign(split="test", judge=0.0)])
    assert scoring.calibrate(others, 0.6, "x") == scoring.calibrate(scored, 0.6, "x")


def test_the_best_of_n_is_the_best_under_its_own_post(full_run):
    run_dir, _ = full_run
    posts = pd.DataFrame({"post": ["p", "q"], "tweet": ["w0 0", "w1 1"], "replies": [["x", "y"]] * 2})
    sampling = EvaluationSampling.make(n_samples=16)

    def reward(posts, replies):  # texts of post number i hold the word wi
        return share_of_the_post([post.split()[0] for post in posts], replies) * quality(posts, replies)

    job = generation.Job("best_of_n", "rival", 0, "test", "baseline", best_of=3)
    chosen = generation.generate_part(run_dir, job, posts, sampling, 0, lambda: (reward, "toy"))[0]
    plain = generation.generate_part(run_dir, generation.Job("x", "rival", 0, "test", "baseline", best_of=3), posts,
                                     sampling, 0, None)[0]
    best = plain.groupby("post")["text"].apply(
        lambda texts: [max(texts.iloc[i:i + 3], key=lambda text: quality([""], [text])[0]) for i in range(0, 48, 3)])
    assert chosen.groupby("post")["text"].apply(list).to_dict() == best.to_dict()


def some_scores():
    """Two posts, three replies each, of two arms: no two rows alike in anything."""
    rng = np.random.default_rng(2)
    texts = ["yes 👍", "so it is, and more", "no", "не знаю", "ask maria, she was there", "why?"] * 2
    return pd.DataFrame({"arm": ["a"] * 6 + ["baseline"] * 6, "seed": 0, "post": list("xxxyyy") * 2,
                         "sample": [0, 1, 2] * 4, "text": texts, "judge": rng.random(12), "reward": rng.random(12),
                         "gold": math.nan, "rouge_l": rng.random(12), "n_words": rng.integers(1, 9, 12), "tokens": 4.0,
                         "passed": [True, False] * 6})


def test_columns_of_a_post_are_its_own():
    scored = some_scores()
    vectors = np.random.default_rng(3).normal(size=(12, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = post_metrics.metrics_by_post(scored, 50, vectors).set_index(["arm", "post", "metric"])["value"]
    for (arm, post), group in scored.groupby(["arm", "post"]):
        similar = [vectors[i] @ vectors[j] for i, j in itertools.combinations(group.index, 2)]
        assert table[arm, post, "semantic_diversity"] == pytest.approx(1 - np.mean(similar))
        assert table[arm, post, "proxy_gap"] == pytest.approx(group["reward"].mean() - group["judge"].mean())
        assert table[arm, post, "rouge_l"] == pytest.approx(group["rouge_l"].mean())
        assert table[arm, post, "pass@1"] == pytest.approx(group["passed"].mean())


def test_each_reply_is_read_beside_its_own_post_and_references():
    posts, texts = ["the tram is late", "a bridge opens"], ["the tram is late again", "a bridge, finally 🌉"]
    references = [["late again"], ["finally 🌉", "so what"]]
    found = post_metrics.read_replies(posts, texts, references)
    for row in range(2):
        assert found["rouge_l"][row] == rouge_l(texts[row], references[row]) > 0
    assert found["copied_from_post"].tolist() == [4, 2]


def test_at_equal_length_what_length_explains_is_gone():
    """A judge that likes a post to some degree, and longer replies: the arm's lead was its length alone."""
    scored = some_scores()
    liked = scored["post"].map({"x": 0.1, "y": 0.4})
    scored = scored.assign(n_words=scored["n_words"] + 5 * (scored["arm"] == "a"))
    scored = scored.assign(judge=liked + 0.2 * np.log1p(scored["n_words"]))
    assert scored.groupby("arm")["judge"].mean().diff().abs().max() > 0.05
    controlled = robustness.length_controlled(scored)
    usual = np.log1p(scored["n_words"])[scored["arm"] == "baseline"].groupby(scored["post"]).mean()
    np.testing.assert_allclose(controlled, liked + 0.2 * scored["post"].map(usual), atol=1e-9)


def test_each_judge_has_its_own_mark():
    scored = some_scores().assign(**{f"guard_{name}": False for name in scoring.BLOCKING_GUARDS})
    scored["judge"] = [0.1, 0.3, 0.5, 0.7, 0.9, 0.8] + [0.2, 0.3, 0.1, 0.6, 0.4, 0.75]
    scored["second_judge"] = [0.9, 0.3, 0.25, 0.8, 0.4, 0.3] + [0.8, 0.1, 0.75, 0.1, 0.15, 0.9]
    frozen = {"judge": "one", "tau": 0.7, "second_judge": {"judge": "two", "tau": 0.2}}
    table = robustness.robustness_table(scored, frozen, 100, 0)
    table = table[table["metric"] == "pass@1"].set_index("view")["difference"]
    assert table["judge"] == pytest.approx((3 - 1) / 6) and table["second judge"] == pytest.approx((6 - 3) / 6)


def test_each_arm_has_its_temperature_from_validation_and_the_mark_the_baselines(full_run):
    """The chosen rows are recomputed here from scores.parquet's own columns and the replies, by brute force."""
    run_dir, _ = full_run
    folder = run_dir / "evaluation"
    (folder / "pass.json").unlink(missing_ok=True)
    evaluation.evaluation_stage(run_dir, n_boot=100, embeddings=False, temperatures=[0.5, 2.0])
    frozen = json.loads((folder / "pass.json").read_text())
    marks = pd.read_csv(folder / "baseline_temperatures.csv")
    assert marks["temperature"].tolist() == [0.5, 1.0, 2.0] and marks["chosen"].sum() == 1
    assert marks.loc[marks["chosen"], "tau"].item() == frozen["tau"] == marks["tau"].max()
    assert frozen["temperature"] == marks.loc[marks["chosen"], "temperature"].item()
    chosen = pd.read_csv(folder / "temperatures.csv")
    assert chosen.groupby("arm")["chosen"].sum().to_dict() == {"baseline": 1, "grpo": 1}
    own = chosen[chosen["arm"] == "grpo"]
    assert own.loc[own["chosen"], "pass@10"].item() == own["pass@10"].max()
    primary = pd.read_csv(folder / "primary.csv")
    assert primary["arm"].tolist() == ["grpo"] and primary["p_holm"].item() == primary["p_value"].item()
    decision = pd.read_csv(folder / "decision.csv")
    lead = decision[decision["criterion"].str.startswith("pass@10 above")].iloc[0]
    assert lead["value"] == primary["difference"].item() and "temperature" in lead["reason"]
    assert (folder / "figures" / "frontier.pdf").exists()
    assert set(pd.read_csv(folder / "pass_rule.csv")["rule"]) == {"relative"}  # no gold here


def test_each_different_pair_is_scored_once_and_the_scores_are_the_same():
    """Every scorer and the truth; replies of several arms and samples that say the same."""
    rng, asked = np.random.default_rng(1), []

    def counting(post_texts, texts):
        asked.append(len(texts))
        assert len(set(zip(post_texts, texts, strict=True))) == len(texts)
        return share_of_the_post(post_texts, texts)

    posts = pd.DataFrame({"post": ["p", "q"], "tweet": ["tram late again", "bridge opens 🌉"],
                          "replies": [["tram late", "no", "why"], ["bridge opens 🌉", "so what"]]})
    said = np.array(["tram", "bridge opens 🌉", "no", "https://x.example/a idiot", ""])
    made = pd.DataFrame({"post": rng.choice(["p", "q"], 60), "arm": rng.choice(["a", "b"], 60),
                         "text": rng.choice(said, 60), "sample": 0})
    scored = scoring.score_replies(made, posts, {"judge": (counting, scoring.beat_fraction)}, counting, ["so what"])
    assert asked == [5, 10, 10]
    for place in range(60):
        alone = scoring.score_replies(made.iloc[[place]], posts, {"judge": (share_of_the_post, scoring.beat_fraction)},
                                      share_of_the_post, ["so what"])
        pd.testing.assert_frame_equal(scored.iloc[[place]].reset_index(drop=True), alone, check_exact=True)
