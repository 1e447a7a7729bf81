"""The language judge against a table of endpoints: each ends in the right verdicts, or in one line with the cause."""

import hashlib
import json
import re
import sqlite3
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pandas as pd
import pytest
from endpoint_double import serving

from grpo_engage.base.core import read_json, write_parquet
from grpo_engage.judges.chat_form import Form, after_refusal, request_body
from grpo_engage.judges.endpoint import Endpoint
from grpo_engage.judges.llm_client import Answer, Ledger
from grpo_engage.judges.llm_judge import LlmJudge, judge_pairs, judge_replies, pair_messages
from grpo_engage.judges.llm_judging import judge_run
from grpo_engage.judges.verdicts import parse_absolute, parse_pair
from grpo_engage.run.cli import main

# What readers like is the reply with a question mark: the double knows, so every verdict has one right value.
PAIRS = pd.DataFrame({"arm": "grpo", "post": range(3),
                      "tweet": ["Rain again 🌧️ in Köln…", "東京は今日も暑いですね。", "«A» or «B»?"],
                      "reply": ["Bring a hat! 🎩 Or two?", "そうですね。", "B, says my mum: “A is for apple”"],
                      "other": ["So it is.", "冷たいお茶はどうですか?", "Which one is A, my dear?"]})
VERDICTS, SCORES = [1.0, 0.0, 0.0], [8.0, 3.0, 3.0]


def right(body):
    """The right answer to a request, from its texts."""
    texts = json.loads(body["messages"][-1]["content"].split("--- ")[1].split("\n")[1])
    return ("8" if "?" in texts["reply"] else "3") if "reply" in texts else "A" if "?" in texts["reply_a"] else "B"


def chat(content, finish="stop", status=200, **more):
    return status, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content} | more,
                                                "finish_reason": finish}]}).encode()


def error(status, /, **fields):
    return status, {}, json.dumps({"error": fields}).encode()


def says(form):
    """An endpoint that puts its verdict into `form`."""
    return lambda body, state: chat(form.replace("X", right(body)))


def thinks(body, state, unit="Reply A asks, and reply B does not; a score of 7 or 10. "):
    """A page of thoughts of 1500 tokens, then the letter; cut at the limit, as a server does."""
    whole = body.get("max_tokens", body.get("max_completion_tokens", 10**6)) >= 1500
    return chat("<think>" + unit * 30 + (f"</think>\n\n{right(body)}" if whole else ""), "stop" if whole else "length")


def thinks_apart(field):
    def answer(body, state):
        whole = body["max_tokens"] >= 1500
        return chat(right(body) if whole else [None, ""][state["calls"] % 2], "stop" if whole else "length",
                    **{field: "A? B? 7? So the answer is A"})
    return answer


def rejects(name, refusal):
    """An endpoint that refuses a request that has parameter `name` (or role), in its own words."""
    def answer(body, state):
        if name in body or name == body["messages"][0]["role"]:
            state["refused"] += 1
            return refusal
        return chat(right(body))
    return answer


def o_series(body, state):
    for name, message in (("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                                         "'max_completion_tokens' instead."),
                          ("temperature", "Unsupported value: 'temperature' does not support 0 with this model. Only "
                                          "the default (1) value is supported.")):
        if name in body:
            state["refused"] += 1
            return error(400, message=message, type="invalid_request_error", param=name, code="unsupported_parameter")
    return thinks(body, state)


def strict(allowed):
    """Knows some parameters alone, and names one that it does not know at a time."""
    def answer(body, state):
        if odd := [name for name in body if name not in allowed]:
            state["refused"] += 1
            return error(400, message=f"Unrecognized request argument supplied: {odd[0]}", param=None)
        return chat(right(body))
    return answer


def at_most(tokens, message):
    def answer(body, state):
        if body["max_tokens"] > tokens:
            state["refused"] += 1
            return error(400, message=message.format(asked=body["max_tokens"], most=tokens), param="max_tokens")
        return chat(right(body))
    return answer


def once(trouble):
    """Trouble at the first call, then right answers."""
    return lambda body, state: trouble if state["calls"] == 1 else chat(right(body))


def always(*reply):
    return lambda body, state: reply


SOON = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
PAGE = (502, {"Content-Type": "text/html"}, b"<!doctype html><html><title>Bad gateway</title></html>")
HARMONY = "<|channel|>analysis<|message|>A? B? 10?<|end|><|start|>assistant<|channel|>final<|message|>X<|return|>"

# name: endpoint, the most refused requests (each is one that was learned from), the most calls that cost something
USABLE = {
    "letter": (says("X"), 0, 9), "bold": (says("**X**"), 0, 9), "labelled": (says("Both are kind.\n\nAnswer: X"), 0, 9),
    "boxed": (says("So $\\boxed{\\text{X}}$."), 0, 9),
    "json": (says('```json\n{"why": "A asks", "answer": "X"}\n```'), 0, 9),
    "lower case": (lambda body, state: chat(right(body).lower()), 0, 9),
    "full width": (lambda body, state: chat(chr(ord(right(body)) + 0xFEE0)), 0, 9),
    "thoughts before": (says("<think>\nA, no, B. 10!\n</think>\n\nX"), 0, 9),
    "thoughts without their first mark": (says("A it is\n</think>\nX"), 0, 9),
    "harmony": (says(HARMONY), 0, 9), "harmony without its marks": (says("analysisA or B, 7?assistantfinalX"), 0, 9),
    "mistral": (says("[THINK]A[/THINK]X"), 0, 9), "template's end left in": (says("X<|im_end|>"), 0, 9),
    "parts": (lambda body, state: chat([{"type": "thinking", "thinking": [{"type": "text", "text": "A"}]},
                                        {"type": "text", "text": right(body)}]), 0, 9),
    "always says length": (lambda body, state: chat(f"<think>A</think> {right(body)}", "length"), 0, 9),
    "long thoughts": (thinks, 0, 10), "reasoning_content": (thinks_apart("reasoning_content"), 0, 10),
    "reasoning": (thinks_apart("reasoning"), 0, 10), "o-series": (o_series, 2, 10),
    "no seed (pydantic)": (rejects("seed", (422, {}, json.dumps({"detail": [{
        "type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs not permitted"}]}).encode())), 1, 9),
    "no seed (google)": (rejects("seed", error(400, code=400, status="INVALID_ARGUMENT", message=(
        'Invalid JSON payload received. Unknown name "seed": Cannot find field.'))), 1, 9),
    "temperature 0 (tgi)": (rejects("temperature", (
        422, {}, b'{"error": "Input validation error: `temperature` must be strictly positive"}')), 1, 9),
    "no system role (template)": (rejects("system", (
        400, {}, b'{"object": "error", "message": "System role not supported"}')), 1, 9),
    "no system role (o1-mini)": (rejects("system", error(400, param="messages[0].role", message=(
        "Unsupported value: 'messages[0].role' does not support 'system' with this model."))), 1, 9),
    "knows only max_tokens": (strict({"model", "messages", "max_tokens"}), 3, 9),
    "knows only max_completion_tokens": (strict({"model", "messages", "max_completion_tokens"}), 4, 9),
    "knows no limit": (strict({"model", "messages"}), 5, 9),
    "rejects logprobs, n and stop": (strict({
        "model", "messages", "max_tokens", "temperature", "seed", "stream"}), 0, 9),
    "own limit": (at_most(300, "max_tokens is too large: {asked}. This model supports at most {most} completion"
                               " tokens"), 2, 9),
    "own range": (at_most(600, "Invalid max_tokens value, the valid range of max_tokens is [1, {most}]"), 1, 9),
    "short context": (at_most(600, "This model's maximum context length is 900 tokens. However, you requested {asked} "
                                   "tokens in the completion. Please reduce the length of the messages."), 9, 9),
    "429 in seconds": (once((429, {"Retry-After": "7"}, b"slow down")), 0, 10),
    "429 with a date": (once((429, {"Retry-After": SOON}, b"")), 0, 10), "503": (once((503, {}, b"")), 0, 10),
    "a gateway's page": (once(PAGE), 0, 10), "a page with 200": (once((200, *PAGE[1:])), 0, 10),
    "no choices, once": (once((200, {}, b'{"choices": []}')), 0, 10),
    "an error with 200": (once((200, {}, b'{"error": {"message": "overloaded", "code": 502}}')), 0, 10),
}
# name: endpoint, what the one line says, the most calls
UNUSABLE = {
    "chatters": (says("As an AI, I'd say \x1b[31mX\u202e is\nnice"),
                 r"first 8 answers.*\\x1b\[31m.*finish_reason 'stop'", 8),
    "thinks for ever": (lambda body, state: chat("<think>A, or B? " * 50, "length"),
                        r"nothing after its thoughts; finish_reason 'length', limit 8192 tokens.*--max-tokens", 9),
    "thoughts without an answer": (lambda body, state: chat("", "stop", reasoning_content="Answer: A"),
                                   "nothing after its thoughts; finish_reason 'stop'", 8),
    "null": (lambda body, state: chat(None), r"unparseable: ''.*finish_reason 'stop'", 8),
    "refuses": (lambda body, state: chat(None, refusal="I can't help with that."), "refusal: I can't help", 8),
    "filters": (lambda body, state: chat("", "content_filter"), "content_filter", 8),
    "rejects every question": (always(400, {}, b'{"error": "blocked by policy"}'), "blocked by policy.*refuses", 8),
    "streams": (always(200, {"Content-Type": "text/event-stream"}, b"data: {}\n\n"), "turn streaming off", 1),
    "streams unnamed": (always(200, {}, b"data: {}\n\n"), "turn streaming off", 1),
    "401": (always(401, {}, b"who are you"), "HTTP 401.*check the address and the key in GRPO_ENGAGE_JUDGE_KEY", 1),
    "404": (always(404, {}, b"model not found"), "HTTP 404.*name of the model.*model not found", 1),
    "407": (always(407, {}, b""), "HTTP 407.*proxy of the environment", 1),
    "redirects": (always(307, {"Location": "http://192.0.2.1/v1?key=sk-secret-9"}, b""),
                  "redirects to 'http://192.0.2.1/v1'", 1),
    "500": (always(500, {}, b"Traceback:\n  boom"), r"no verdict.*HTTP 500: 'Traceback:\\n", 25),
    "gateway": (always(*PAGE), "no verdict.*HTTP 502.*Bad gateway", 25),
    "gateway with 200": (always(200, *PAGE[1:]), "no verdict.*an HTML page", 25),
    "no choices": (always(200, {}, b'{"choices": []}'), "no verdict.*no choices", 25),
    "another protocol": (always(200, {}, b'{"message": {"content": "A"}}'), "no verdict.*no choices.*message", 25),
    "no money": (always(429, {}, b'{"error": {"code": "insufficient_quota"}}'), "no verdict.*insufficient_quota", 25),
    "an hour": (always(429, {"Retry-After": "3600"}, b""), "no verdict.*HTTP 429", 5),
    "deep": (always(200, {}, b"[" * 50_000), "no verdict.*no JSON", 25),
}


@pytest.fixture
def server():
    """`plan`: the endpoint, a function of the request's body and of a counter; `requests`: headers and bodies."""
    def answer(state, body):
        state.count["calls"] += 1
        return state.plan(body, state.count)

    with serving(answer) as state:
        state.plan, state.count = says("X"), {"calls": 0, "refused": 0}
        yield state


@pytest.fixture
def judge_at(server, tmp_path):
    def make(**terms):
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", **terms)
        return LlmJudge(endpoint, Ledger(tmp_path / "answers.sqlite"), sleep=lambda seconds: None)
    return make


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A finished run of two arms, as far as the judge reads it; the command is called with its server's address."""
    folder = tmp_path / "runs" / "tiny"
    rows = [{"arm": arm, "seed": 0, "post": post, "sample": sample, "split": "test",
             "text": ["So it is.", "Really? 🎩", "Ja, schön…"][(sample + 2 * (arm == "grpo")) % 3]}
            for arm in ("baseline", "grpo") for post in range(4) for sample in range(3)]
    write_parquet(folder / "evaluation" / "generations.parquet", pd.DataFrame(rows))
    write_parquet(folder / "data" / "pairs.parquet", pd.DataFrame(
        {"conversation_id": [*range(4)] * 2, "tweet": [f"post {i} 🌧️" for i in range(4)] * 2, "reply": "real",
         "split": "test"}))
    monkeypatch.setenv("GRPO_ENGAGE_RUNS", str(folder.parent))
    monkeypatch.setitem(judge_run.__kwdefaults__, "sleep", lambda seconds: None)
    return folder


def command(server, *more):
    return main(["judge", "--run", "tiny", "--model", "m", "--url", f"http://127.0.0.1:{server.server_port}/v1",
                 "--limit", "4", "--repeats", "1", "--injected", "0", *more])


@pytest.mark.parametrize("name", USABLE)
def test_a_usable_endpoint_gives_the_right_verdicts(server, judge_at, name):
    """Nine questions: a refusal is learned from once, a cut answer is asked for again once, nothing is paid twice."""
    server.plan, most_refused, most_paid = USABLE[name]
    for again in (False, True):
        judge, before = judge_at(), server.count["calls"]
        judged, rated = judge_pairs(judge, PAIRS), judge_replies(judge, PAIRS.drop(columns="other"))
        assert judged["verdict"].tolist() == VERDICTS, judged["reason"].tolist()
        assert rated["score"].tolist() == SCORES, rated["reason"].tolist()
        assert not again or server.count["calls"] == before
    assert server.count["refused"] <= most_refused
    assert server.count["calls"] - server.count["refused"] <= most_paid
    assert len(judge.form.changes) == 0  # the second judge had no need to learn


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_endpoint_ends_the_command_in_one_line(server, run_folder, capsys, monkeypatch, name):
    server.plan, cause, most_calls = UNUSABLE[name]
    monkeypatch.setenv("GRPO_ENGAGE_JUDGE_KEY", "sk-secret-9")
    assert command(server) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("error: ") and re.search(cause, line), line
    assert "\x1b" not in line and "\u202e" not in line and "sk-secret-9" not in line and len(line) < 700
    assert server.count["calls"] <= most_calls, line
    assert read_json(run_folder / "evaluation" / "llm_judge" / "m" / "manifest.json")["status"] == "failed"
    answered = server.count["calls"]
    if "first 8 answers" in line and "refuses the questions" not in line:  # answers are paid for once
        assert command(server) == 1 and server.count["calls"] == answered
        assert capsys.readouterr().err == line


def test_a_usable_endpoint_from_the_command_line(server, run_folder, capsys):
    server.plan = thinks
    assert command(server, "--max-tokens", "1500") == 0
    said = capsys.readouterr().out
    assert "12 of 12 verdicts and scores are there" in said and len(server.requests) == 8 + 8
    assert {body["max_tokens"] for _, _, body in server.requests} == {1500}
    record = read_json(run_folder / "evaluation" / "llm_judge" / "m" / "manifest.json")
    assert record["parameters"]["max_tokens"] == 1500 and record["status"] == "completed" and record["missing"] == {}


def test_a_change_of_the_limit_loses_no_paid_verdict(server, judge_at):
    """Cut answers alone are asked again, and only with more room than they had."""
    server.plan = lambda body, state: thinks(body, state) if "Köln" in str(body) else chat(right(body))
    first = judge_pairs(judge_at(max_tokens=100), PAIRS)
    assert first["verdict"].isna().tolist() == [True, False, False]
    assert first["reason"][0].endswith("finish_reason 'length', limit 800 tokens)")
    calls = server.count["calls"]
    judge_pairs(judge_at(max_tokens=50), PAIRS)
    assert server.count["calls"] == calls
    assert judge_pairs(judge_at(max_tokens=2000), PAIRS)["verdict"].tolist() == VERDICTS
    assert server.count["calls"] == calls + 2


def test_a_ledger_of_before_the_limit_was_kept_is_read(judge_at, server, tmp_path):
    """The file as it was: three columns, and answers to requests of 16 tokens."""
    url = f"http://127.0.0.1:{server.server_port}/v1"
    asked = [pair_messages("post", "Why?", text) for text in ("Yes.", "No.")]
    base = sqlite3.connect(tmp_path / "answers.sqlite")
    base.execute("CREATE TABLE answers (request TEXT PRIMARY KEY, model TEXT, answer TEXT)")
    for messages, text in zip(asked, ("Reply B", "<think> I weigh"), strict=True):
        body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 16, "seed": 0}
        key = hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()
        base.execute("INSERT INTO answers VALUES (?, 'm', ?)", (key, text))
    base.commit()
    base.close()
    judge = judge_at()
    assert judge.estimate([(messages, 0) for messages in asked])["calls"] == 1
    assert judge.ask(asked[0]).text == "Reply B" and server.requests == []
    assert judge.ask(asked[1]).text == "A" and len(server.requests) == 1


def test_a_paid_endpoint_keeps_a_limit(judge_at, server, tmp_path):
    """Without a limit no price can be kept: such a service is asked nothing, and the reason is its own refusal."""
    server.plan = strict({"model", "messages"})
    far = Endpoint("https://api.example/v1", "m", price_in=1, price_out=1)
    form, limits = Form.of(far), []
    while limits[-1:] != [0] and len(limits) < 20:
        body = request_body(far, pair_messages("p", "a", "b"), 0, form)
        _, _, said = server.plan(body, server.count)
        limits.append(after_refusal(form, body, said, far, form.limit))
    assert limits[-1] == 0 and len(limits) <= 6


ENDS = ("</think>", "<|channel|>final<|message|>")
WORDS = ["A", "B", "TIE", "reply_a", "because", "not", "or", "and", "the answer is", "better", ":", ".", "\n", "**",
         "7", "10", "Ａ", "<think>", "\\boxed{", "}", "🙂", "あ", '{"', '"}', "[THINK]", "\u200b", *ENDS]


def test_no_letter_of_the_thoughts_is_a_verdict():
    """4000 random texts: what stands before the mark that ends the thoughts changes nothing; nothing raises."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(4000):
        thoughts, final = (" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(2))
        for parse in (parse_pair, parse_absolute):
            whole, alone = parse(Answer(f"<think>{thoughts}</think>{final}")), parse(Answer(f"<think></think>{final}"))
            assert whole[0] == alone[0] or np.isnan(whole[0]) and np.isnan(alone[0]), (thoughts, final)
            cut = re.sub("|".join(map(re.escape, ENDS)), "", thoughts)
            assert np.isnan(parse(Answer(f"<think>{cut}"))[0])
            found += not np.isnan(whole[0])
    assert found > 100


PROXY_NAMES = [name for kind in ("http", "https", "all", "no") for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")]


@pytest.mark.parametrize("variables", [("HTTP_PROXY",), ("http_proxy",), ("ALL_PROXY",), ("all_proxy", "HTTPS_PROXY")])
@pytest.mark.parametrize(("host", "through"), [
    ("127.0.0.1", False), ("localhost", False), ("LOCALHOST", False), ("[::1]", False), ("127.0.0.2", False),
    ("0.0.0.0", False), ("[::ffff:127.0.0.1]", False), ("judge.example", True), ("localhost.example", True)])
def test_the_proxy_matrix(server, tmp_path, monkeypatch, variables, host, through):
    """What a proxy of the environment sees: nothing for this machine, the call for another one."""
    for name in PROXY_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GRPO_ENGAGE_JUDGE_KEY", "sk-secret-9")
    server.plan = says("X")
    endpoint = Endpoint(f"http://{host}:9/v1", "m", price_in=0, price_out=0, tries=1, timeout=5)
    judge = LlmJudge(endpoint, Ledger(tmp_path / "answers.sqlite"), sleep=lambda seconds: None)
    answer = judge.ask(pair_messages("a private post", "Why?", "Yes."))
    assert len(server.requests) == through
    assert answer.text == "A" if through else "no connection" in answer.reason


def test_no_proxy_counts_and_a_broken_proxy_is_named(server, tmp_path, monkeypatch):
    for name in PROXY_NAMES:
        monkeypatch.delenv(name, raising=False)
    far = Endpoint("http://judge.invalid:9/v1", "m", price_in=0, price_out=0, tries=1, timeout=5)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8, ::1,.invalid")
    assert "no connection" in LlmJudge(far, Ledger(tmp_path / "l")).ask(pair_messages("p", "a", "b")).reason
    assert server.requests == []
    for broken in ("socks9://127.0.0.1:1", "http://[::1", "http://user:pa55word@host:notaport"):
        monkeypatch.setenv("HTTP_PROXY", broken)
        with pytest.raises(ValueError, match="a proxy of the environment") as caught:
            LlmJudge(far, Ledger(tmp_path / "l"))
        assert "pa55word" not in str(caught.value)


def test_a_redirect_never_carries_the_key(server, judge_at, monkeypatch):
    """To another name of this machine, where it would be seen."""
    monkeypatch.setenv("GRPO_ENGAGE_JUDGE_KEY", " sk-secret-9\n")
    elsewhere = f"http://localhost:{server.server_port}/stolen"
    for status in (301, 302, 303, 307, 308):
        server.plan = always(status, {"Location": elsewhere}, b"")
        with pytest.raises(RuntimeError, match="which is not followed"):
            judge_at().ask(pair_messages("p", "a", str(status)))
    assert [path for path, *_ in server.requests] == ["/v1/chat/completions"] * 5
    assert server.requests[0][1]["Authorization"] == "Bearer sk-secret-9"  # without the line's end


def test_a_key_that_no_header_carries_is_not_shown(server, judge_at, monkeypatch):
    monkeypatch.setenv("GRPO_ENGAGE_JUDGE_KEY", "sk-sécret-…9")
    with pytest.raises(RuntimeError, match="no header can carry") as caught:
        judge_at().ask(pair_messages("p", "a", "b"))
    assert "cret" not in str(caught.value) and server.requests == []
