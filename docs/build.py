"""Builds the documentation as HTML: the API from docstrings (pdoc), and every page of Markdown (markdown-it).

    make docs                    # .venv/bin/python docs/build.py _docs

Links of pages to files that are no pages (notebooks, configurations) lead back into the checkout. Every link within the
site and to the checkout, anchors too, is followed; one that leads nowhere is named, and the exit code is 1.
"""

import html
import importlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT))
os.environ.setdefault("PDOC_ALLOW_EXEC", "1")  # plain imports, as any program does: no stubs in place of subprocess

import lxml.html  # noqa: E402
import pdoc  # noqa: E402
import pdoc.render  # noqa: E402
from jinja2 import pass_context  # noqa: E402
from markdown_it import MarkdownIt  # noqa: E402

import grpo_engage  # noqa: E402

# The pages in the order of reading; the built site has the same tree as the checkout.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "proofs/README.md", "outputs/README.md")
STYLE = """body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{background:#f4f4f4;
padding:.7em;
overflow:auto}code{background:#f4f4f4}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .5em;
vertical-align:top;text-align:left}img{max-width:100%}nav{margin-bottom:2em}"""


def pages() -> list[Path]:
    """Every page of Markdown, relative to the checkout."""
    return [Path(page) for page in PAGES] + sorted(path.relative_to(REPO_ROOT)
                                                   for path in (REPO_ROOT / "docs").rglob("*.md"))


def slugs(headings: Iterable[str]) -> Iterator[str]:
    """The anchors of a page's headings (their Markdown, without #), as GitHub makes them: a second "a" is "a-1"."""
    seen = Counter()
    for heading in headings:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        yield slug + (f"-{seen[slug]}" if seen[slug] else "")
        seen[slug] += 1


def target_of(link: str, page: Path, site: Path) -> str:
    """`link` of `page` (relative to the checkout) as it is in `site`: pages as HTML, other files in the checkout."""
    place, _, anchor = link.partition("#")
    if "://" in link or link.startswith("mailto:") or not place:
        return link
    found = Path(os.path.normpath(page.parent / place))
    if found in pages():
        return place[: -len(".md")] + ".html" + (f"#{anchor}" if anchor else "")
    return Path(os.path.relpath(REPO_ROOT / found, site / page.parent)).as_posix()


def page_html(page: Path, site: Path) -> str:
    """`page` as a whole document of HTML. Raw HTML in it is shown, not obeyed."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse((REPO_ROOT / page).read_text(encoding="utf-8"))
    headings = [place for place, token in enumerate(tokens) if token.type == "heading_open"]
    for place, slug in zip(headings, slugs(tokens[place + 1].content for place in headings), strict=True):
        tokens[place].attrSet("id", slug)
    for token in tokens:
        for child in token.children or ():
            for name in {"href", "src"} & child.attrs.keys():
                child.attrSet(name, target_of(str(child.attrs[name]), page, site))
    up = "../" * (len(page.parts) - 1)
    title = next((token.content for token in tokens if token.type == "inline"), page.name)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f"<style>{STYLE}</style></head><body><nav><a href=\"{up}README.html\">grpo_engage</a> · "
            f"<a href=\"{up}docs/README.html\">documentation</a> · <a href=\"{up}api/grpo_engage.html\">API</a></nav>\n"
            f"{reader.renderer.render(tokens, reader.options, {})}</body></html>\n")


def shown(docstring: str) -> str:
    """`docstring` as Markdown in which a <name> outside code is text and no tag of HTML."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", docstring, flags=re.DOTALL)
    return "".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(parts))


def modules() -> list[str]:
    """The names of all modules of the package, private ones aside."""
    paths = (path.relative_to(REPO_ROOT).with_suffix("") for path in (REPO_ROOT / "grpo_engage").rglob("*.py"))
    return sorted(".".join(path.parts) for path in paths if not path.name.startswith("_"))


def introduced(name: str, api: Path) -> None:
    """Has the module `name` say which notebook it is exported from."""
    module = importlib.import_module(name)
    source = Path(module.__file__)
    notebook = re.search(r"File to edit: (\S+?\.ipynb)", source.read_text(encoding="utf-8"))
    there = Path(os.path.normpath(source.parent / notebook[1]))
    page = api / Path(*name.split(".")[:-1])
    module.__doc__ += (f"\n\nExplained and shown in [{there.relative_to(REPO_ROOT).as_posix()}]"
                       f"({Path(os.path.relpath(there, page)).as_posix()}).")


def front_page() -> None:
    """Has the package's page list the names of the front door, and its rooms."""
    names = "\n".join(f"* `grpo_engage.{module}.{name}`" for name, module in grpo_engage._MODULE.items())
    grpo_engage.__doc__ = f"{grpo_engage.__doc__.splitlines()[0]}\n\n`from grpo_engage import …` has\n\n{names}"
    grpo_engage.__all__ = sorted(path.parent.name for path in (REPO_ROOT / "grpo_engage").glob("*/__init__.py"))


def build(site: Path) -> None:
    """Writes api/ and a page of HTML for each page of Markdown into `site`, in place of an earlier build."""
    shutil.rmtree(site, ignore_errors=True)
    for page in pages():
        place = (site / page).with_suffix(".html")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(page_html(page, site), encoding="utf-8")
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text="grpo_engage")
    markdown = pdoc.render.env.filters["to_markdown"]
    pdoc.render.env.filters["to_markdown"] = pass_context(lambda context, text: shown(markdown(context, text)))
    names = modules()
    for name in names:
        introduced(name, site / "api")
    front_page()
    pdoc.pdoc("grpo_engage", output_directory=site / "api")


def broken_links(site: Path) -> list[str]:
    """Each link of a page in `site` that leads to no file, or to no such place in a page: "PAGE: LINK"."""
    reader = lxml.html.HTMLParser(encoding="utf-8")
    documents = {path: lxml.html.parse(str(path), reader) for path in site.rglob("*.html")}
    ids = {path: {*document.xpath("//@id"), *document.xpath("//a/@name")} for path, document in documents.items()}
    broken = []
    for page, document in documents.items():
        for link in sorted({str(link) for link in document.xpath("//@href | //@src")}):
            place, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or link.startswith("//"):
                continue
            target = Path(os.path.normpath(page.parent / unquote(place))) if place else page
            if not target.exists() or (anchor and target in ids and unquote(anchor) not in ids[target]):
                broken.append(f"{page.relative_to(site).as_posix()}: {link}")
    return broken


def main(folder: str) -> int:
    """Builds into `folder`; returns the exit code."""
    build(site := Path(folder).resolve())
    broken = broken_links(site)
    for line in broken:
        print(f"leads nowhere: {line}", file=sys.stderr)
    print(f"{site / 'README.html'}: {len(list(site.rglob('*.html')))} pages, {len(broken)} broken links")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if sys.argv[1:] else str(REPO_ROOT / "_docs")))
