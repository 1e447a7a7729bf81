"""Data as people have it: exports of services with everything that is wrong in them, and files by other names."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_engage.base.core import read_json
from grpo_engage.data.importing import import_pairs
from grpo_engage.data.pairs import data_stage
from grpo_engage.data.pseudonyms import Pseudonyms
from grpo_engage.data.reading import look_at, read_pairs
from grpo_engage.run.cli import main
from grpo_engage.run.graph import made_from, outside_files
from grpo_engage.run.settings import load_preset, resolve_config

TEXTS = ["Ist die Brücke zu? @Ada_L", "橋は閉まっていますか 🌉", "AT&amp;T &lt;3 and 5 &gt; 4", "هل الجسر مغلق؟",
         "=SUM(A1) @bob", "so \ud83d", "line\none\u2028two", "&amp;lt;b&amp;gt;", "<script>alert(1)</script>", "a\0b",
         "x" * 50_000, "  "]


def accounted(out):
    """The report of an import: every post that was read is in exactly one place, and the rows are read back."""
    report = read_json(out.with_suffix("").with_suffix(".import.json"))
    counts = report["counts"]
    assert counts["read"] == counts["pairs"] + counts["posts"] + counts["rejected"]
    refused = pd.read_csv(out.with_suffix("").with_suffix(".rejected.csv"), keep_default_na=False)
    assert len(refused) == counts["rejected"] == sum(report["refused"].values()) and (refused.reason != "").all()
    accepted, rejected = read_pairs(out)
    assert len(accepted) == counts["pairs"] and rejected.empty, rejected.reason.tolist()
    return report, accepted, refused


def x_tweet(number, parent=None, **changes):
    tweet = {"id": str(number), "text": f"post {number}", "author_id": str(number % 3), "conversation_id": "1",
             "created_at": f"2024-03-04T05:{number % 60:02}:07.000Z", "edit_history_tweet_ids": [str(number)],
             "public_metrics": {"retweet_count": 0, "reply_count": 0, "like_count": number % 5, "quote_count": 0}}
    tweet |= {"referenced_tweets": [{"type": "replied_to", "id": str(parent)}]} if parent else {}
    return {name: value for name, value in (tweet | changes).items() if value is not None}


def test_pages_of_x(tmp_path):
    users = [{"id": str(i), "username": f"Person_{i}", "public_metrics": {"followers_count": 100 * i}}
             for i in range(2)]
    page = {"data": [x_tweet(1), *(x_tweet(10 + i, 1, text=text) for i, text in enumerate(TEXTS)), x_tweet(30, 99),
                     x_tweet(31, 98), x_tweet(32, 1, public_metrics=None), x_tweet(33, 1), x_tweet(33, 1),
                     x_tweet(34, 1, edit_history_tweet_ids=["5", "34"]), x_tweet(35, 1, created_at=None),
                     x_tweet(36, text="RT @Person_1: x", referenced_tweets=[{"type": "retweeted", "id": "1"}]),
                     {"id": "37"}, None, x_tweet(38, 97), x_tweet(39, 33)],
            "includes": {"users": users, "tweets": [x_tweet(97, 1), x_tweet(1)]},
            "errors": [{"resource_id": "99", "resource_type": "tweet", "title": "Not Found Error"}]}
    (tmp_path / "page.json").write_text(json.dumps(page, indent=1))
    report, accepted, refused = (import_pairs("x", [tmp_path / "page.json"], tmp_path / "x.jsonl"),
                                 *accounted(tmp_path / "x.jsonl")[1:])
    reasons = " ".join(refused.reason)
    for words in ("not among the files", "Not Found Error", "public_metrics", "the same post", "edited (2", "a retweet",
                  "no id or no text", "U+FFFD", "NUL", "40,000", "is empty"):
        assert words in reasons, words
    by_text = accepted.set_index("reply")
    assert by_text.loc["AT&T <3 and 5 > 4", "reply_likes"] == 12 % 5 and "هل الجسر مغلق؟" in by_text.index
    assert by_text.loc["post 33", "reply_author_followers"] == 0
    assert np.isnan(by_text.loc["post 35", "reply_time_diff_seconds"])
    assert "post 97" in set(accepted.tweet) and "post 97" not in set(accepted.reply)  # context is no reply
    written = (tmp_path / "x.jsonl").read_text() + (tmp_path / "x.rejected.csv").read_text()
    assert not any(name in written for name in ("Person_", "Ada_L", "@bob"))
    assert report["covariates"] == ["followers", "delay", "order"]


def test_an_order_of_files_and_lines_changes_no_pair(tmp_path):
    tweets = [x_tweet(i, 1 if i % 2 else i - 1) if i > 1 else x_tweet(1) for i in range(1, 40)]
    found = []
    for name, rows in (("forth", tweets), ("back", tweets[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        import_pairs("x", [tmp_path / f"{name}.jsonl"], tmp_path / f"{name}.parquet", keep_handles=True)
        found.append(read_pairs(tmp_path / f"{name}.parquet")[0].drop(columns="row").sort_values("reply_id"))
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in found))
    assert len(found[0]) == 38


NAMES = """id text data includes errors users tweets body title kind children replies referenced_tweets public_metrics
    score created_utc parent_id author created_at""".split()
json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                               st.sampled_from(NAMES), inner, max_size=5),
                           max_leaves=12)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(format=st.sampled_from(["x", "reddit"]), values=st.lists(json_values, max_size=4))
def test_any_json_is_accounted_for(tmp_path_factory, format, values):
    folder = tmp_path_factory.mktemp("any")
    good = {"x": [x_tweet(1), x_tweet(2, 1)], "reddit": [
        {"id": "s", "title": "t", "score": 1}, {"id": "c", "body": "b", "score": 1, "parent_id": "t3_s"}]}[format]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(value) for value in [*good, *values]))
    import_pairs(format, [folder / "a.jsonl"], folder / "out.jsonl")
    assert len(accounted(folder / "out.jsonl")[1]) >= 1


def test_pheme_and_an_archive(tmp_path):
    tweet = {"id_str": "1", "text": "Shots near the bridge @Reuters", "created_at": "Wed Jan 07 11:06:08 +0000 2015",
             "favorite_count": 3, "retweet_count": 1,
             "user": {"screen_name": "Ada", "followers_count": 7, "verified": False}}
    reply = tweet | {"id_str": "2", "text": "@Ada where?", "in_reply_to_status_id_str": "1",
                     "created_at": "Wed Jan 07 11:07:08 +0000 2015"}
    for folder in ("source-tweet", "source-tweets"):  # the older archive and the newer one
        thread = tmp_path / folder / "all" / "ferguson-all-rnr-threads" / "non-rumours" / "1"
        for name, content in ((f"{folder}/1.json", tweet), ("reactions/2.json", reply), (f"{folder}/._1.json", 7)):
            (thread / name).parent.mkdir(parents=True, exist_ok=True)
            (thread / name).write_text(json.dumps(content))
        import_pairs("pheme", [tmp_path / folder], tmp_path / f"{folder}.jsonl")
        _, accepted, _ = accounted(tmp_path / f"{folder}.jsonl")
        meta = json.loads(accepted["meta"][0])
        assert (meta["event"], meta["rumour"], meta["reply_author_verified"]) == ("ferguson", False, False)
        assert accepted.reply_time_diff_seconds[0] == 60 and "Ada" not in accepted.to_csv()
    own = [{"tweet": {"id_str": str(i), "full_text": f"part {i}", "favorite_count": str(i), "retweet_count": "0",
                      "created_at": f"Wed Mar 15 12:0{i}:00 +0000 2023",
                      **({"in_reply_to_status_id_str": str(i - 1)} if i > 1 else {})}} for i in range(1, 6)]
    own += [{"tweet": own[0]["tweet"] | {"id_str": "9", "in_reply_to_status_id_str": "777"}}, {}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tweets.js").write_text("window.YTD.tweets.part0 = " + json.dumps(own))
    import_pairs("twitter-archive", [tmp_path], tmp_path / "own.jsonl")
    _, accepted, refused = accounted(tmp_path / "own.jsonl")
    assert accepted.reply_likes.tolist() == [2, 3, 4, 5] and accepted.conversation_id.nunique() == 1
    assert len(refused) == 2
    import_pairs("twitter-archive", [tmp_path], tmp_path / "own.jsonl", direct=True)
    assert len(accounted(tmp_path / "own.jsonl")[1]) == 1


def test_reddit_in_gzip_from_the_command_line(tmp_path, capsys, monkeypatch):
    rows = [{"id": "s", "title": "Is it open?", "selftext": "[removed]", "score": 1, "created_utc": 1}]
    rows += [{"id": f"c{i}", "author": "[deleted]", "body": f"b {i}", "score": i - 3, "created_utc": str(100 + i),
              "parent_id": "t3_s" if i == 0 else f"t1_c{i // 2}", "link_id": "t3_s"} for i in range(9)]
    (tmp_path / "RC.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    monkeypatch.chdir(tmp_path)
    assert main(["import", "reddit", "RC.gz", "--out", "mine.jsonl"]) == 0
    assert "covariates=[delay,order]" in capsys.readouterr().out
    _, accepted, refused = accounted(tmp_path / "mine.jsonl")
    assert accepted.reply_likes.min() == 0 and json.loads(accepted["meta"][0])["score"] == -2
    assert refused.reason.str.contains("what it replies to is gone").sum() == 1
    assert main(["import", "reddit", "nowhere.jsonl", "--out", "x.jsonl"]) == 2 - 1
    assert "does not exist" in capsys.readouterr().err


def test_pseudonyms_leave_no_handle():
    names = Pseudonyms(b"k")
    for text in (*TEXTS[:2], "(@Ada_L)", "…@ada_L:", ".@ADA_L hi", "🌉@ada_l", "@ada_l's", "@ada_l@social.example",
                 "/u/ada_l", "「@ada_l」"):
        assert "ada_l" not in names.text(text).lower(), text
    assert names.text("https://example.org/@ada_l") == "https://example.org/@ada_l"


def test_a_large_dump_takes_no_large_memory(tmp_path):
    def dump(n):
        with open(tmp_path / f"{n}.jsonl", "w") as file:
            for i in range(n):
                file.write(json.dumps({"id": f"c{i}", "body": f"reply {i} " + "word " * 30, "score": 1,
                                       "created_utc": i, "parent_id": f"t1_c{i // 2}", "link_id": "t3_s"}) + "\n")
        code = ("import resource; from grpo_engage.data.importing import import_pairs\n"
                f"import_pairs('reddit', [{str(tmp_path / f'{n}.jsonl')!r}], {str(tmp_path / f'{n}.out.jsonl')!r})\n"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    small, large = dump(1_000), dump(60_000)  # 14 MB of JSON
    assert large - small < 12, (small, large)


def test_the_stage_with_other_columns(tmp_path):
    rows = [{"post": f"Post {i // 3}", "body": f"reply {i}", "score": f"{i % 4},00{i % 4}" if i % 4 else "1.2K"}
            for i in range(90)]
    for name, part in (("a", rows[:45]), ("b", rows[45:])):
        pd.DataFrame(part).to_csv(tmp_path / f"{name}.csv", index=False, sep="|")
    given = dict(source="file", columns=["tweet=post", "reply=body", "reply_likes=score"], separator="pipe")
    pairs = data_stage(tmp_path / "run", data_path=str(tmp_path / "*.csv"), **given)
    assert sorted(pairs.reply_likes.unique()) == [1001, 1200, 2002, 3003] and len(pairs) == 90
    record = read_json(tmp_path / "run/data/manifest.json")
    assert len(record["inputs"]) == 2 and record["counts"]["files"][1]["first_row"] == 46
    assert "tweet_likes" in record["counts"]["unknown"]
    assert any("1.2K" in name for name in record["counts"]["mended"])


def test_a_run_knows_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("{}")
    many, hub = (resolve_config(load_preset("smoke"), ["source=file", f"data_path={path}"]) | {"preset": "smoke"}
                 for path in ("*.jsonl", "hub:o/n"))
    assert [path.name for path in outside_files(many, "data").values()] == ["a.jsonl", "b.jsonl"]
    assert outside_files(hub, "data") == {}
    assert made_from(tmp_path, hub, "data", "", None)["parameters"]["data_path"] == "hub:o/n"
    before = made_from(tmp_path, many, "data", "", None)
    assert "data_path" not in before["parameters"]
    (tmp_path / "c.jsonl").write_text("{}")
    assert made_from(tmp_path, many, "data", "", None) != before  # a new file is other data


def test_hello_is_no_data(tmp_path):
    (tmp_path / "hello.jsonl").write_text("hello")
    with pytest.raises(ValueError, match="it begins: hello"):
        look_at(tmp_path / "hello.jsonl")
    with pytest.raises(ValueError, match="hello"):
        data_stage(tmp_path / "run", source="file", data_path=str(tmp_path / "hello.jsonl"))


def test_the_card_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRPO_ENGAGE_RUNS", str(tmp_path))
    data_stage(tmp_path / "r", n_conversations=25)
    assert main(["card", "--run", "r"]) == 0 and (tmp_path / "r/data/data_card.md").is_file()
    assert main(["card", "--run", "none"]) == 1 and "run the data stage first" in capsys.readouterr().err
