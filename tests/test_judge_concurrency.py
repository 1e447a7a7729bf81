"""Several calls of the language judge at a time: the same tables, the same order, the cap kept, the early stops too."""

import json
import threading
import time

import pandas as pd
import pytest
from endpoint_double import serving

from grpo_engage.judges.endpoint import Endpoint, most_tokens
from grpo_engage.judges.llm_client import Ledger
from grpo_engage.judges.llm_judge import LlmJudge, flip_rates, judge_pairs, judge_replies, pair_messages
from grpo_engage.judges.llm_judging import judge_run

PAIRS = pd.DataFrame({"arm": "grpo", "post": range(12), "tweet": [f"post {i}" for i in range(12)],
                      "reply": ["yes " * (i % 5 + 1) for i in range(12)], "other": "no no no"})


def said(word, **more):
    return 200, {}, json.dumps({"choices": [{"message": {"content": word}}]} | more).encode()


def rule(body):
    """An answer that depends on the question alone; a tenth of them are slow, so that calls end out of order."""
    texts = json.loads(body["messages"][1]["content"].split("\n")[1])
    time.sleep(0.03 if sum(map(ord, "".join(texts.values()))) % 10 == 0 else 0.002)
    used = {"usage": {"prompt_tokens": sum(map(len, texts.values())), "completion_tokens": 1}}
    if "reply" in texts:
        return said(str(len(texts["reply"]) % 10 + 1), **used)
    a, b = len(texts["reply_a"]), len(texts["reply_b"])
    return said("TIE" if a == b else "A" if a > b - 3 else "B", **used)


@pytest.fixture
def server():
    """`answer`: a function of the body. `most_busy`: how many calls were open at a time."""
    lock = threading.Lock()

    def answer(state, body):
        with lock:
            state.busy += 1
            state.most_busy = max(state.busy, state.most_busy)
        try:
            return state.answer(body)
        finally:
            with lock:
                state.busy -= 1

    with serving(answer) as state:
        state.answer, state.busy, state.most_busy = rule, 0, 0
        yield state


@pytest.fixture
def judge_at(server, tmp_path):
    def make(concurrency, name="answers", max_cost=float("inf"), sleep=time.sleep, **terms):
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", **({"timeout": 20} | terms))
        return LlmJudge(endpoint, Ledger(tmp_path / f"{name}.sqlite"), max_cost=max_cost, sleep=sleep,
                        concurrency=concurrency)
    return make


def judged(judge):
    pairs = judge_pairs(judge, PAIRS, repeats=2)
    return {"pairs": pairs, "replies": judge_replies(judge, PAIRS.drop(columns="other")),
            "flips": flip_rates(judge, PAIRS.head(4), pairs["verdict"].head(4))}


def same(one, other):
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, other[name], check_exact=True)


def test_eight_give_what_one_gives(server, judge_at):
    alone = judged(judge_at(1, "one"))
    assert server.most_busy == 1
    asked = len(server.requests)
    together = judged(judge_at(8, "eight"))
    assert 1 < server.most_busy <= 8 and len(server.requests) == 2 * asked
    same(alone, together)
    assert judged(judge_at(8, "one")) and len(server.requests) == 2 * asked  # one ledger serves the other


def test_the_files_of_a_run_are_the_same_bytes(server, tmp_path):
    rows = [(arm, 0, "test", f"c{post}", sample, f"{arm} {'word ' * (post + sample)}".strip())
            for arm in ("baseline", "grpo") for post in range(4) for sample in range(2)]
    made = pd.DataFrame(rows, columns=["arm", "seed", "split", "post", "sample", "text"])
    posts = pd.DataFrame({"conversation_id": [f"c{post}" for post in range(4) for _ in range(2)], "split": "test",
                          "tweet": [f"post {post}" for post in range(4) for _ in range(2)],
                          "reply": [f"reply {i}" for i in range(8)], "reply_likes": 1.0, "row": range(8)})
    found = {}
    for concurrency in (1, 8):
        run = tmp_path / str(concurrency)
        for folder in ("evaluation", "data"):
            (run / folder).mkdir(parents=True)
        made.to_parquet(run / "evaluation" / "generations.parquet", index=False)
        posts.to_parquet(run / "data" / "pairs.parquet", index=False)
        judge_run(run, Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m"), limit=8, injected=1,
                  concurrency=concurrency)
        folder = run / "evaluation" / "llm_judge" / "m"
        found[concurrency] = {path.name: path.read_bytes() for path in folder.iterdir()
                              if path.suffix in (".csv", ".parquet")}
    assert len(found[1]) == 5 and found[1] == found[8]


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_the_cap_holds_with_slow_answers_and_the_same_is_answered(server, judge_at, share):
    """Each answer is slow and says what it did cost: far less than was set aside for it."""
    terms = {"price_in": 1e4, "price_out": 1e4, "max_tokens": 64}
    free = judge_at(1, f"free{share}", **terms)
    judge_pairs(free, PAIRS)
    dearest = free.endpoint.cost(most_tokens(pair_messages("post 1", "yes " * 5, "no no no")), 64)
    cap = share * free.ledger.spent + dearest
    tables = {}
    for concurrency in (1, 8):
        judge = judge_at(concurrency, f"capped{share}-{concurrency}", max_cost=cap, **terms)
        over, watch = [], threading.Event()

        def look(ledger=judge.ledger, over=over, watch=watch):
            while not watch.wait(0.001):
                over.append(ledger.spent)

        thread = threading.Thread(target=look)
        thread.start()
        tables[concurrency] = judge_pairs(judge, PAIRS)
        watch.set()
        thread.join()
        assert max(over) <= cap and judge.ledger.spent <= cap
    assert tables[1]["reason"].str.contains("cost cap").any() and tables[1]["verdict"].notna().any()
    pd.testing.assert_frame_equal(tables[1], tables[8], check_exact=True)


def test_failures_that_cost_do_not_pass_the_cap_either(server, judge_at):
    server.answer = lambda body: (500, {}, b"") if len(server.requests) % 2 else said("A")
    terms = {"price_in": 1e4, "price_out": 1e4, "max_tokens": 16}
    cap = 10 * judge_at(1, **terms).endpoint.cost(most_tokens(pair_messages("post 1", "yes", "no no no")), 16)
    judge = judge_at(8, "failing", max_cost=cap, sleep=lambda seconds: None, **terms)
    judge_pairs(judge, PAIRS, repeats=3)
    assert 0.5 * cap < judge.ledger.spent <= cap


def test_a_server_that_dies_stops_eight_as_it_stops_one(server, judge_at):
    def dies(body):
        return rule(body) if "post 0" in body["messages"][1]["content"] else (500, {}, b"dead")
    server.answer = dies
    tables, requests = {}, {}
    for concurrency in (1, 8):
        before = len(server.requests)
        judge = judge_at(concurrency, str(concurrency), tries=1, sleep=lambda seconds: None)
        tables[concurrency] = judge_pairs(judge, PAIRS, repeats=3)
        requests[concurrency] = len(server.requests) - before
    pd.testing.assert_frame_equal(tables[1], tables[8], check_exact=True)
    assert requests[1] == 2 + LlmJudge.LOST_IN_A_ROW <= requests[8] <= 2 + 8 + LlmJudge.LOST_IN_A_ROW


def test_a_model_without_verdicts_ends_after_the_same_eight(server, judge_at):
    server.answer = lambda body: said("I cannot say")
    with pytest.raises(RuntimeError, match="no verdict in its first 8 answers"):
        judge_pairs(judge_at(8), PAIRS)
    assert len(server.requests) == LlmJudge.UNUSABLE_AT_FIRST and server.most_busy == 1


def test_a_server_that_asks_for_time_gets_it_from_all(server, judge_at):
    """One 429 among calls that are side by side: none starts before its Retry-After is over."""
    at, limited = [], []

    def limits(body):
        at.append(time.monotonic())
        if len(at) == 6:
            limited.append(time.monotonic())
            return 429, {"Retry-After": "1"}, b""
        time.sleep(0.05)
        return said("A")

    server.answer = limits
    table = judge_pairs(judge_at(4), PAIRS)
    assert table["reason"].eq("").all() and len(limited) == 1
    late = [moment - limited[0] for moment in at[6:]]
    # what was on its way, or just starting, arrives at once; everything else when the second is over
    assert sum(moment < 0.9 for moment in late) <= 8 and sum(moment >= 0.9 for moment in late) >= len(late) - 8 > 8


def test_the_same_question_is_not_paid_for_twice(server, judge_at):
    server.answer = lambda body: time.sleep(0.02) or said("A")
    twice = pd.concat([PAIRS.head(3)] * 3, ignore_index=True)
    table = judge_pairs(judge_at(8), twice)
    assert len(server.requests) == 6 and table["verdict"].notna().all()


def test_eight_are_faster_where_a_call_takes_50_milliseconds(server, judge_at):
    """Waiting is most of a call, so this holds on a busy machine too; 8 at a time could be 8 times as fast."""
    server.answer = lambda body: time.sleep(0.05) or said("A")
    seconds = {}
    for concurrency in (1, 8):
        start = time.monotonic()
        judge_pairs(judge_at(concurrency, str(concurrency)), PAIRS, repeats=3)  # 72 calls: 3.6 s of waiting
        seconds[concurrency] = time.monotonic() - start
    print(f"72 calls of 50 ms: {seconds[1]:.2f} s one at a time, {seconds[8]:.2f} s eight at a time")
    assert seconds[1] > 3.6 and seconds[8] < seconds[1] / 2.5


@pytest.mark.parametrize("concurrency", [0, -1, 65])
def test_a_number_of_calls_that_makes_no_sense_is_refused(judge_at, concurrency):
    with pytest.raises(ValueError, match="concurrency is"):
        judge_at(concurrency)
