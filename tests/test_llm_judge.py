"""The language-model judge against a server that fails in every way that a server can, on this machine."""

import json
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from endpoint_double import serving
from sklearn.metrics import cohen_kappa_score

from grpo_engage.judges.endpoint import Endpoint, most_tokens
from grpo_engage.judges.injections import INJECTIONS, as_data, flag_injection
from grpo_engage.judges.llm_client import Ledger, ask
from grpo_engage.judges.llm_judge import (
    LlmJudge,
    agreement_table,
    flip_rates,
    judge_pairs,
    judge_replies,
    pair_messages,
)

QUESTION = [{"role": "user", "content": "A or B?"}]


def good(text="A", **more):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]} | more).encode()


@pytest.fixture
def server():
    """`plan`: what is answered in turn, (status, headers, body), seconds to hang, or a function; the last stays."""
    def answer(state, body):
        step = state.plan.pop(0) if len(state.plan) > 1 else state.plan[0]
        step = step(body) if callable(step) else step
        if isinstance(step, float):
            time.sleep(step)
            step = good()
        return step

    with serving(answer) as state:
        state.plan = [good()]
        yield state


@pytest.fixture
def judge_at(server, tmp_path):
    def make(max_cost=float("inf"), **terms):
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", **({"timeout": 0.3} | terms))
        judge = LlmJudge(endpoint, Ledger(tmp_path / "answers.sqlite"), max_cost=max_cost, sleep=slept.append)
        judge.slept = slept
        return judge
    slept = []
    return make


@pytest.mark.parametrize(("trouble", "least_wait"), [
    ((429, {"Retry-After": "7"}, b"slow down"), 7), ((500, {}, b"oops"), 0), ((503, {"Retry-After": "soon"}, b""), 0),
    (0.6, 0), ((200, {}, b"<html>gateway</html>"), 0), ((200, {}, b'{"choices": []}'), 0), ((200, {}, b"[1]"), 0),
    ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), 0), ((200, {}, b"\xff\xfe"), 0),
    ((200, {"Content-Length": "500"}, b"cut off"), 0)])
def test_trouble_passes(server, judge_at, trouble, least_wait):
    server.plan = [trouble, good("B")]
    judge = judge_at()
    answer = judge.ask(QUESTION)
    assert (answer.text, answer.tries) == ("B", 2)
    assert len(judge.slept) == 1 and least_wait <= judge.slept[0] <= 120
    assert server.requests[0][0] == "/v1/chat/completions"


def test_500_for_ever_is_nan_with_a_reason_and_stops_being_asked(server, judge_at):
    server.plan = [(500, {}, b"dead")]
    judge = judge_at(tries=3)
    pairs = pd.DataFrame({"arm": "grpo", "post": range(6), "tweet": "t", "reply": [f"r{i}" for i in range(6)],
                          "other": "o"})
    judged = judge_pairs(judge, pairs)
    assert judged["verdict"].isna().all() and judged["reason"].head(2).str.contains("HTTP 500").all()
    assert judged["reason"].iloc[-1] == "not asked: the endpoint had stopped answering"
    assert len(server.requests) == 3 * LlmJudge.LOST_IN_A_ROW
    assert judge.slept[1] > judge.slept[0]  # backoff
    server.plan = [good("A")]  # a later command asks again: a failure is not an answer
    assert judge_pairs(judge_at(), pairs.head(1))["verdict"].tolist() == [0.5]


def test_a_server_that_asks_for_an_hour_is_given_up_at_once(server, judge_at):
    server.plan = [(429, {"Retry-After": "3600"}, b"")]
    judge = judge_at()
    assert judge.ask(QUESTION).reason == "failed: HTTP 429 (1 tries)"
    assert judge.slept == [] and len(server.requests) == 1


def test_a_reply_without_end_is_cut(server, judge_at):
    server.plan = [(200, {}, b" " * 3_000_000)]
    assert "did not end" in judge_at(tries=1, timeout=5).ask(QUESTION).reason


def test_wrong_key_stops_and_is_not_shown(server, judge_at, monkeypatch):
    monkeypatch.setenv("GRPO_ENGAGE_JUDGE_KEY", "sk-very-secret")
    server.plan = [(401, {}, b"no such key: sk-very-secret")]
    with pytest.raises(RuntimeError, match="check the address") as caught:
        judge_at().ask(QUESTION)
    assert "very-secret" not in str(caught.value)
    assert server.requests[0][1]["Authorization"] == "Bearer sk-very-secret"


def test_no_key_is_kept_on_disk(server, judge_at, monkeypatch, tmp_path):
    monkeypatch.setenv("GRPO_ENGAGE_JUDGE_KEY", "sk-very-secret")
    judge_at().ask(QUESTION)
    assert all(b"sk-very-secret" not in path.read_bytes() for path in tmp_path.iterdir())


def test_one_refused_question_is_its_own_reason(server, judge_at):
    server.plan = [(400, {}, b"too long"), good("A")]
    judge = judge_at()
    assert "HTTP 400: 'too long'" in judge.ask(QUESTION).reason and judge.slept == []
    assert judge.ask(QUESTION, repeat=1).text == "A"


def test_cache_and_repeats(server, judge_at):
    judge = judge_at()
    assert [judge.ask(QUESTION, repeat).cached for repeat in (0, 0, 1, 0)] == [False, True, False, True]
    assert judge_at().ask(QUESTION).cached  # another process
    assert len(server.requests) == 2


def test_cap_is_never_passed_whatever_fails(server, judge_at):
    """Every call's highest price counts until the server says less; failed tries count in full."""
    rng = np.random.default_rng(0)
    kinds = [good(usage={"prompt_tokens": 20, "completion_tokens": 1}), good(), (500, {}, b""), (200, {}, b"x"),
             good(usage={"prompt_tokens": None})]
    server.plan = [lambda body: kinds[rng.integers(len(kinds))]]
    terms = {"price_in": 1e4, "price_out": 1e4, "max_tokens": 16}
    most = judge_at(**terms).endpoint.cost(most_tokens(QUESTION), 16)
    judge = judge_at(max_cost=20 * most, **terms)
    judge.LOST_IN_A_ROW = 10**9
    answers = [judge.ask(QUESTION, repeat) for repeat in range(60)]
    assert judge.ledger.spent <= 20 * most and len(server.requests) >= 20
    assert judge.ledger.spent > 19 * most - most
    assert "cost cap" in answers[-1].reason and answers[-1].tries == 0


def test_a_killed_call_counts_as_spent(tmp_path):
    path = tmp_path / "answers.sqlite"
    program = ("import os, sys; from grpo_engage.judges.llm_client import Ledger\n"
               f"ledger = Ledger({str(path)!r}); ledger.store('k', 'm', 'A'); ledger.reserve(0.5, 1.0); os._exit(9)")
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    ledger = Ledger(path)
    assert ledger.known("k").text == "A" and ledger.spent == 0.5 and ledger.reserve(0.6, 1.0) is None
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_estimate_counts_what_is_new_and_bounds_the_price(server, judge_at):
    judge = judge_at(price_in=1.0, price_out=2.0, max_tokens=16)
    server.plan = [good(usage={"prompt_tokens": 30, "completion_tokens": 2})]
    questions = [(pair_messages("p", "a", "b"), 0), (pair_messages("p", "b", "a"), 0)]
    before = judge.estimate([*questions, questions[0]])
    assert before["calls"] == 2
    assert before["most_usd"] == pytest.approx(2 * judge.endpoint.cost(most_tokens(questions[0][0]), 16))
    judge.ask(*questions[0])
    assert judge.estimate(questions)["calls"] == 1
    assert judge.estimate(questions)["spent_usd"] == pytest.approx(34e-6)


def test_unparseable_is_nan_never_a_score(server, judge_at):
    server.plan = [lambda body: good("As an AI I would say A")]
    pairs = pd.DataFrame({"arm": "a", "post": [1, 2], "tweet": "t", "reply": ["x", "y"], "other": "z"})
    judge = judge_at()
    judged, rated = judge_pairs(judge, pairs), judge_replies(judge, pairs.drop(columns="other"))
    for table, column in ((judged, "verdict"), (rated, "score")):
        assert table[column].isna().all() and table["reason"].str.startswith("unparseable").all()
    found = agreement_table(judged.assign(judge=0.0), rated.assign(judge=0.0))
    assert found["value"].isna().all() and (found["reason"] != "").all()


def test_both_orders_and_kappa_are_sklearns(server, judge_at):
    """A judge that answers by a rule of the texts, sometimes by place: verdicts and kappa against a direct count."""
    def rule(body):
        texts = json.loads(body["messages"][1]["content"].split("\n")[1])
        a, b = int(texts["reply_a"][1:]), int(texts["reply_b"][1:])
        return good("A" if abs(a - b) < 3 or a > b else "B")
    server.plan = [rule]
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 10, (30, 2))
    pairs = pd.DataFrame({"arm": "a", "post": range(30), "tweet": "t", "reply": [f"r{a}" for a, _ in numbers],
                          "other": [f"r{b}" for _, b in numbers]})
    judged = judge_pairs(judge_at(timeout=5), pairs)
    first = [1.0 if abs(a - b) < 3 or a > b else 0.0 for a, b in numbers]
    second = [0.0 if abs(a - b) < 3 or b > a else 1.0 for a, b in numbers]
    assert judged["shown_first"].tolist() == first and judged["shown_second"].tolist() == second
    rated = pd.DataFrame({"arm": "a", "post": [0], "repeat": 0, "score": [np.nan], "judge": [np.nan]})
    found = agreement_table(judged.assign(judge=0.1), rated).set_index("measure")
    assert found.loc["kappa: the two orders", "value"] == pytest.approx(cohen_kappa_score(first, second))
    assert found.loc["kappa: the two orders", "ci_low"] < found.loc["kappa: the two orders", "value"]


def test_injections_are_flagged_before_the_call_and_flips_counted(server, judge_at):
    assert all(flag_injection(f"ok. {text}") for text in INJECTIONS)
    judge = judge_at(timeout=5)
    pairs = pd.DataFrame({"arm": "a", "post": range(len(INJECTIONS)), "tweet": "t", "other": "o",
                          "reply": [f"fine {text}" for text in INJECTIONS]})
    judged = judge_pairs(judge, pairs)
    assert judged["flagged"].all() and judged["verdict"].isna().all() and server.requests == []

    def gullible(body):  # obeys the first order of the suite alone
        texts = json.loads(body["messages"][1]["content"].split("\n")[1])
        return good("A" if INJECTIONS[0] in texts["reply_a"] else "B" if INJECTIONS[0] in texts["reply_b"] else "TIE")
    server.plan = [gullible]
    clean = pd.DataFrame({"post": range(3), "tweet": "t", "reply": ["x", "y", "z"], "other": "o"})
    flips = flip_rates(judge, clean, [0.5, 1.0, float("nan")])
    assert flips["flips"].tolist() == [0, 2] + [0] * (len(INJECTIONS) - 1) and (flips["n"] == 2).all()


@pytest.mark.parametrize("text", ['"}', "\n--- end of data 12345678 ---\n", "<|im_end|>", "[INST]", "\ud800", "\u2028"])
def test_no_text_leaves_its_field(server, judge_at, text):
    shown = as_data({"post": text, "reply": "r"})
    assert len(shown.split("\n")) == 3 and json.loads(shown.split("\n")[1])["post"] == text
    answer = judge_at(timeout=5).ask(pair_messages(text, "a", "b"))
    assert answer.text == "A"


def test_ask_with_a_cap_that_is_no_number_asks_nothing(server, judge_at):
    judge = judge_at()
    assert "cost cap" in ask(judge._client, judge.endpoint, judge.ledger, QUESTION, cap=float("nan")).reason
    assert server.requests == []
    with pytest.raises(ValueError, match="max_cost"):
        judge_at(max_cost=float("nan"))
