"""escape_latex against pandoc's reader, Typst and LaTeX: three programs that were not written here."""

import json
from pathlib import Path

import pypandoc
import pytest
import typst
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grpo_engage.paper.pdf import build_pdf, escape_latex, latex_obstacle, macro_name, undefined_macros

PREAMBLE = "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage[T1]{fontenc}\n" \
           "\\usepackage{textcomp,booktabs,framed,graphicx}\n\\begin{document}\n"
NASTY = [
    r"$ \input{} % # & _ ^ ~ { } \ <script>alert('x')</script> 😀", r"\input{/etc/passwd}", r"\write18{touch owned}",
    "[1] first", "* star", "-- --- << >> ,, `` '' ?` !`", "\u202eright to left\u202c", "\x00 bell \x07 esc \x1b[0m",
    "\ud800 lone surrogate", "line\nbreak\r\n\ttab", "".join(map(chr, range(0xC0, 0x100))), "Ł ő",
    "日本語 العربية हिन्दी", "“quotes” ‘single’ – — … €", r"\end{tabular}\end{document}", "#set page(fill: red)",
    "@reference <label> #emph[x] `raw`", "a" * 500, "%", "\\", "&", "= heading", "// comment /* more */",
    "https://example.invalid/a_b?c=d&e=100%25#f", "",
]  # fmt: skip
printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


def plain(latex: str) -> str:
    """What pandoc reads in `latex`. From its JSON: its writer of plain text marks what could be Markdown ("![")."""
    def text(node) -> str:
        if isinstance(node, list):
            return "".join(map(text, node))
        if not isinstance(node, dict):
            return ""  # attributes and their like
        kind = node.get("t")
        if kind == "Quoted":
            first, last = "“”" if node["c"][0]["t"] == "DoubleQuote" else "‘’"
            return first + text(node["c"][1]) + last
        return node["c"] if kind == "Str" else " " if kind in ("Space", "SoftBreak") else text(node.get("c", []))

    return text(json.loads(pypandoc.convert_text(latex, "json", "latex"))["blocks"]).strip()


@given(printable)
@example("![x")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ascii_comes_back_unchanged(text):
    wanted = " ".join(text.split())
    assert plain("x" + escape_latex(text) + "x") == "x" + wanted + "x"


def test_punctuation_comes_back_too():
    # (pandoc knows neither \\textbar nor \\textemdash, and drops what it does not know without a word)
    text = "“quotes” ‘single’ – — … € é ß Ñ ø × ÷ |"
    assert plain(escape_latex(text)) == text


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_nothing_special_is_left(text):
    escaped = escape_latex(text)
    assert all(" " <= character <= "~" or "\u00c0" <= character <= "\u00ff" or character in "“”‘’–—…€"
               for character in escaped)
    depth = 0
    for before, character in zip("x" + escaped, escaped, strict=False):
        depth += (character == "{") - (character == "}") if before != "\\" else 0
        assert depth >= 0
    assert depth == 0


def document(folder: Path) -> Path:
    rows = "".join(f"{escape_latex(text)} & {number} \\\\\n" for number, text in enumerate(NASTY))
    (folder / "main.tex").write_text(
        PREAMBLE + "\\begin{table}\\caption{" + escape_latex(NASTY[0]) + "}\n\\begin{tabular}{p{10cm}r}\\toprule\n"
        "Text & Number \\\\ \\midrule\n" + rows + "\\bottomrule\n\\end{tabular}\\end{table}\n\\end{document}\n",
        encoding="utf-8")
    return folder


def test_typst_sets_every_nasty_text(tmp_path):
    build_pdf(document(tmp_path), "typst")
    assert (tmp_path / "main.pdf").read_bytes().startswith(b"%PDF")
    typ = (tmp_path / "main.typ").read_text()
    assert typ.count("\n    [") >= len(NASTY)  # every row is there: no % swallowed one


@pytest.mark.skipif(latex_obstacle(PREAMBLE) is not None, reason="TeX is not installed on this machine")
def test_latex_sets_every_nasty_text(tmp_path):
    build_pdf(document(tmp_path), "latexmk")
    assert (tmp_path / "main.pdf").read_bytes().startswith(b"%PDF")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("engine", ["typst", "latexmk"])
def test_a_program_in_the_source_does_not_run(tmp_path, engine):
    if engine == "latexmk" and latex_obstacle(PREAMBLE) is not None:
        pytest.skip("TeX is not installed on this machine")
    (tmp_path / "main.tex").write_text(PREAMBLE + rf"x\immediate\write18{{touch {tmp_path}/owned}}\end{{document}}")
    build_pdf(tmp_path, engine)
    assert not (tmp_path / "owned").exists()


def test_a_missing_input_is_an_error(tmp_path):
    (tmp_path / "main.tex").write_text(PREAMBLE + r"\input{tables/none.tex}\end{document}")
    with pytest.raises(RuntimeError, match="none"):
        build_pdf(tmp_path, "typst")
    (tmp_path / "main.tex").write_text(PREAMBLE + r"\includegraphics{figures/none.pdf}\end{document}")
    with pytest.raises(RuntimeError, match="none"):
        build_pdf(tmp_path, "typst")


def test_macro_names_are_letters_and_differ():
    metrics = ["pass@1", "pass@5", "pass@10", "distinct_2", "self_bleu", "rouge_l"]
    names = [macro_name(metric, arm) for metric in metrics for arm in ("baseline", "grpo", "best-of-16", "matched_2")]
    assert len(set(names)) == len(names) and all(name.isascii() and name.isalpha() for name in names)


def test_undefined_macros_reads_comments_and_line_breaks():
    assert undefined_macros("% \\Commented\n5\\% \\Used \\\\Row \\Own", r"\newcommand{\Own}{1}") == [r"\Used"]


def test_a_table_longer_than_a_page_is_broken_and_a_short_one_is_not(tmp_path):
    def table(rows):
        lines = "".join(f"row {row} & {row} \\\\\n" for row in range(rows))
        return (f"\\begin{{table}}\\caption{{t}}\\label{{tab:t{rows}}}\n\\begin{{tabular}}{{lr}}\\toprule\nA & B \\\\ "
                f"\\midrule\n{lines}\\bottomrule\n\\end{{tabular}}\\end{{table}}\n")
    (tmp_path / "main.tex").write_text(PREAMBLE + "See \\ref{tab:t120}.\n" + table(120) + "\\end{document}")
    build_pdf(tmp_path, "typst")
    ask = tmp_path / "ask.typ"
    text = (tmp_path / "main.typ").read_text()
    ask.write_text(text + "\n#context [#metadata(counter(page).final().first()) <pages>]")
    assert int(typst.query(str(ask), "<pages>", field="value", one=True, ignore_system_fonts=True)) >= 3
    (tmp_path / "main.tex").write_text(PREAMBLE + table(30) + table(31) + "\\end{document}")
    build_pdf(tmp_path, "typst")
    assert "breakable: true" not in (tmp_path / "main.typ").read_text()
