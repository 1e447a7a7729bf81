"""Insults by a classifier: beside the model asked text by text, in the evaluation's files, and where there is none."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from grpo_engage.text.safety import SAFETY_SOURCES
from grpo_engage.text.safety_model import SafetyClassifier, unsafe_labels

TEXTS = ["you idiot", "", " \n", "What a lovely day 🌞, isn't it?", "спасибо вам, дурак", "y0u 1d10t", "\ud800", "नमस्ते",
         "a\x00b", "so it goes, " * 2000, "👍" * 300, "you idiot", "@a https://b.example/c", "<end> <pad> [SEP]"]
TOXIC = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]  # the labels of the best-known one


def one_by_one(folder, labels, multi, longest):
    """The probability that `labels` say of each of TEXTS, by a plain forward pass: no batch, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = 0
    wanted, found = [model.config.label2id[name] for name in labels], []
    for text in TEXTS:
        tokens = tokenizer.encode(text.encode("utf-8", "replace").decode())[:longest] or [0]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0]
        found.append((torch.sigmoid(logits)[wanted].max() if multi else torch.softmax(logits, 0)[wanted].sum()).item())
    return np.array(found)


@pytest.mark.parametrize(("labels", "problem_type", "kind"), [
    (TOXIC, "multi_label_classification", "bert"), (["NOT-HATE", "HATE"], "single_label_classification", "bert"),
    (["neutral", "profane", "offensive", "hate"], "single_label_classification", "gpt2")])
def test_it_says_what_the_model_says_of_each_text_alone(make_classifier, tmp_path, labels, problem_type, kind):
    multi, longest = problem_type.startswith("multi"), 38 if kind == "bert" else 62
    folder = make_classifier(tmp_path / "model", labels, problem_type, kind)
    classifier = SafetyClassifier(str(folder))
    found, flags = classifier.probabilities(TEXTS, batch_size=4), classifier.flags(TEXTS)
    wordless = np.array([text.strip() == "" for text in TEXTS])
    for kind_of_harm, own in classifier.labels.items():
        expected = one_by_one(folder, own, multi, longest)
        known = np.array([bool(text) for text in TEXTS])  # what a model makes of no token at all is its own affair
        np.testing.assert_allclose(found[kind_of_harm][known], expected[known], atol=1e-5)
        assert flags[kind_of_harm].isna().tolist() == wordless.tolist()
        assert (flags[kind_of_harm] == 1)[~wordless].tolist() == (expected > 0.5)[~wordless].tolist()
    assert 0 < np.nanmean(flags) < 1  # else nothing was tested


@pytest.mark.parametrize(("names", "insult", "profanity"), [
    (TOXIC, ["toxic", "severe_toxic", "threat", "insult", "identity_hate"], ["obscene"]),
    (["toxicity", "severe_toxicity", "sexual_explicit", "identity_attack"],
     ["toxicity", "severe_toxicity", "identity_attack"], ["sexual_explicit"]),
    (["Non-Toxic", "Toxic"], ["Toxic"], []), (["not_offensive", "offensive"], ["offensive"], []),
    (["nothate", "hate"], ["hate"], []), (["no insult", "insult"], ["insult"], []),
    (["safe", "unsafe"], ["unsafe"], []), (["inoffensive", "offensive"], ["offensive"], []),
    (["toxicity", "obscene", "male", "homosexual_gay_or_lesbian"], ["toxicity"], ["obscene"]),
    (["normal", "hatespeech", "offensive"], ["hatespeech", "offensive"], []), (["CLEAN", "PROFANE"], [], ["PROFANE"])])
def test_labels_that_say_what_they_mean_are_taken(names, insult, profanity):
    found = unsafe_labels(names)
    assert found.get("insult", []) == insult and found.get("profanity", []) == profanity


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["POSITIVE", "NEGATIVE"], ["S", "H", "V", "OK"],
                                   ["whatever", "chat"]])
def test_labels_that_say_nothing_have_to_be_named(names):
    with pytest.raises(ValueError, match="safety_labels"):
        unsafe_labels(names)
    assert unsafe_labels(names, names[1:2]) == {"insult": names[1:2]}


def test_a_model_that_never_learned_to_classify_is_refused(make_classifier, tmp_path):
    folder = make_classifier(tmp_path / "model", ["fine", "toxic"])
    AutoModel.from_pretrained(folder).save_pretrained(folder)  # without its head
    with pytest.raises(OSError, match="at random"):
        SafetyClassifier(str(folder)).flags(["you idiot"])
    with pytest.raises(OSError, match="safety_classifier=.*nowhere"):
        SafetyClassifier(str(tmp_path / "nowhere"))


def test_facts_are_of_the_weights_and_name_no_folder_of_this_machine(make_classifier, tmp_path):
    labels = ["fine", "toxic"]
    first, same, other = (SafetyClassifier(str(make_classifier(tmp_path / place / "model", labels, seed=seed)))
                          for place, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.facts() == same.facts() != other.facts() and str(tmp_path) not in str(first.facts())
    assert first.sources() == SAFETY_SOURCES | {"safety_insult": "model", "guard_toxic": "word list or model"}
    assert isinstance(first.flags([]), pd.DataFrame) and first.flags([]).empty
