"""Set diversity and marginal credit against their definitions, written another way."""

import itertools

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from grpo_engage.text.diversity import DIVERSITY_METRICS, marginal_credit, set_diversity, vendi_score
from grpo_engage.text.metrics import words

WORDS = ["yes", "no", "why", "rain", "cup", "train"]


def salad(seed, k=5):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(4, 9))) for _ in range(k)]


@pytest.mark.parametrize("seed", range(3))
def test_self_bleu_diversity_agrees_with_nltk(seed):
    texts = [words(text) for text in salad(seed)]
    smooth = SmoothingFunction(epsilon=0.1).method1
    scores = [sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smooth)
              for i, text in enumerate(texts)]
    assert set_diversity(salad(seed)) == pytest.approx(1 - np.mean(scores))


def test_distinct_n_diversity_counts_bigrams():
    texts = salad(3)
    grams = [pair for text in texts for pair in itertools.pairwise(text.split())]
    assert set_diversity(texts, "distinct_n") == pytest.approx(len(set(grams)) / len(grams))


@pytest.mark.parametrize("metric", [*DIVERSITY_METRICS, lambda texts: float(sum(map(len, texts)) ** 2)])
def test_marginal_credit_by_brute_force(metric):
    texts = salad(1, 4)
    brute = [set_diversity(texts, metric) - set_diversity(texts[:i] + texts[i + 1 :], metric) for i in range(4)]
    np.testing.assert_allclose(marginal_credit(texts, metric), brute, atol=1e-6)
    assert marginal_credit(texts, metric).shape == (4,) and np.ptp(brute) > 0


@pytest.mark.parametrize("metric", DIVERSITY_METRICS)
def test_copies_have_no_diversity_and_order_does_not_matter(metric):
    assert set_diversity(["the same old words"] * 4, metric) == pytest.approx(
        0.25 if metric == "distinct_n" else 0, abs=1e-6)  # 3 different bigrams of 12
    assert set_diversity(salad(2), metric) == pytest.approx(set_diversity(salad(2)[::-1], metric))
    assert set_diversity(["one text"], metric) == 0


def test_vendi_of_block_matrices():
    blocks = np.kron(np.eye(3), np.ones((2, 2)))
    assert vendi_score(blocks) == pytest.approx(3)
