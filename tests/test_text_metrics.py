"""EAD, Vendi, semantic diversity, copied spans and safety flags, against definitions written out another way."""

import difflib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import entropy

from grpo_engage.text.metrics import _WORD, words
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
