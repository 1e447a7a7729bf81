"""Metrics of texts: those with a name from the literature against the packages that others use, on real texts; EAD,
Vendi, semantic diversity, copied spans and safety flags against definitions written out another way."""

import csv
import difflib
import math
from fractions import Fraction
from pathlib import Path

import nltk
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from real_texts import SETS
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as rouge_tokens
from sacrebleu.metrics import BLEU
from scipy.linalg import sqrtm
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_distances

from grpo_engage.text.metrics import (
    _WORD,
    distinct_n,
    rouge_l,
    rouge_words,
    script_words,
    self_bleu,
    words,
)
from grpo_engage.text.safety import CopiedSpans, safety_flags
from grpo_engage.text.sets import ead, ngram_vectors, semantic_diversity, vendi

text = st.one_of(st.text(max_size=40), st.lists(st.sampled_from("a b c the 👍 да 日本 , it's".split()),
                                                max_size=12).map(" ".join))
NASTY = ["", " ", "word", "👍" * 5000, "x" * 10_000, "ab " * 3000, "नमस्ते", "‍️", "a\x00b", "\ud800", "線" * 10_000]


@settings(max_examples=100, deadline=None)
@given(st.lists(text, max_size=6), st.integers(2, 60), st.integers(1, 3))
def test_ead_is_the_published_formula_in_exact_arithmetic(texts, v, n):
    grams = [tuple(cut[i:i + n]) for cut in map(words, texts) for i in range(len(cut) - n + 1)]
    if not grams:
        assert math.isnan(ead(texts, v, n))
        return
    expected = len(set(grams)) / (v * (1 - Fraction(v - 1, v) ** len(grams)))
    assert ead(texts, v, n) == pytest.approx(float(expected), rel=1e-12)


def test_ead_of_a_huge_vocabulary_is_distinct_n():
    assert ead(["a b a c"], 10**15) == pytest.approx(3 / 4, rel=1e-9)  # the plain formula is off by percents here


def test_vendi_is_the_exponential_of_the_von_neumann_entropy():
    rng = np.random.default_rng(0)
    for n, d in [(2, 3), (9, 4), (5, 20)]:
        vectors = rng.normal(size=(n, d))
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        # singular values of the unit rows: the eigenvalues of the kernel by another route
        assert vendi(vectors) == pytest.approx(np.exp(entropy(np.linalg.svd(unit / np.sqrt(n))[1] ** 2)))
        assert np.allclose(sqrtm(unit @ unit.T).real @ sqrtm(unit @ unit.T).real, unit @ unit.T, atol=1e-6)
        assert 1 <= vendi(vectors) <= min(n, d) + 1e-9
    with pytest.raises(ValueError, match="finite"):
        vendi([[np.nan, 1]])


@settings(max_examples=100, deadline=None)
@given(st.lists(text, min_size=1, max_size=6))
def test_vendi_of_texts_lies_between_one_and_their_number(texts):
    usable = sum(bool(words(t)) for t in texts)
    value = vendi(ngram_vectors(texts))
    assert math.isnan(value) if not usable else 1 - 1e-9 <= value <= usable + 1e-9
    doubled = vendi(ngram_vectors([*texts, *texts]))  # copies of everything are no diversity
    assert doubled == pytest.approx(value, nan_ok=True)


@settings(max_examples=200, deadline=None)
@given(text, st.lists(text, max_size=4))
def test_copied_span_equals_difflib(reply, sources):
    cut = words(reply)
    found = CopiedSpans(sources).longest(reply)
    if not cut:
        assert math.isnan(found)
        return
    matches = [difflib.SequenceMatcher(None, cut, words(s), autojunk=False).find_longest_match() for s in sources]
    assert found == max((match.size for match in matches), default=0)


@pytest.mark.parametrize("nasty", NASTY)
def test_any_text(nasty):
    empty = not words(nasty)
    assert CopiedSpans([nasty]).longest(nasty) == (pytest.approx(len(words(nasty))) if not empty else
                                                   pytest.approx(math.nan, nan_ok=True))
    assert vendi(ngram_vectors([nasty, nasty])) == pytest.approx(math.nan if empty else 1.0, nan_ok=True)
    assert ead([nasty], 100) > 0 or empty
    flags = safety_flags(["The bridge is closed"], [nasty])
    assert flags.isin([0.0, 1.0]).to_numpy()[~flags.isna()].all()


def test_safety_flags_are_nan_where_the_lists_cannot_read():
    flags = safety_flags(["The road is closed"] * 5, ["you are an idiot", "see https://x.example/a and go", "",
                                                      "これは日本語の文です", "thanks, good to know @bob"])
    assert flags["insult"].tolist()[:2] == [1.0, 0.0] and flags["link"].tolist()[:2] == [0.0, 1.0]
    assert flags.loc[2].isna().all() and np.isnan(flags.loc[3, "insult"]) and flags.loc[4, "mention"] == 1


def test_semantic_diversity_refuses_and_is_nan_for_one():
    assert math.isnan(semantic_diversity([[1.0, 0.0]]))
    assert semantic_diversity([[1, 0], [0, 1], [-1, 0]]) == pytest.approx((1 + 1 + 2) / 3)
    with pytest.raises(ValueError, match="no row of zeros"):
        semantic_diversity([[0.0, 0.0], [1.0, 0.0]])


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(max_codepoint=0x7F), max_size=30))
def test_the_fast_way_through_ascii_finds_the_same_words(ascii_text):
    assert words(ascii_text) == _WORD.findall(ascii_text.casefold())


# ---- names from the literature -------------------------------------------------------------------------------------

STOCK = RougeScorer(["rougeL"], use_stemmer=False)
REFERENCE = Path(__file__).with_name("vendi_reference.csv")


def by_package(reply: str, references: list[str]) -> float:
    """ROUGE-L as the package says; NaN where its tokenizer has no word in any reference (it says 0)."""
    if not any(rouge_tokens(reference, None) for reference in references):
        return math.nan
    return STOCK.score_multi(references, reply)["rougeL"].fmeasure


@pytest.mark.parametrize("name", SETS)
def test_rouge_l_is_the_packages_on_real_texts(name):
    found = {reply: rouge_l(reply, [other for other in SETS[name] if other is not reply]) for reply in SETS[name]}
    assert found == pytest.approx({
        reply: by_package(reply, [other for other in SETS[name] if other is not reply]) for reply in SETS[name]},
        nan_ok=True, abs=1e-12)
    assert all(rouge_words(reply) == tuple(rouge_tokens(reply, None)) for reply in SETS[name])


@settings(max_examples=300, deadline=None)
@given(st.one_of(text, st.text(max_size=30)), st.lists(text, min_size=1, max_size=3))
def test_rouge_l_is_the_packages_on_any_text(reply, references):
    assert rouge_l(reply, references) == pytest.approx(by_package(reply, references), nan_ok=True, abs=1e-12)


def test_rouge_l_of_real_texts_is_no_number_or_a_likeness_where_the_package_reads_nothing():
    for name, empty in (("news", False), ("indic", True), ("unspaced", True)):
        first, *others = SETS[name]
        assert math.isnan(rouge_l(first, others)) == empty
        assert rouge_l(first, others, script_words) > 0


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x7F), max_size=40))
def test_words_of_any_script_are_rouge_scores_on_ascii(ascii_text):
    assert script_words(ascii_text) == rouge_words(ascii_text)


def test_words_of_any_script_hold_letters_of_all_scripts_and_nothing_else():
    for texts in SETS.values():
        for reply in texts:
            joined = "".join(script_words(reply))
            kept = [character for character in reply if character.isalpha() or character.isdecimal()]
            assert not set("“”—…!?,.()🙏😂❤️👍_@#'’") & set(joined)
            assert sum(character.isalpha() or character.isdecimal() for character in joined) >= 0.9 * len(kept)


@pytest.mark.parametrize("name", SETS)
def test_self_bleu_is_sacrebleus_and_nltks_of_the_same_words_on_real_texts(name):
    """Over ten sets: punctuation, emoji, scripts, copies, one-word replies."""
    cut = [words(reply) for reply in SETS[name]]
    package = BLEU(tokenize="none", smooth_method="floor", smooth_value=0.1, effective_order=True)
    smooth = SmoothingFunction(epsilon=0.1).method1
    sacre, natural = [], []
    for place, own in enumerate(cut):
        others = cut[:place] + cut[place + 1:]
        sacre.append(package.sentence_score(" ".join(own), [" ".join(other) for other in others]).score / 100)
        natural.append(sentence_bleu(others, own, smoothing_function=smooth, auto_reweigh=True))
    assert self_bleu(SETS[name]) == pytest.approx(np.mean(sacre), abs=1e-9)
    assert self_bleu(SETS[name]) == pytest.approx(np.mean(natural), abs=1e-9)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_counts_nltks_n_grams_on_real_texts(name, n):
    grams = [gram for reply in SETS[name] for gram in nltk.ngrams(words(reply), n)]
    assert distinct_n(SETS[name], n) == pytest.approx(len(set(grams)) / len(grams))


@pytest.mark.parametrize("row", list(csv.DictReader(
    line for line in REFERENCE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))),
    ids=lambda row: row["set"])
def test_vendi_is_vendi_scores_on_real_texts(row):
    """Texts of one word are left out: the package takes such a text for half like itself."""
    texts = [reply for reply in SETS[row["set"]] if len(words(reply)) > 1]
    assert len(texts) == int(row["texts"])
    assert vendi(ngram_vectors(texts)) == pytest.approx(float(row["ngram_vendi_score"]), abs=1e-9)
    assert vendi(ngram_vectors(texts, [1])) == pytest.approx(float(row["unigram_vendi_score"]), abs=1e-9)


def test_semantic_diversity_is_scikit_learns_mean_distance():
    vectors = np.random.default_rng(5).normal(size=(9, 7))
    pairs = cosine_distances(vectors)[np.triu_indices(9, 1)]
    assert semantic_diversity(vectors) == pytest.approx(pairs.mean())
