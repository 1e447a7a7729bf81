"""Reading, splitting and the data stage: bad input, and invariants checked by other means than the code's own."""

import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys

import networkx
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from grpo_engage.base.core import REPO_ROOT, SPLITS, read_json
from grpo_engage.data import near_pairs, reading, rows, splitting
from grpo_engage.data import pairs as data
from grpo_engage.data.gold import gold_appeal
from grpo_engage.data.pairs import data_stage, load_pairs
from grpo_engage.data.reading import read_pairs

GOOD = {
    "tweet": "Our bakery opens at six tomorrow.",
    "reply": "Will there be rye bread?",
    "reply_likes": 3,
    "reply_retweets": 0,
    "tweet_likes": 40,
    "reply_author_followers": 120,
    "reply_time_diff_seconds": 95,
}


def line(**changes) -> bytes:
    return json.dumps(GOOD | changes).encode()


def without(field: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != field}).encode()


def raw(field: str, value: str) -> bytes:
    """A line with `value` in the place of a field, as it stands (JSON that json.dumps would not write)."""
    return line(**{field: "@@"}).replace(b'"@@"', value.encode())


def write(folder, content: bytes, name: str = "pairs.jsonl"):
    path = folder / name
    path.write_bytes(content)
    return path


BAD_LINES = {
    "malformed": (b'{"tweet": "cut off in the mi', "not valid JSON"),
    "trailing": (line() + b" x", "not valid JSON"),
    "not an object": (b'["tweet", "reply"]', "a list"),
    "bare null": (b"null", "NoneType"),
    "missing tweet": (without("tweet"), "missing field tweet"),
    "missing likes": (without("reply_likes"), "missing field reply_likes"),
    "null reply": (line(reply=None), "reply is null"),
    "mistyped reply": (line(reply=7), "reply must be a string"),
    "mistyped count": (line(reply_likes="three"), "reply_likes is not a number: three"),
    "count of two readings": (line(tweet_likes="1.204"), "tweet_likes can be read as 1.204 or as 1204"),
    "misspelt number": (without("tweet_likes")[:-1] + b', "tweet_like": 3}', "did you mean tweet_likes?"),
    "boolean count": (line(tweet_likes=True), "tweet_likes must be a number or null, not a boolean"),
    "list count": (line(tweet_likes=[1]), "a list"),
    "negative": (line(reply_likes=-1), "reply_likes is negative: -1"),
    "negative delay": (line(reply_time_diff_seconds=-0.5), "reply_time_diff_seconds is negative"),
    "absurd": (line(reply_author_followers=10**11), "beyond the limit of 10,000,000,000: 100000000000"),
    "absurd delay": (line(reply_time_diff_seconds=1_500_000_000_000), "reply_time_diff_seconds is beyond"),
    "fraction": (line(reply_likes=2.5), "reply_likes is not a whole number: 2.5"),
    "NaN": (raw("reply_likes", "NaN"), "reply_likes is not finite: nan"),
    "infinity": (raw("tweet_likes", "-Infinity"), "tweet_likes is not finite"),
    "overflow": (raw("reply_likes", "1e400"), "reply_likes is not finite: inf"),
    "long integer": (raw("reply_likes", "9" * 400), "reply_likes is beyond"),
    "endless integer": (raw("reply_likes", "9" * 50_000), "endless number"),
    "empty text": (line(reply=""), "reply is empty"),
    "white space": (line(tweet=" \t\u2003\n"), "tweet is empty"),
    "invisible": (line(reply="\u200b\u200d\ufeff"), "reply is empty"),
    "lone surrogate": (line(reply="so \ud83d"), "reply holds a lone surrogate at character 4"),
    "surrogate in id": (line(reply_id="\udc00"), "reply_id holds a lone surrogate"),
    "surrogate in meta": (line(meta={"a": "\udc00"}), "meta cannot be kept"),
    "NUL": (line(reply="a\0b"), "reply holds a NUL"),
    "not UTF-8": (line().replace(b"rye", b"caf\xe9"), "not valid UTF-8: byte 0xe9"),
    "1 MB tweet": (line(tweet="x" * 1_000_000), "tweet has 1,000,000 characters, the limit is 40,000"),
    "line too long": (line(tweet="x" * reading.MAX_LINE_BYTES), "the line is longer than"),
    "deep list": (b"[" * 200_000, "nested"),
    "deep meta": (raw("meta", '{"a":' * 50_000 + "1" + "}" * 50_000), "nested"),
    "deep count": (raw("reply_likes", "[" * 900 + "]" * 900), "reply_likes must be"),
    "repeated field": (line()[:-1] + b', "reply_likes": 9}', "field reply_likes appears twice"),
    "meta mistyped": (line(meta=[1]), "meta must be an object"),
    "meta NaN": (raw("meta", '{"x": NaN}'), "meta cannot be kept"),
    "meta text broken": (line(meta="{oops"), "meta is not valid JSON"),
    "meta too long": (line(meta={"x": "y" * 200_000}), "meta has"),
    "id mistyped": (line(conversation_id=1.5), "conversation_id must be a string"),
    "id boolean": (line(reply_id=True), "reply_id must be a string"),
    "id blank": (line(reply_id="  "), "reply_id has 0 characters"),
    "id too long": (line(reply_id="r" * 2000), "reply_id has 2,000 characters"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_one_rejected_row(tmp_path, case):
    bad, reason = BAD_LINES[case]
    accepted, rejected = read_pairs(write(tmp_path, line(reply="first") + b"\n" + bad + b"\n" + line(reply="last")))
    assert accepted.reply.tolist() == ["first", "last"]
    assert accepted.row.tolist() == [1, 3] and rejected.row.tolist() == [2]
    assert reason in rejected.reason[0]
    assert len(rejected.excerpt[0]) <= 80 and len(rejected.reason[0]) < 300
    assert (rejected.reason[0] + rejected.excerpt[0]).isprintable()


GOOD_LINES = {
    "null numbers": line(**dict.fromkeys(rows.NUMBER_FIELDS)),
    "whole float": line(reply_likes=3.0),
    "fractional delay": line(reply_time_diff_seconds=0.25),
    "at the limit": line(reply_likes=rows.MAX_COUNT, tweet="x" * rows.MAX_TEXT_CHARACTERS),
    "null optional": line(conversation_id=None, reply_id=None, source=None, meta=None),
    "integer ids": line(conversation_id=2**80, reply_id=12),
    "unknown fields": line(lang="en", nested={"a": [1]}),
    "other scripts": line(tweet="सुप्रभात", reply="👩‍👩‍👧 よい"),
    "paired surrogates": raw("reply", '"\\ud83d\\ude00"'),
    "carriage return": line() + b"\r",
    "padded": b"  " + line() + b"\t",
}


@pytest.mark.parametrize("case", GOOD_LINES)
def test_a_good_line_is_accepted(tmp_path, case):
    accepted, rejected = read_pairs(write(tmp_path, GOOD_LINES[case]))
    assert len(accepted) == 1, rejected.reason.tolist()
    expected = GOOD | json.loads(GOOD_LINES[case])
    for field in rows.NUMBER_FIELDS:
        given, wanted = accepted[field][0], expected[field]
        assert math.isnan(given) if wanted is None else given == wanted
    for field in rows.TEXT_FIELDS:
        assert accepted[field][0] == expected[field]
    assert tuple(accepted.columns) == rows.PAIR_COLUMNS
    assert isinstance(json.loads(accepted.meta[0]), dict) and accepted.conversation_id[0] and accepted.reply_id[0]


def test_bom_crlf_and_blank_lines(tmp_path):
    content = b"\xef\xbb\xbf" + b"\r\n".join([line(reply="é"), b"", b"  ", line(reply="b"), b""])
    accepted, rejected = read_pairs(write(tmp_path, content))
    assert accepted.row.tolist() == [1, 4] and rejected.empty  # blank lines are no rows, but keep their numbers
    assert accepted.reply.tolist() == ["é", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz"])
@pytest.mark.parametrize("content", [b"", b"\n\r\n"])
def test_an_empty_file_has_no_rows(tmp_path, name, content):
    accepted, rejected = read_pairs(write(tmp_path, gzip.compress(content) if "gz" in name else content, name))
    assert len(accepted) == len(rejected) == 0
    assert accepted.dtypes.equals(read_pairs(write(tmp_path, line()))[0].dtypes)


def test_duplicate_ids_point_to_the_first(tmp_path):
    content = [line(reply_id="a"), line(reply_id="a", reply=""), line(reply_id="b"), line(reply_id="a"), line()]
    accepted, rejected = read_pairs(write(tmp_path, b"\n".join(content)))
    assert accepted.row.tolist() == [1, 3, 5] and rejected.row.tolist() == [2, 4]
    assert rejected.reason[1] == "reply_id a is the same as in row 1"


def test_a_rejected_row_does_not_reserve_its_id(tmp_path):
    accepted, _ = read_pairs(write(tmp_path, line(reply_id="a", reply="") + b"\n" + line(reply_id="a")))
    assert accepted.row.tolist() == [2]


def test_ids_are_derived_from_the_post(tmp_path):
    content = [line(reply="1"), line(reply="2", tweet=" Our bakery  opens\nat six tomorrow."), line(tweet="Other")]
    accepted, _ = read_pairs(write(tmp_path, b"\n".join(content)))
    first, second, third = accepted.conversation_id
    assert first == second != third and accepted.reply_id.is_unique


@pytest.mark.parametrize("keep", [0.3, 0.9, -1, -8, -9])
def test_truncated_gzip(tmp_path, keep):
    draw = random.Random(0)
    lines = [line(reply=f"reply {i} {draw.random()}") for i in range(3000)]
    packed = gzip.compress(b"\n".join(lines) + b"\n")
    cut = packed[: int(len(packed) * keep) if 0 < keep < 1 else keep]
    accepted, rejected = read_pairs(write(tmp_path, cut, "cut.jsonl.gz"))
    assert len(rejected) == 1 and "cut or damaged" in rejected.reason[0]
    assert rejected.row[0] == len(accepted) + 1
    # Independent of the code: what zlib itself can still decompress
    import zlib

    text = zlib.decompressobj(31).decompress(cut)
    assert len(accepted) == text.count(b"\n")
    assert accepted.reply.tolist() == [json.loads(x)["reply"] for x in lines[: len(accepted)]]


def test_damaged_gzip_and_wrong_names(tmp_path):
    packed = bytearray(gzip.compress(b"\n".join(line(reply=f"reply {i} {i**9}") for i in range(3000))))
    packed[len(packed) // 2] ^= 0xFF
    accepted, rejected = read_pairs(write(tmp_path, bytes(packed), "flipped.jsonl.gz"))
    assert "cut or damaged" in rejected.reason.iloc[-1] and len(accepted)
    # The content decides what is compressed, not the name
    assert len(read_pairs(write(tmp_path, line(), "plain.jsonl.gz"))[0]) == 1
    assert len(read_pairs(write(tmp_path, gzip.compress(line()), "packed.jsonl"))[0]) == 1


def csv_bytes(frame: list[dict]) -> bytes:
    return pd.DataFrame(frame).to_csv(index=False).encode()


HEADER = ",".join(GOOD).encode()


def test_csv_values(tmp_path):
    content = csv_bytes([GOOD | {"reply": 'a "quoted", two\nline text', "reply_likes": None, "meta": '{"b":1}'},
                         GOOD | {"reply": " é ", "reply_likes": " 3.0 ", "tweet_likes": "1e2"}])  # fmt: skip
    for variant in (content, b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), gzip.compress(content)):
        accepted, rejected = read_pairs(write(tmp_path, variant, "a.csv"))
        assert rejected.empty and accepted.row.tolist() == [1, 2]
        assert accepted.reply[0].replace("\r", "") == 'a "quoted", two\nline text' and accepted.reply[1] == " é "
        assert math.isnan(accepted.reply_likes[0]) and accepted.reply_likes[1] == 3 and accepted.tweet_likes[1] == 100
        assert accepted.meta.tolist() == ['{"b": 1}', "{}"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"t,r,1,2,3", "5 cells, the header has 7"),
        (b"t,r,1,2,3,4,5,6", "8 cells"),
        (b"t,r,1Q,2,3,4,5", "reply_likes is not a number: 1Q"),
        (b"t,r,1_000,2,3,4,5", "reply_likes is not a number"),
        (b"t,r,NaN,2,3,4,5", "reply_likes is not finite"),
        (b"t,r,true,2,3,4,5", "reply_likes is not a number"),
        (b"t,r,\xd9\xa3,2,3,4,5", "reply_likes is not a number"),
        (b"t,r,-1,2,3,4,5", "reply_likes is negative"),
        (b"t,,1,2,3,4,5", "reply is empty"),
        (b"t,r\x00,1,2,3,4,5", "NUL"),
        (b"t,caf\xe9,1,2,3,4,5", "not valid UTF-8"),
        (b't,"r"x,1,2,3,4,5', "not valid CSV"),
        (b"t," + b"x" * 1_000_000 + b",1,2,3,4,5", "the limit is 40,000"),
        (b"t," + b"x" * (17 * 2**20) + b",1,2,3,4,5", "longer than"),
    ],
)
def test_a_bad_csv_record_is_one_rejected_row(tmp_path, bad, reason):
    good = b"t,r,1,2,3,4,5"
    content = b"\n".join([HEADER, good, bad, good, b""])
    accepted, rejected = read_pairs(write(tmp_path, content, "a.csv"))
    assert accepted.row.tolist() == [1, 3] and rejected.row.tolist() == [2]
    assert reason in rejected.reason[0] and rejected.reason[0].startswith("line 3: ") == ("line" in rejected.reason[0])


def test_csv_open_quote_and_cut(tmp_path):
    good = b"t,r,1,2,3,4,5"
    accepted, rejected = read_pairs(write(tmp_path, b"\n".join([HEADER, good, b't,"r,1', good]), "a.csv"))
    assert accepted.row.tolist() == [1, 3] and "line 3: not valid CSV: a quotation mark" in rejected.reason[0]
    packed = gzip.compress(b"\n".join([HEADER, *[b"t,%d,1,2,3,4,5" % i**9 for i in range(5000)]]))
    accepted, rejected = read_pairs(write(tmp_path, packed[:-5000], "a.csv.gz"))
    assert len(rejected) == 1 and "cut" in rejected.reason[0] and len(accepted) > 100
    with pytest.raises(ValueError, match="header line cannot be read"):
        read_pairs(write(tmp_path, packed[:12], "a.csv.gz"))


def test_csv_restores_the_global_field_limit(tmp_path):
    import csv

    before = csv.field_size_limit()
    read_pairs(write(tmp_path, HEADER + b"\n", "a.csv"))
    with pytest.raises(ValueError):
        read_pairs(write(tmp_path, b"a,b\n", "b.csv"))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"tweet;reply", "separated by commas"),
        (HEADER.replace(b"reply_likes,", b""), "column reply_likes is missing"),
        (HEADER.replace(b"reply_retweets,", b"reply_retweet,"), "did you mean reply_retweets?"),
        (HEADER + b",tweet", "tweet appears more than once"),
        (b'"tweet"x', "header line is not valid CSV"),
        (b"\xff\xfet\x00w\x00", "missing"),
    ],
)
def test_csv_header_errors_name_file_and_remedy(tmp_path, header, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(write(tmp_path, header + b"\n1,2,3\n", "a.csv"))
    assert "a.csv" in str(caught.value) and str(caught.value).isprintable()


def parquet(folder, name="a.parquet", **columns):
    table = {field: pa.array([value, value]) for field, value in GOOD.items()} | columns
    pq.write_table(pa.table({key: value for key, value in table.items() if value is not None}), folder / name)
    return folder / name


def test_parquet_types(tmp_path):
    frame = {
        "tweet": pa.array(["a", "a"]).dictionary_encode(),
        "reply": pa.array(["x", None], pa.large_string()),
        "reply_likes": pa.array([1, None], pa.uint64()),
        "tweet_likes": pa.array([math.nan, 2.0]),
        "reply_retweets": pa.nulls(2),
        "conversation_id": pa.array([2**60, 2**60]),
        "meta": pa.array([{"a": 1}, {"a": 2}]),
    }
    accepted, rejected = read_pairs(parquet(tmp_path, **frame))
    assert accepted.empty and rejected.row.tolist() == [1, 2]
    assert "tweet_likes is not finite" in rejected.reason[0] and "reply is null" in rejected.reason[1]
    fine = frame | {"tweet_likes": pa.array([1, 2], pa.int8()), "reply": pa.array(["x", "y"])}
    accepted, rejected = read_pairs(parquet(tmp_path, **fine))
    assert rejected.empty and accepted.meta.tolist() == ['{"a": 1}', '{"a": 2}']
    assert accepted.conversation_id.tolist() == [str(2**60)] * 2 and accepted.reply_retweets.isna().all()


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("reply_time_diff_seconds", pa.array(["1", "2"])),
        ("reply_likes", pa.array([True, False])),
        ("tweet", pa.array([["nested"], []])),
        ("tweet", pa.array([1, 2])),
        ("tweet", pa.nulls(2)),
        ("reply", pa.array([b"x", b"y"])),
        ("conversation_id", pa.array([1.0, 2.0])),
        ("reply_time_diff_seconds", pa.array([1, 2], pa.duration("s"))),
        ("meta", pa.array([[1], [2]])),
    ],
)
def test_parquet_wrong_column_types(tmp_path, column, values):
    with pytest.raises(ValueError, match=f"a.parquet: column {column} has type") as caught:
        read_pairs(parquet(tmp_path, **{column: values}))
    assert "Convert" in str(caught.value)


def test_parquet_unreadable_values_are_rows(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.int32([0, 1, 2])), pa.py_buffer(b"\xffy")])
    accepted, rejected = read_pairs(parquet(tmp_path, reply=broken))
    assert accepted.reply.tolist() == ["y"] and rejected.row.tolist() == [1]
    in_meta = pa.StructArray.from_arrays([broken], names=["a"])
    accepted, rejected = read_pairs(parquet(tmp_path, meta=in_meta))
    assert accepted.row.tolist() == [2] and "meta" in rejected.reason[0]
    when = pa.array([{"t": pd.Timestamp("2020-01-01")}] * 2)
    assert "meta cannot be kept" in read_pairs(parquet(tmp_path, meta=when))[1].reason[0]


def test_parquet_file_errors(tmp_path):
    for content in (b"", b"PAR1", line()):
        with pytest.raises(ValueError, match="not a readable parquet"):
            read_pairs(write(tmp_path, content, "b.parquet"))
    with pytest.raises(ValueError, match="reply_likes is missing"):
        read_pairs(parquet(tmp_path, reply_likes=None))
    assert read_pairs(parquet(tmp_path, tweet_likes=None))[0].tweet_likes.isna().all()
    path = parquet(tmp_path, reply=pa.array(["x" * 3000, "y" * 3000]))
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the data pages of the first column; the footer stays whole
    accepted, rejected = read_pairs(write(tmp_path, bytes(content), "c.parquet"))
    assert accepted.empty and rejected.row.tolist() == [1, 2] and rejected.reason.str.contains("damaged").all()


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_pairs(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="folder without a file that could be read"):
        read_pairs(tmp_path)
    for name in ("a.json", "a.txt", "a", "a.gz", "a.parquet.gz", "a.jsonl.zip"):
        with pytest.raises(ValueError, match="unknown kind"):
            read_pairs(write(tmp_path, line(), name))
    assert len(read_pairs(write(tmp_path, line(), "A.JSONL"))[0]) == 1
    path = write(tmp_path, line(), "secret.jsonl")
    path.chmod(0)
    if os.access(path, os.R_OK):
        return  # root may read everything
    with pytest.raises(PermissionError, match="secret.jsonl"):
        read_pairs(path)


short_lines = [bad for bad, _ in BAD_LINES.values() if len(bad) < 1000] + [line(), b"", b"\xef\xbb\xbf"]
byte_lines = st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(short_lines)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(lines=byte_lines)
def test_any_bytes_are_accounted_for(tmp_path_factory, lines):
    content = b"\n".join(lines)
    if content[:2] == b"\x1f\x8b":
        return  # such a file is a (damaged) gzip
    if b"\0" in content[:4] or content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return  # and such a one may be UTF-16
    accepted, rejected = read_pairs(write(tmp_path_factory.mktemp("h"), content))
    split = content.removeprefix(b"\xef\xbb\xbf").split(b"\n" if b"\n" in content else b"\r")
    expected = [number for number, text in enumerate(split, start=1) if text.strip(b" \t\r")]
    assert sorted([*accepted.row, *rejected.row]) == expected


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200), records=st.lists(st.lists(st.text(max_size=8), min_size=1, max_size=9)))
def test_any_csv_is_accounted_for(tmp_path_factory, content, records):
    import csv

    folder = tmp_path_factory.mktemp("h")
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([list(GOOD), *records])
    accepted, rejected = read_pairs(write(folder, buffer.getvalue().encode("utf-8", "surrogatepass"), "a.csv"))
    assert sorted([*accepted.row, *rejected.row]) == list(range(1, len(records) + 1))
    accepted, rejected = read_pairs(write(folder, HEADER + b"\n" + content, "b.csv"))  # must only not crash
    numbers = sorted([*accepted.row, *rejected.row])
    assert numbers == list(range(1, len(numbers) + 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(rows.KNOWN_FIELDS), value=json_values)
def test_any_value_in_any_field(tmp_path_factory, field, value):
    folder = tmp_path_factory.mktemp("h")
    accepted, rejected = read_pairs(write(folder, line(**{field: value})))
    assert len(accepted) + len(rejected) == 1
    accepted.to_parquet(folder / "again.parquet")  # what is accepted can be stored, and comes back the same
    if len(accepted):
        again, _ = read_pairs(folder / "again.parquet")
        pd.testing.assert_frame_equal(again, accepted)


def test_a_gigabyte_is_not_held_in_memory(tmp_path):
    """200 MB of rejected rows and one line of 300 MB must not cost 200 MB, let alone more."""
    path = tmp_path / "big.jsonl"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write((b'{"tweet": "' + b"x" * 20_000 + b'"}\n') * 100)
        file.write(b"y" * 300_000_000)
    code = (
        "import resource, sys; from grpo_engage.data.reading import read_pairs\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "a, r = read_pairs(sys.argv[1]); after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(r), (after - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, megabytes = map(int, done.stdout.split())
    assert count == 10_001 and megabytes < 150


# --- splits


@pytest.fixture(scope="module")
def pairs() -> pd.DataFrame:
    """600 conversations; every fifth post text is shared by two of them; likes mostly zero, some unknown."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 10, size=600)
    conversation = np.repeat(np.arange(600), sizes)
    post = np.where(np.arange(600) % 5 == 4, np.arange(600) - 1, np.arange(600))[conversation]
    likes = rng.poisson(rng.exponential(0.7, size=600)[conversation]).astype(float)
    likes[rng.random(len(likes)) < 0.05] = np.nan
    frame = pd.DataFrame({"row": np.arange(1, len(likes) + 1), "conversation_id": [f"c{i}" for i in conversation]})
    words = np.array("sun rain bread harbour tram choir garden museum kettle violin".split())
    texts = [" ".join(rng.permutation(words)) + f" {i}" for i in range(600)]
    links = np.where(conversation % 5 == 4, " https://t.co/x", "")
    frame["tweet"] = [texts[number] + link for number, link in zip(post, links, strict=True)]
    return frame.assign(reply=[f"reply {i}" for i in range(len(likes))], reply_likes=likes)


def test_splits_agree_with_a_graph_library(pairs):
    graph = networkx.Graph()
    for name, text in zip(pairs.conversation_id, pairs.tweet, strict=True):
        graph.add_edge(("id", name), ("text", splitting.normalise_text(text)))
    parts = splitting.split_conversations(pairs, None, 0).set_index("conversation_id").split
    groups = splitting.conversation_groups(pairs)
    components = list(networkx.connected_components(graph))
    assert groups.nunique() == len(components) == 480
    for component in components:
        names = [name for kind, name in component if kind == "id"]
        assert parts.loc[names].nunique() == 1


@pytest.mark.parametrize("seed", range(5))
def test_split_shares_and_strata(pairs, seed):
    fractions = {"policy": 0.5, "reward": 0.2, "judge": 0.1, "validation": 0.1, "test": 0.1}
    parts = splitting.split_conversations(pairs, fractions, seed)
    assert parts.drop(columns="split").equals(pairs)
    parts["group"] = splitting.conversation_groups(pairs)
    counts = parts.groupby("split").group.nunique()
    assert {split: counts[split] for split in SPLITS} == {s: round(480 * f) for s, f in fractions.items()}
    # Stratified: the mean engagement in each split lies closer to the whole's than chance alone would put it
    means = parts.groupby(["split", "group"]).reply_likes.mean().groupby("split").mean()
    spread = parts.groupby("group").reply_likes.mean().std() / np.sqrt(counts)
    assert ((means - parts.groupby("group").reply_likes.mean().mean()).abs() < 1.0 * spread).all()


def test_split_is_a_function_of_content_and_seed(pairs):
    first = splitting.split_conversations(pairs, None, 7)
    shuffled = splitting.split_conversations(pairs.sample(frac=1, random_state=0), None, 7)
    pd.testing.assert_frame_equal(shuffled.sort_index(), first)
    assert not splitting.split_conversations(pairs, None, 8).split.equals(first.split)
    code = "import sys,pandas as pd; from grpo_engage.data.splitting import split_conversations as s;"
    code += "print(''.join(x[0] for x in s(pd.read_json(sys.stdin), None, 7).split))"
    done = subprocess.run([sys.executable, "-c", code], input=pairs.to_json(), capture_output=True, text=True,
                          check=True, env=os.environ | {"PYTHONHASHSEED": "99"})  # fmt: skip
    assert done.stdout.strip() == "".join(name[0] for name in first.split)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(5, 300), weights=st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_dealing(n, weights):
    shares = dict(zip(SPLITS, np.array(weights) / sum(weights), strict=True))
    counts = pd.Series(splitting._deal(n, shares)).value_counts()
    assert counts.sum() == n and set(counts.index) == set(SPLITS)
    if min(shares.values()) * n >= 1:
        assert all(abs(counts[split] - n * share) < 1 for split, share in shares.items())


def test_split_errors(pairs):
    for wrong in ([0.5, 0.5], [0.2] * 6, {"policy": 1.0}, [0.5, 0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0, 0], [np.nan] * 5):
        with pytest.raises(ValueError, match="fractions"):
            splitting.split_conversations(pairs, wrong, 0)
    with pytest.raises(ValueError, match="five splits"):
        splitting.split_conversations(pairs[pairs.conversation_id.isin(["c0", "c1"])], None, 0)
    with pytest.raises(ValueError, match="five splits"):
        splitting.split_conversations(pairs[:0], None, 0)


def test_all_likes_unknown_still_split(pairs):
    parts = splitting.split_conversations(pairs.assign(reply_likes=np.nan), None, 0)
    assert set(parts.split) == set(SPLITS)


def test_near_copies_agree_with_brute_force(pairs):
    parts = splitting.split_conversations(pairs, None, 0)
    found = splitting.near_copies(parts, threshold=0.75)
    posts = parts.assign(text=parts.tweet.map(splitting.normalise_text)).drop_duplicates("text").reset_index(drop=True)
    dense = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(posts.text).toarray()
    similar = dense @ dense.T
    expected = {(posts.row[i], posts.row[j]) for i, j in itertools.combinations(range(len(posts)), 2)
                if similar[i, j] >= 0.75 and posts.split[i] != posts.split[j]}  # fmt: skip
    assert expected and set(zip(found.row_a, found.row_b, strict=True)) == expected
    assert (found.kind == "tweet").all() and found.similarity.between(0.7499, 1).all()


@pytest.mark.parametrize(("crowd", "threshold"), [(2000, 0.6), (60, 0.6), (60, 0.75)])
def test_similar_pairs_are_those_of_brute_force(crowd, threshold):
    """Every pair and its similarity, by another library's search; also where all n-grams of heads are crowded, as long
    as the copies lie within half a crowd of each other."""
    rng = np.random.default_rng(crowd)
    words = np.array([a + b + c for a in "bdfgklm" for b in "aeiou" for c in ("n", "rst", "l", "ck")])
    texts = []
    for _ in range(150):
        base = rng.choice(words, size=9)
        for _ in range(rng.integers(1, 4)):
            texts.append(" ".join(np.where(rng.random(9) < 0.15, rng.choice(words, size=9), base)))
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32).fit_transform(texts)
    distances, others = NearestNeighbors(radius=1 - threshold + 1e-6, metric="cosine").fit(vectors).radius_neighbors()
    expected = {(i, int(j)): round(1 - float(d), 4) for i, (near, js) in enumerate(zip(distances, others, strict=True))
                for d, j in zip(near, js, strict=True) if i < j and (crowd > len(texts) or j - i < crowd // 2)}
    found = near_pairs.similar_pairs(texts, threshold, crowd=crowd)
    assert len(expected) > 30
    got = {(row.left, row.right): row.similarity for row in found.itertuples()}
    assert {pair: got.get(pair) for pair in expected} == pytest.approx(expected, abs=1.1e-4)
    assert crowd < len(texts) or got.keys() == expected.keys()


def test_time_and_memory_grow_with_the_rows(tmp_path):
    """Four times the rows: about four times the processor's time (a square would be sixteen), and few bytes a row."""
    code = (
        "import resource, sys, time; from pathlib import Path; import numpy as np, pandas as pd\n"
        "from grpo_engage.data.reading import read_tables; from grpo_engage.data.splitting import *\n"
        "def work(path):\n"
        "    start = time.process_time(); accepted, rejected = read_tables(path).tables()\n"
        "    copies = near_copies(split_conversations(accepted)); rejected.to_csv(path + '.csv')\n"
        "    return time.process_time() - start, len(accepted), len(rejected)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "work(sys.argv[1]); small, before = work(sys.argv[1]), peak(); large = work(sys.argv[2])\n"
        "print(small[0], large[0], large[1], large[2], (peak() - before) * 1024 / (large[1] + large[2]))"
    )
    spec = importlib.util.spec_from_file_location("data_rate", REPO_ROOT / "benchmarks" / "data_rate.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.CONVERSATIONS = 300
    paths = [str(benchmark.write_lines(tmp_path, rows, 0, 0.05)[0]) for rows in (5000, 20_000)]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    small, large, accepted, rejected, bytes_a_row = map(float, done.stdout.split())
    assert accepted + rejected == 20_000 and 600 < rejected < 1400
    assert large / small < 9, f"{small:.2f} s for 5,000 rows, {large:.2f} s for 20,000"
    assert bytes_a_row < 12_000  # the blocks that are worked on at once weigh more than so few rows


def test_copied_replies_across_splits_only():
    frame = pd.DataFrame({
        "row": range(1, 7), "conversation_id": list("abcdef"), "tweet": [f"post {c * 5}" for c in "abcdef"],
        "split": ["policy", "policy", "test", "judge", "test", "reward"],
        "reply": ["We stand with you all tonight"] * 2 + ["@bob we STAND with you all  tonight https://t.co/z",
                                                          "@amy we stand with you all tonight", "so true", "so true"],
    })  # fmt: skip
    found = splitting.near_copies(frame, threshold=0.99)
    assert found[["row_a", "row_b"]].values.tolist() == [[3, 4]]  # a handle in front is kept as a mark
    assert splitting.near_copies(frame[:0]).empty


def test_sample_is_whole_conversations(pairs):
    full = pairs.groupby("conversation_id").size()
    some = data.sample_conversations(pairs, 3, max_conversations=50, min_replies_per_post=4)
    sizes = some.groupby("conversation_id").size()
    assert len(sizes) == 50 and sizes.equals(full[sizes.index]) and sizes.min() >= 4
    shuffled = data.sample_conversations(pairs.sample(frac=1, random_state=1), 3, 50, 0, 4)
    assert set(shuffled.conversation_id) == set(some.conversation_id)
    few = data.sample_conversations(pairs, 3, max_examples=200)
    assert 190 < len(few) <= 200
    assert data.sample_conversations(pairs, 3).equals(pairs)


def test_margins_by_numpy(pairs):
    frame = pairs.assign(**{name: pairs.reply_likes for name in rows.NUMBER_FIELDS})
    table = data.margins(frame, "x").set_index("quantity")
    likes = pairs.reply_likes.dropna().to_numpy()
    row = table.loc["reply_likes"]
    assert row["share_zero"] == np.mean(likes == 0) and row["p99"] == np.percentile(likes, 99)
    assert row["share_null"] == pairs.reply_likes.isna().mean() and table.loc["replies_per_post", "n"] == 600


# --- the stage


def test_stage_from_simulator_is_reproducible(tmp_path):
    for name in "ab":
        data_stage(tmp_path / name, n_conversations=60, seed=4)
    files = ["pairs.parquet", "rejected.csv", "margins.csv", "near_copies.csv", "figures/data_margins.pdf"]
    for file in files:
        assert (tmp_path / "a/data" / file).read_bytes() == (tmp_path / "b/data" / file).read_bytes(), file
    pairs = load_pairs(tmp_path / "a")
    assert set(pairs.split) == set(SPLITS) and list(pairs.columns) == [*rows.PAIR_COLUMNS, "split"]
    assert gold_appeal(pairs.tweet.tolist()[:3], pairs.reply.tolist()[:3]).shape == (3,)
    assert not data_stage(tmp_path / "c", n_conversations=60, seed=5).equals(pairs)


def test_stage_from_file_accounts_for_every_row(tmp_path):
    lines = [line(tweet=f"Post number {i // 3}", reply=f"=reply {i}", reply_likes=i % 4) for i in range(300)]
    lines[10], lines[20] = b"{", line(reply_likes=-1)
    path = write(tmp_path, b"\n".join(lines))
    pairs = data_stage(tmp_path / "run", source="file", data_path=str(path), min_replies_per_post=3)
    manifest = read_json(tmp_path / "run/data/manifest.json")
    assert manifest["status"] == "completed" and list(manifest["inputs"]) == [str(path)]
    assert manifest["counts"]["rows"] == 300 and manifest["counts"]["accepted"] == 298
    rejected = pd.read_csv(tmp_path / "run/data/rejected.csv")
    assert rejected.row.tolist() == [11, 21] and len(pairs) == manifest["counts"]["pairs"] == 294
    assert set(pd.read_csv(tmp_path / "run/data/margins.csv").dataset) == {"data", "simulator"}
    pd.testing.assert_frame_equal(load_pairs(tmp_path / "run"), pairs)


def test_stage_without_engagement_fields(tmp_path):
    lines = [line(tweet=f"Post number {i // 3}", **dict.fromkeys(rows.NUMBER_FIELDS)) for i in range(60)]
    pairs = data_stage(tmp_path, source="file", data_path=str(write(tmp_path, b"\n".join(lines))))
    assert pairs[list(rows.NUMBER_FIELDS)].isna().all().all() and set(pairs.split) == set(SPLITS)


def test_a_thread_of_several_posts_stays_in_one_split(tmp_path):
    lines = [line(tweet=f"Post {i}", conversation_id=f"c{i // 4}") for i in range(80)]
    pairs = data_stage(tmp_path, source="file", data_path=str(write(tmp_path, b"\n".join(lines))))
    assert pairs.conversation_id.nunique() == 80  # one id a post from here on
    assert (pairs.groupby(pairs.conversation_id.str.split("-").str[0]).split.nunique() == 1).all()


def test_stage_errors(tmp_path):
    empty, bad = write(tmp_path, b"", "empty.jsonl"), write(tmp_path, b"{\n{", "bad.jsonl")
    with pytest.raises(ValueError, match="no usable pair: it has no rows"):
        data_stage(tmp_path / "r", source="file", data_path=str(empty))
    with pytest.raises(ValueError, match="all 2 rows were rejected"):
        data_stage(tmp_path / "r", source="file", data_path=str(bad))
    assert len(pd.read_csv(tmp_path / "r/data/rejected.csv")) == 2  # the reasons are there although the stage failed
    assert read_json(tmp_path / "r/data/manifest.json")["status"] == "failed"
    for wrong in (dict(source="file"), dict(source="web"), dict(data_path="x"), dict(n_conversations=0),
                  dict(max_examples=-1), dict(min_replies_per_post=0), dict(max_examples=1),
                  dict(min_replies_per_post=999), dict(n_conversations=3)):  # fmt: skip
        with pytest.raises(ValueError):
            data_stage(tmp_path / "w", **wrong)
    with pytest.raises(FileNotFoundError):
        data_stage(tmp_path / "w", source="file", data_path=str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match="run the data stage first"):
        load_pairs(tmp_path / "nothing")
