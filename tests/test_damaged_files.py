"""Files as they arrive: random damage to every format, and a table of what other programs do to texts and ids."""

import csv
import gzip
import html
import io
import json
import random
import zlib
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_engage.base.core import read_json
from grpo_engage.data.pairs import data_stage
from grpo_engage.data.reading import read_pairs, read_tables

TEXTS = [
    "Our bakery opens at six tomorrow, rain or shine.", 'He said "no", then left; why?', "It’s 10 °C – brr… 🥶",
    "Ça va ? Très bien, et toi ?", "今日はパンが売り切れです。", "هل هناك خبز؟", "👩‍👩‍👧 love this!!! #bread @baker",
    "50% off, R&D pays: a < b", "Line one\nline two, with a comma", "\"Quoted\"\n\nafter a blank line",
    "Nein, danke :-)",
]  # fmt: skip
NUMBERS = ("reply_likes", "reply_retweets", "tweet_likes", "reply_author_followers", "reply_time_diff_seconds")
SINGLE_LINE = [text for text in TEXTS if "\n" not in text]


def rows_of(draw: random.Random, n: int, texts: list[str]) -> list[dict]:
    """`n` rows; the ids have one length, so that no damage turns one into another."""
    return [
        {"reply_id": f"r{draw.getrandbits(64):016x}", "tweet": draw.choice(texts), "reply": draw.choice(texts)}
        | {name: draw.choice([0, 3, 120, 5417, None]) for name in NUMBERS}
        for _ in range(n)
    ]


def csv_records(rows: list[dict], delimiter: str = ",") -> list[bytes]:
    """The header and each row as the bytes of a CSV, without the newline at the end."""
    records = []
    for cells in [list(rows[0]), *(row.values() for row in rows)]:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter=delimiter, lineterminator="").writerow(cells)
        records.append(buffer.getvalue().encode())
    return records


NASTY = [b'"', b'""', b'",', b',"', b",", b",,", b"\0", b"\xff", b"\xe9", b"\xed\xa0\xbd", b"\\", b"\xef\xbb\xbf",
         b"{", b"]", b"[" * 3000, b"&amp;", b"\xef\xbf\xbd", b"1e999", b"NaN", b"'", b"\t", b";",
         b"\xe2\x80\xa8"]  # fmt: skip


def damage(draw: random.Random, line: bytes) -> bytes:
    """`line` with one to three wounds, without a line end added or removed."""
    for _ in range(draw.randint(1, 3)):
        at, to = sorted((draw.randint(0, len(line)), draw.randint(0, len(line))))
        wound = draw.randrange(6)
        if wound <= 2:
            line = line[:at] + draw.choice(NASTY) + line[at:]
        elif wound == 3:
            line = line[:at] + line[min(to, at + 9) :]  # some bytes are lost
        elif wound == 4:
            line = line[:at] or b"x"  # cut
        else:
            line = line + draw.choice([b"", b",", b" "]) + line  # the line end between two was lost
    return line if line.strip() else b"x"  # a blank line would be no row


def with_damage(draw: random.Random, lines: list[bytes]) -> tuple[list[bytes], set[int]]:
    """The lines with a few damaged, often neighbours, and the places of the damaged ones."""
    start = draw.randrange(len(lines))
    places = {start, draw.randrange(len(lines)), min(start + draw.randint(0, 2), len(lines) - 1)}
    return [damage(draw, line) if k in places else line for k, line in enumerate(lines)], places


def check(folder, name: str, content: bytes, rows: list[dict], damaged: set[int]) -> tuple[int, list[int]]:
    """Rows in both tables together, and their numbers; asserts that every undamaged row was accepted as it is."""
    (folder / name).write_bytes(content)
    accepted, rejected = read_pairs(folder / name)
    by_id = {found["reply_id"]: found for found in accepted.to_dict("records")}
    for k, row in enumerate(rows):
        if k not in damaged:
            assert row["reply_id"] in by_id, (k, rejected.to_dict("records"))
            found = by_id[row["reply_id"]]
            assert (found["tweet"], found["reply"]) == (row["tweet"], row["reply"])
            assert all((row[f] is None and found[f] != found[f]) or found[f] == row[f] for f in NUMBERS)
    assert rejected.reason.str.len().gt(5).all() and rejected.row.is_monotonic_increasing
    return len(accepted) + len(rejected), sorted([*accepted.row, *rejected.row])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_damaged_json_lines(tmp_path, name, end):
    for seed in range(50):
        draw = random.Random(f"{name}{end}{seed}")
        rows = rows_of(draw, 40, TEXTS)
        lines, damaged = with_damage(draw, [json.dumps(row, ensure_ascii=seed % 2).encode() for row in rows])
        content = draw.choice([b"", b"\xef\xbb\xbf"]) + end.join(lines) + draw.choice([b"", end])
        total, numbers = check(tmp_path, name, gzip.compress(content) if "gz" in name else content, rows, damaged)
        assert numbers == list(range(1, 41)) and total == 40


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_damaged_csv_row_costs_only_itself(tmp_path, delimiter, encoding):
    """Rows of one line each: the number of lines is the number of rows, whatever the damage."""
    for seed in range(50):
        draw = random.Random(f"{delimiter}{encoding}{seed}")
        rows = rows_of(draw, 40, SINGLE_LINE)
        header, *lines = csv_records(rows, delimiter)
        lines, damaged = with_damage(draw, lines)
        content = draw.choice([b"\n", b"\r\n"]).join([header, *lines])
        if encoding != "utf-8":  # which has no invalid bytes to offer: they become U+FFFD
            content = content.decode("utf-8", "replace").encode(encoding)
        total, numbers = check(tmp_path, "a.csv", content, rows, damaged)
        assert total == 40 and numbers == list(range(1, 41)), (seed, total)


def test_stray_quotation_marks_take_no_neighbours(tmp_path):
    """Up to eight of forty rows with one mark too many, the kind of damage that runs on into other rows."""
    for seed in range(200):
        draw = random.Random(seed)
        rows = rows_of(draw, 40, SINGLE_LINE)
        header, *lines = csv_records(rows)
        damaged = set(draw.sample(range(40), draw.randint(1, 8)))
        for k in damaged:
            at = draw.randrange(len(lines[k]) + 1)
            lines[k] = lines[k][:at] + b'"' + lines[k][at:]
        assert check(tmp_path, "a.csv", b"\n".join([header, *lines]), rows, damaged)[0] == 40, seed


def test_texts_with_line_breaks_beside_damage(tmp_path):
    """Undamaged rows over several lines come through whole; damage in one of them costs at most its own lines."""
    for seed in range(200):
        draw = random.Random(seed)
        rows = rows_of(draw, 40, TEXTS)
        header, *records = csv_records(rows)
        records, damaged = with_damage(draw, records)
        total, numbers = check(tmp_path, "a.csv", b"\n".join([header, *records]), rows, damaged)
        most = sum(len([part for part in records[k].split(b"\n") if part]) for k in damaged)
        # Neighbours that are both damaged may read together as one valid record with a line break in a text.
        pairs = sum(k + 1 in damaged for k in damaged)
        assert 40 - pairs <= total <= 40 - len(damaged) + most and numbers == list(range(1, total + 1)), seed
        if not any(b"\n" in records[k] for k in damaged):
            assert total == 40, seed


def test_damaged_gzip(tmp_path):
    """A cut or a flipped byte: everything that zlib itself can still unpack is read, in either format."""
    for seed in range(60):
        draw = random.Random(seed)
        rows = rows_of(draw, 400, SINGLE_LINE)
        name = ("a.jsonl.gz", "a.csv.gz")[seed % 2]
        lines = [json.dumps(row).encode() for row in rows] if seed % 2 == 0 else csv_records(rows)
        packed = bytearray(gzip.compress(b"\n".join(lines)))
        packed = packed[: draw.randint(len(packed) // 4, len(packed) - 1)]
        left = zlib.decompressobj(31).decompress(bytes(packed)).count(b"\n") - seed % 2
        total, _ = check(tmp_path, name, bytes(packed), rows, set(range(left, 400)))
        assert total == left + 1  # the cut itself


def test_damaged_parquet(tmp_path):
    """Each row is accounted for, and those of whole row groups are accepted; or the file as a whole is refused."""
    refused = 0
    for seed in range(80):
        draw = random.Random(seed)
        rows = rows_of(draw, 40, TEXTS)
        table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=8, write_page_checksum=True)
        content = bytearray((tmp_path / "a.parquet").read_bytes())
        at = draw.randrange(4, len(content) - 8)
        content[at : at + 4] = draw.randbytes(4)
        metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
        columns = [metadata.row_group(g).column(0) for g in range(5)]
        starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        hit = {g for g in range(5) if at + 4 > starts[g] and at < [*starts, len(content)][g + 1]}
        try:
            total, numbers = check(tmp_path, "b.parquet", bytes(content), rows,
                                   {k for g in hit for k in range(8 * g, 8 * g + 8)})  # fmt: skip
        except ValueError as error:
            assert "parquet" in str(error)
            refused += 1
            continue
        assert total == 40 and numbers == list(range(1, 41)), seed
    assert refused < 60


# --- texts and ids that arrive damaged

GOOD = {"tweet": "Our bakery opens at six.", "reply": "Rye bread?"} | dict.fromkeys(NUMBERS, 3)


def written(folder, format: str, rows: list[dict]):
    path = folder / f"a.{format}"
    frame = pd.DataFrame(rows)
    if format == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif format == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return path


MENDED = {  # text in the file, text that its author wrote, what is counted
    "platform": ("T &amp; J &lt;3 it&#39;s &quot;fun&quot; &gt; all", "T & J <3 it's \"fun\" > all", "HTML entities"),
    "hexadecimal": ("&#x1F600; caf&eacute;", "😀 café", "HTML entities"),
    "once only": ("write &amp;amp; or &amp;lt;", "write &amp; or &lt;", "HTML entities"),
    "punctuation": ("itâ€™s â€œfineâ€\x9d â€¦", "it’s “fine” …", "UTF-8 read as Windows-1252"),
    "letters": ("DÃ©jÃ\xa0 vu, cafÃ©", "Déjà vu, café", "UTF-8 read as Windows-1252"),
    "emoji": ("great ðŸ˜€", "great 😀", "UTF-8 read as Windows-1252"),
    "twice": ("itÃ¢â‚¬â„¢s", "it’s", "UTF-8 read as Windows-1252"),
    "Latin-1": ("it\xe2\x80\x99s", "it’s", "UTF-8 read as Windows-1252"),
}
UNTOUCHED = ["R&D at AT&T", "x.org/?a=1&copy=2&lt=3", "&unknown; thing", "a < b > c", "MAÇÃ…", "il a chanté”…",
             "Â, â, Ê", "São Paulo: ‘irmã’", "50 € – 60 €", "Ð and Ñ", *SINGLE_LINE]  # fmt: skip
REFUSED = {
    "entity and bare &": ({"reply": "write &amp; for & in HTML"}, "not certain"),
    "misread in part": ({"reply": "itâ€™s “fine”"}, "cannot be undone with certainty"),
    "U+FFFD": ({"tweet": "caf\ufffd"}, "U+FFFD, the mark of a character lost"),
    "entity of nothing": ({"reply": "so &#xD83D;"}, "U+FFFD"),
    "spreadsheet": ({"reply_id": "1.54266E+18"}, "rounded by a spreadsheet"),
    "spreadsheet with a comma": ({"conversation_id": "1,54266E+18"}, "rounded by a spreadsheet"),
    "data frame": ({"conversation_id": "1.5426601234567898e+18"}, "rounded by a spreadsheet"),
    "no plus sign": ({"reply_id": "1.5e18"}, "rounded by a spreadsheet"),
    "decimal": ({"reply_id": "1542660123456789760.0"}, "rounded by a spreadsheet"),
}


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("case", MENDED)
def test_what_is_certain_is_mended_and_counted(tmp_path, format, case):
    arrived, meant, name = MENDED[case]
    tables = read_tables(written(tmp_path, format, [GOOD, GOOD | {"tweet": arrived}, GOOD | {"reply": arrived}]))
    accepted, rejected = tables.tables()
    assert rejected.empty and accepted.tweet[1] == accepted.reply[2] == meant
    assert tables.mended == {name: 2}


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_what_needs_no_mending_stays(tmp_path, format):
    tables = read_tables(written(tmp_path, format, [GOOD | {"reply": text} for text in UNTOUCHED]))
    assert tables.tables()[0].reply.tolist() == UNTOUCHED and not tables.mended


def test_every_text_survives_what_other_programs_do_to_it(tmp_path):
    """Against the standard library: escaped once, or misread once, each text comes back as it was."""
    rows = [GOOD | {"reply": html.escape(text)} for text in SINGLE_LINE]
    assert read_pairs(written(tmp_path, "jsonl", rows))[0].reply.tolist() == SINGLE_LINE
    for text in ("It’s 10 °C – brr… 🙂", "très bien, ça va", "今日 🙂", "Привет, мир"):
        misread = text.encode().decode("latin-1")
        assert read_pairs(written(tmp_path, "jsonl", [GOOD | {"reply": misread}]))[0].reply.tolist() == [text]


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_certain_is_refused_with_its_cause(tmp_path, format, case):
    change, reason = REFUSED[case]
    accepted, rejected = read_pairs(written(tmp_path, format, [GOOD, GOOD | {"source": "x"} | change, GOOD]))
    assert accepted.row.tolist() == [1, 3] and rejected.row.tolist() == [2] and reason in rejected.reason[0]
    assert rejected.reason[0].startswith("line 3: ") == (format == "csv")


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("field", ["conversation_id", "reply_id"])
def test_ids_that_were_rounded_are_told_from_ids(tmp_path, format, field):
    draw = random.Random(0)
    snowflakes = [(1_400_000_000_000 + 137 * k) * 2**22 + draw.randrange(2**10) * 2**12 for k in range(200)]
    rounders = {"spreadsheet": lambda i: int(Decimal(f"{i:.14e}")),
                "JavaScript": lambda i: int(Decimal(repr(float(i))))}  # fmt: skip
    for ids in (snowflakes, [i + 1 for i in snowflakes], range(1000, 9000, 10)):
        accepted, rejected = read_pairs(written(tmp_path, format, [GOOD | {field: str(i)} for i in ids]))
        assert rejected.empty and len(accepted) == len(ids)
    for name, rounder in rounders.items():
        rounded = [str(rounder(i)) for i in snowflakes]
        accepted, rejected = read_pairs(written(tmp_path, format, [GOOD | {field: i} for i in rounded]))
        assert accepted.empty and len(rejected) == 200 and rejected.reason.str.contains("rounded by").all(), name


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.jsonl", "a.jsonl.gz"])
def test_encodings(tmp_path, name, encoding):
    rows = rows_of(random.Random(1), 3000, SINGLE_LINE)
    records = csv_records(rows, "\t" if "tsv" in name else ",")
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows] if "jsonl" in name else records
    content = b"\r\n".join(lines).decode().encode(encoding)
    total, _ = check(tmp_path, name, gzip.compress(content) if "gz" in name else content, rows, set())
    assert total == 3000
    check(tmp_path, name.removesuffix(".gz"), content[:-3], rows, {2999})  # cut within a character


def test_other_encodings_are_refused_with_the_byte(tmp_path):
    for codec in ("cp1252", "latin-1"):
        content = "\n".join(json.dumps(GOOD | {"reply": text}, ensure_ascii=False) for text in ("café", "tea"))
        (tmp_path / "a.jsonl").write_bytes(content.encode(codec))
        accepted, rejected = read_pairs(tmp_path / "a.jsonl")
        assert accepted.reply.tolist() == ["tea"]
        assert "byte 0xe9" in rejected.reason[0] and "Windows-1252" in rejected.reason[0]


STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()),
           pa.dictionary(pa.int8(), pa.large_string())]  # fmt: skip
COUNTS = [pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.decimal128(10, 0), pa.decimal128(12, 2),
          pa.decimal256(40, 0), pa.dictionary(pa.int8(), pa.int64())]  # fmt: skip
IDS = [*STRINGS, pa.int64(), pa.uint64(), pa.decimal128(20, 0)]
WRONG = {"reply": [pa.binary(), pa.int64(), pa.timestamp("us"), pa.list_(pa.string())],
         "reply_likes": [pa.bool_(), pa.timestamp("ms"), pa.date32()],
         "reply_id": [pa.float64(), pa.timestamp("ns"), pa.decimal128(10, 2)]}  # fmt: skip


def parquet_file(folder, field: str, kind: pa.DataType, values: list):
    columns = {name: pa.array([value] * len(values)) for name, value in GOOD.items()}
    column = pa.array([Decimal(value) for value in values], kind) if pa.types.is_decimal(kind) else pa.array(values)
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type).dictionary_encode().cast(kind)
    pq.write_table(pa.table(columns | {field: column.cast(kind)}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize(
    ("field", "kind"),
    [(field, kind) for field, kinds in {"reply": STRINGS, "meta": STRINGS[:3], "source": STRINGS, "reply_likes": COUNTS,
                                        "reply_id": IDS, "conversation_id": IDS}.items() for kind in kinds],
)  # fmt: skip
def test_parquet_types_that_are_read(tmp_path, field, kind):
    texts = ['{"a": 1}', "{}"] if field == "meta" else ["Rye, “please” 🥖", "いいえ"]
    numeric = field == "reply_likes" or (field.endswith("_id") and kind not in STRINGS)
    values = [12, 7] if numeric else texts
    accepted, rejected = read_pairs(parquet_file(tmp_path, field, kind, values))
    assert rejected.empty and accepted[field].tolist() == [str(v) if field.endswith("_id") else v for v in values]


@pytest.mark.parametrize(("field", "kind"), [(field, kind) for field, kinds in WRONG.items() for kind in kinds])
def test_parquet_types_that_are_refused(tmp_path, field, kind):
    columns = {name: pa.array([value]) for name, value in GOOD.items()} | {field: pa.nulls(1, kind)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet: column {field} has type"):
        read_pairs(tmp_path / "a.parquet")


def test_pandas_types_are_read(tmp_path):
    frame = pd.DataFrame([GOOD, GOOD]).astype({"reply_likes": "Int64", "tweet": "category", "reply": "string[pyarrow]"})
    frame.assign(source=pd.Categorical(["a", "b"])).to_parquet(tmp_path / "a.parquet")
    accepted, rejected = read_pairs(tmp_path / "a.parquet")
    assert rejected.empty and accepted.source.tolist() == ["a", "b"] and accepted.reply_likes.tolist() == [3, 3]


def test_the_stage_tells_what_was_mended(tmp_path, capsys):
    rows = [GOOD | {"tweet": f"Post {i // 3}", "reply": f"Tom &amp; {i}"} for i in range(60)]
    rows[7]["reply"], rows[8]["reply"] = "itâ€™s", "caf\ufffd"
    pairs = data_stage(tmp_path / "run", source="file", data_path=str(written(tmp_path, "jsonl", rows)))
    counts = read_json(tmp_path / "run/data/manifest.json")["counts"]
    assert (counts["rows"], counts["rejected"]) == (60, 1)
    assert counts["mended"] == {"HTML entities": 58, "UTF-8 read as Windows-1252": 1}
    assert "HTML entities in 58 rows; UTF-8 read as Windows-1252 in 1 rows" in capsys.readouterr().out
    assert not pairs.reply.str.contains("&amp;").any()
