"""Texts that attack: shown letter for letter in HTML and PDF, acting nowhere. Votes that survive a kill and decide."""

import json
import shutil
import subprocess
import sys
import threading

import lxml.html
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_engage.base.core import write_csv
from grpo_engage.evaluation.conclusions import decide
from grpo_engage.judges.browser import (
    VotingBooth,
    browser_widget,
    filter_replies,
    replies_html,
    text_html,
    vote_widget,
    write_browser_html,
)
from grpo_engage.judges.llm_judging import draw_pairs
from grpo_engage.judges.outside_rungs import outside_preferences, update_decision, update_outside
from grpo_engage.judges.votes import append_vote, inspection, read_votes, voter_agreement
from grpo_engage.paper.pdf import build_pdf, escape_latex, latex_obstacle

NASTY = ["<script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">", "$x$ and $$y$$",
         r"\(z\) \[w\] \begin{equation}1\end{equation}", r"\input{/etc/passwd} \write18{touch owned}", "😀" * 5000,
         "**bold** [link](javascript:alert(1)) `code` # head | a | b |", "</td></tr></table></body></html>",
         "a" * 10_000,
         "</style><script>document.title='owned'</script>", "<!--", "]]>", "{{ 1 }} ${1} <%= 1 %>", "&lt;b&gt;", "' \"",
         "日本語 العربية", "one\ntwo", "=1+1"]  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def replies(texts):
    return pd.DataFrame([{"arm": arm, "seed": 0, "post": f"p{i}", "sample": 0, "text": text, "tweet": text,
                          "judge": 0.2, "reward": 0.7}
                         for arm in ("baseline", "hybrid") for i, text in enumerate(texts)])


def parsed(markup):
    return lxml.html.document_fromstring(markup, parser=lxml.html.HTMLParser(encoding="utf-8", huge_tree=True))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_browser_html(tmp_path_factory.mktemp("page") / "browser.html", filter_replies(replies(NASTY)))


def test_page_shows_every_text_letter_for_letter_and_holds_nothing_that_acts(page):
    tree = parsed(page.read_bytes())
    assert sorted(cell.text_content() for cell in tree.iterfind(".//td[@class='text']")) == sorted(NASTY * 2)
    assert {element.tag for element in tree.iter()} <= {
        "html", "head", "meta", "title", "style", "body", "p", "details", "summary", "div", "table", "tr", "td", "th",
        "bdi", "span"}
    assert not tree.xpath("//@*[starts-with(name(), 'on')] | //@href | //@src")
    assert "default-src 'none'" in page.read_text(encoding="utf-8")


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_one_element_without_a_formula(text):
    markup = text_html(text)
    tree = lxml.html.fragment_fromstring(markup)
    assert tree.tag == "bdi" and {child.tag for child in tree} <= {"span"}
    # A formula needs both delimiters in one run of text: no run holds more than a lone $ or backslash.
    for run in tree.itertext():
        assert run in ("$", "\\") or not set(run) & {"$", "\\"}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_chromium_runs_nothing_and_shows_all(page, tmp_path):
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                           "--virtual-time-budget=2000", "--dump-dom", page.as_uri()], capture_output=True, timeout=120)
    tree = parsed(done.stdout)
    assert tree.findtext(".//title") == "Replies" and not list(tree.iter("script", "img"))
    assert sorted(cell.text_content() for cell in tree.iterfind(".//td[@class='text']")) == sorted(NASTY * 2)


@pytest.mark.parametrize("engine", ["typst", "latexmk"])
def test_pdf_of_every_text(tmp_path, engine):
    head = "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage[T1]{fontenc}\n" \
           "\\usepackage{textcomp,booktabs}\n\\begin{document}\n"
    if engine == "latexmk" and latex_obstacle(head) is not None:
        pytest.skip("TeX is not installed on this machine")
    body = "\n\n".join(escape_latex(text) for text in NASTY)
    (tmp_path / "main.tex").write_text(head + body + "\n\\end{document}\n", encoding="utf-8")
    build_pdf(tmp_path, engine)
    assert (tmp_path / "main.pdf").read_bytes().startswith(b"%PDF") and not (tmp_path / "owned").exists()
    if engine == "typst":
        assert (tmp_path / "main.typ").read_text(encoding="utf-8").count("U+1F600") == 5000


def test_notebook_output_of_nasty_texts_and_its_page():
    """The static view inside an executed notebook, then nbconvert's page of it: still no script from the data."""
    import nbformat
    from nbconvert import HTMLExporter

    table = filter_replies(replies(NASTY))
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output(
        "display_data", data={"text/html": replies_html(table)})])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.validate(json.loads(nbformat.writes(notebook)))
    converted = HTMLExporter().from_notebook_node(notebook)[0]
    assert "<script>document.title" not in converted and "<img src=x" not in converted


def test_widgets_filter_and_vote(tmp_path):
    table = replies(NASTY)
    box = browser_widget(table)
    box.children[0].value = "hybrid"
    assert box.children[-1].value.startswith(f"<p>{len(NASTY)} of {len(NASTY)}")
    box.children[2].value = (0.5, 1.0)
    assert box.children[-1].value.startswith("<p>0 of 0")
    booth = VotingBooth(draw_pairs(table, "baseline", limit=3), tmp_path / "votes.csv", "=ann")
    widget = vote_widget(booth)
    shown = widget.children[0].value
    assert "hybrid" not in shown and "baseline" not in shown and "<script" not in shown
    for button in (0, 1, 2):
        widget.children[1].children[button].click()
    assert read_votes(tmp_path / "votes.csv")["vote"].tolist() == ["left", "tie", "right"]
    assert widget.children[1].children[0].disabled
    assert len(VotingBooth(draw_pairs(table, "baseline", limit=3), tmp_path / "votes.csv", "=ann")) == 0


def test_sides_are_balanced_and_the_score_knows_them(tmp_path):
    table = replies([f"text {i}" for i in range(60)])
    table["text"] = table["arm"] + " " + table["text"]
    booth = VotingBooth(draw_pairs(table, "baseline", limit=60), tmp_path / "votes.csv", "ann", seed=1)
    left = []
    while len(booth):
        _, on_left, _ = booth.current()
        left.append(on_left.startswith("hybrid"))
        booth.vote("left" if left[-1] else "right")  # always the hybrid's
    assert 15 < sum(left) < 45
    assert read_votes(tmp_path / "votes.csv")["score"].tolist() == [1.0] * 60


VOTE = {"voter": "ann", "arm": "hybrid", "versus": "baseline", "seed": 0, "versus_seed": 0, "post": "p0", "sample": 0,
        "shown_left": "hybrid", "vote": "left"}


def test_who_votes_again_on_a_pair_means_the_later_vote(tmp_path):
    for voter, vote in (("ann", "left"), ("bob", "tie"), ("ann", "right")):
        append_vote(tmp_path / "votes.csv", VOTE | {"voter": voter, "vote": vote})
    assert dict(read_votes(tmp_path / "votes.csv")[["voter", "score"]].to_numpy()) == {"bob": 0.5, "ann": 0.0}


def test_a_cut_line_loses_one_vote_and_no_other(tmp_path):
    path = tmp_path / "votes.csv"
    for i in range(5):
        append_vote(path, VOTE | {"post": f"p{i}"})
    whole = path.read_bytes()
    for size in range(len(whole) - 1, whole.index(b"\n") + 1, -7):
        path.write_bytes(whole[:size])
        append_vote(path, VOTE | {"post": "new", "voter": 'q"uote,\n'})
        votes = read_votes(path)
        assert votes["post"].tolist()[-1] == "new"
        # "left" cut to "lef" is no vote; a whole last line that only lacks its line end is one
        assert len(votes) == whole[:size].count(b"\n") - 1 + 1 + whole[:size].endswith(b",left")


def test_two_voters_at_once_lose_nothing(tmp_path):
    def cast(name):
        for i in range(25):
            append_vote(tmp_path / "votes.csv", VOTE | {"voter": name, "post": f"p{i}"})
    threads = [threading.Thread(target=cast, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = read_votes(tmp_path / "votes.csv")
    assert votes["voter"].value_counts().to_dict() == {"ann": 25, "bob": 25}
    assert voter_agreement(votes)["share"].item() == 1.0


def test_a_vote_is_on_disk_when_the_process_is_killed(tmp_path):
    path = tmp_path / "votes.csv"
    program = "import os; from grpo_engage.judges.votes import append_vote; append_vote"
    program += f"; append_vote({str(path)!r}, {VOTE!r}); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert len(read_votes(path)) == 1


@pytest.mark.parametrize(("wins", "status"), [(20, "met"), (11, "inconclusive"), (2, "not met"),
                                              (None, "inconclusive")])
def test_votes_decide_the_criterion_and_no_other(tmp_path, wins, status):
    rng = np.random.default_rng(0)
    by_post = pd.DataFrame([{"arm": arm, "seed": seed, "post": post, "metric": metric, "value": rng.random()}
                            for arm in ("baseline", "hybrid") for seed in range(3) for post in range(8)
                            for metric in ("pass@1", "pass@5", "pass@10", "self_bleu", "rouge_l", "judge_engagement")])
    before = decide(by_post)
    write_csv(tmp_path / "evaluation" / "decision.csv", before)
    for i in range(20 if wins is not None else 0):
        append_vote(tmp_path / "evaluation" / "votes.csv",
                    VOTE | {"post": f"p{i}", "vote": "left" if i < wins else "right"})
    after = update_decision(tmp_path)
    manual = after["criterion"] == "manual inspection passed"
    assert after[manual]["status"].tolist() == [status]
    if wins is None:
        assert after[manual]["reason"].item() == "not done: no votes" and after[manual]["ci_low"].isna().all()
    else:
        assert after[manual]["value"].item() == wins / 20 and after[manual]["ci_low"].notna().all()
        assert "manual inspection" in (tmp_path / "evaluation" / "recommendation.txt").read_text() or status == "met"
    columns = ["arm", "tier", "criterion", "value", "ci_low", "ci_high", "p_holm", "status", "reason"]
    pd.testing.assert_frame_equal(after[~manual][columns], before[~manual][columns])
    # decide() itself takes the same votes
    votes = inspection(read_votes(tmp_path / "evaluation" / "votes.csv"))
    assert decide(by_post, votes).loc[manual, "status"].tolist() == [status]


def test_many_votes_on_one_post_are_one_post(tmp_path):
    for i in range(30):
        append_vote(tmp_path / "votes.csv", VOTE | {"voter": f"v{i}"})
    found = inspection(read_votes(tmp_path / "votes.csv"))
    assert found["n"].item() == 1 and found["ci_low"].item() < 0.1


def test_votes_and_verdicts_are_rungs_held_against_every_score(tmp_path):
    """People who vote by a score that is kept with the replies agree with it on every pair; ties say nothing."""
    table = pd.concat([replies([f"text {i}" for i in range(24)]).assign(sample=sample) for sample in (0, 1)])
    random = np.random.default_rng(0)
    table = table.assign(gold=random.random(len(table)), judge=random.random(len(table)), reward=0.5, n_words=2)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    table.to_parquet(folder / "scores.parquet")
    gold = table.set_index(["arm", "seed", "post", "sample"])["gold"]
    pairs = draw_pairs(table.assign(tweet="post"), "baseline", limit=40)
    for number, row in enumerate(pairs.itertuples()):
        lead = gold[row.arm, row.seed, row.post, row.sample] - gold[
            row.versus, row.versus_seed, row.post, row.versus_sample]
        append_vote(folder / "votes.csv", VOTE | {
            "arm": row.arm, "versus": row.versus, "seed": row.seed, "versus_seed": row.versus_seed, "post": row.post,
            "sample": row.sample, "shown_left": row.arm,
            "vote": "tie" if number % 10 == 0 else "left" if lead > 0 else "right"})
    judged = folder / "llm_judge" / "a-model"
    judged.mkdir(parents=True)
    pairs.assign(verdict=1.0, repeat=0).to_parquet(judged / "pairwise.parquet")
    pd.testing.assert_frame_equal(
        outside_preferences(tmp_path).query("rung == 'votes'")[["versus_sample"]].reset_index(drop=True),
        pairs.sort_values(["arm", "seed", "post", "sample"])[["versus_sample"]].reset_index(drop=True))
    shown = pd.concat([pairs[["arm", "seed", "post", "sample"]], pairs.rename(columns={
        "arm": "_", "versus": "arm", "seed": "__", "versus_seed": "seed", "sample": "___", "versus_sample": "sample"})[
            ["arm", "seed", "post", "sample"]]]).drop_duplicates(ignore_index=True)
    shown["score"] = [1.0 + round(3 * gold[tuple(row)]) for row in shown.itertuples(index=False)]  # coarse: ties happen
    pd.concat([shown, shown.assign(score=np.nan)]).to_parquet(judged / "absolute.parquet")  # one repeat failed
    found = update_outside(tmp_path).set_index(["rung", "other"])
    assert list(found.index.unique("rung")) == ["llm a-model", "llm a-model scores", "votes"]
    decided = [(own.post, own.score > rival.score) for own in shown.itertuples() for rival in shown.itertuples()
               if (own.arm, rival.arm) == ("hybrid", "baseline") and own.post == rival.post
               and own.score != rival.score]
    row = found.loc[("llm a-model scores", "gold")]  # gold rounded: whatever it decides, it decides as gold does
    assert row["agreement"] == 1 and row["n_pairs"] == len(decided) > 5
    assert row["n_posts"] == len({post for post, _ in decided})
    assert found.loc[("votes", "gold"), "agreement"] == 1 and found.loc[("votes", "gold"), "n_pairs"] == 36
    leads = [gold[row.arm, row.seed, row.post, row.sample] > gold[row.versus, row.versus_seed, row.post,
                                                                  row.versus_sample] for row in pairs.itertuples()]
    by_post = pd.Series(leads, dtype=float).groupby(pairs["post"].to_numpy()).mean()
    assert np.isclose(found.loc[("llm a-model", "gold"), "agreement"], by_post.mean())
    assert found.loc[("votes", "reward"), "agreement"] == 0.5 and found["systems"].isna().all()  # one arm
