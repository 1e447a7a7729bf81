"""The documentation: pages and API are built, every link leads somewhere, nothing generated or quoted is stale."""

import ast
import configparser
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import lxml.html
import pandas as pd
import pytest
import yaml

import grpo_engage
from grpo_engage.base.core import REPO_ROOT


def script(name):
    """The script `docs/<name>.py`, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPO_ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    return script("build")


@pytest.fixture(scope="module")
def errors():
    return script("errors")


@pytest.fixture(scope="module")
def provoked(errors):
    """The messages of the page of errors; reading every test and notebook takes seconds."""
    return errors.provoked()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation as `make docs` builds it; that command fails where a link leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, REPO_ROOT / "docs" / "build.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 broken links" in done.stdout
    return folder


def test_every_public_name_of_the_front_door_is_in_the_api(site):
    front = (site / "api" / "grpo_engage.html").read_text(encoding="utf-8")
    for name, module in grpo_engage._MODULE.items():
        page = site / "api" / "grpo_engage" / f"{module.replace('.', '/')}.html"
        assert f'id="{name}"' in page.read_text(encoding="utf-8"), name
        assert f'grpo_engage/{module.replace(".", "/")}.html#{name}"' in front, name


def test_every_module_has_a_page_that_names_its_notebook(site, build):
    for name in build.modules():
        page = (site / "api" / Path(*name.split("."))).with_suffix(".html")
        text = lxml.html.parse(str(page)).getroot().text_content()
        assert name.count(".") < 2 or re.search(r"Explained and shown in nbs/\S+\.ipynb", text), name


def test_what_is_in_angle_brackets_is_no_tag(site, build):
    assert build.shown("a `<arm>` and <arm>") == "a `<arm>` and &lt;arm>"
    for page in (site / "api").rglob("*.html"):
        assert lxml.html.parse(str(page)).xpath("//arm | //run | //stage | //script[contains(@src, '://')]") == [], page


def test_a_link_that_leads_nowhere_is_found(build, tmp_path):
    (tmp_path / "b.html").write_text("<h1 id='one'>One</h1>", encoding="utf-8")
    links = ("#here", "#there", "b.html#one", "b.html#two", "c.html", "https://example.invalid/x")
    text = '<p id="here"><img src="d.png">' + "".join(f'<a href="{link}">x</a>' for link in links)
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    assert build.broken_links(tmp_path) == [f"a.html: {link}" for link in ("#there", "b.html#two", "c.html", "d.png")]


def test_anchors_are_those_of_github(build):
    headings = ["Your own data", "6. Evaluation", "`check`, before: a run", "[A](b.md) link", "Your own data"]
    anchors = ["your-own-data", "6-evaluation", "check-before-a-run", "a-link", "your-own-data-1"]
    assert [*build.slugs(headings)] == anchors


def test_raw_html_of_a_page_is_shown_and_not_obeyed(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "REPO_ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "page.md").write_text("# A <b>&\n\n<script>alert(1)</script> | [x](docs/)\n", encoding="utf-8")
    made = build.page_html(Path("page.md"), tmp_path / "site")
    assert "<script>" not in made and "&lt;script&gt;" in made and 'href="../docs"' in made


def test_every_page_of_docs_is_listed(build):
    index = (REPO_ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    names = {page.name for page in build.pages() if page.parent == Path("docs")} - {"README.md"}
    assert {name for name in names if f"]({name})" not in index} == set()


def test_the_errors_page_is_what_the_tests_provoke(errors, provoked):
    """Where this fails: `make errors`, and the entries of docs/errors.yaml that it asks for."""
    topics = yaml.safe_load(errors.ENTRIES.read_text(encoding="utf-8"))
    text, wrong = errors.page(provoked, topics)
    assert wrong == []
    assert text == errors.PAGE.read_text(encoding="utf-8"), "docs/errors.md is stale: make errors"
    for topic in topics:
        assert topic["cause"].endswith(".") and topic["remedy"].endswith("."), topic["topic"]


def test_a_new_message_and_a_vanished_one_are_seen(errors, monkeypatch):
    topics = [{"topic": "Disk", "cause": "It is full.", "remedy": "Free some.", "messages": ["disk is full", "gone"]}]
    known = errors.Message("OSError", "the disk is full: \0", "the disk is full: ⟨path⟩", "base.storage", {"x.py"})
    new = errors.Message("ValueError", "another", "another thing", "data.rows", {"x.py"})
    monkeypatch.setattr(errors, "messages", lambda: [known, new])
    text, wrong = errors.page([known, new], topics)
    assert "`` the disk is full: ⟨path⟩ ``" in text and "**Remedy.** Free some." in text
    assert ["another thing" in wrong[0], "'gone'" in wrong[1], len(wrong)] == [True, True, 2]
    assert errors.text_of(ast.parse("f'{path}: no {a.b}' + 'x'").body[0].value) == ("\0: no \0x", "⟨path⟩: no ⟨…⟩x")


def test_a_message_is_joined_to_the_test_that_expects_it(provoked):
    found = {message.shown: message.tests for message in provoked}
    assert "tests/test_gate.py" in found["⟨…⟩ of ⟨…⟩ scores are NaN: every reply needs a score"]
    assert "nbs/base/01_storage.ipynb" in found["⟨what⟩=⟨…⟩: no file can be called that; take the zero byte out of it"]


def python_of(page):
    text = (REPO_ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_a_diversity_and_an_advantage_of_ones_own(run_script, tmp_path):
    example, = python_of("docs/extending.md")
    assert len(example.splitlines()) <= 30
    checks = """
import numpy as np
trainer, lead, openings = of["trainer"], of["lead"], of["openings"]
assert trainer.state.global_step == 3 and trainer.advantage is lead and trainer.diversity_metric is openings
log = [row for row in trainer.state.log_history if "diversity" in row]
assert len(log) == 3 and all(0 < row["diversity"] <= 1 for row in log)
assert openings(["a b", "A c", "d"]) == 2 / 3 and openings(["a"]) == 0 and openings([]) == 0
assert np.allclose(lead(np.array([[0.0, 1.0, 5.0]])), [[-3.0, -1.5, 4.5]])
before, after = trainer._scored[1][:8], openings(trainer._scored[1][:8])
assert 0 <= after <= 1 and len(before) == 8
weights = {name: value for name, value in trainer.model.named_parameters() if "lora_B" in name}
assert weights and all(abs(value).max() > 0 for value in weights.values())  # 0 before training
assert trainer._name == "0.7 x GRPO with lead advantages + 0.3 x diversity of generations", trainer._name
"""
    run_script(example, tmp_path, checks)


def test_python_of_the_pages_compiles_and_its_imports_are_there():
    for page in sorted((REPO_ROOT / "docs").glob("*.md")):
        for source in python_of(page):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("grpo_engage"):
                    module = importlib.import_module(node.module)
                    assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], page.name


def test_numbers_of_the_readme_are_those_of_committed_tables():
    """Whoever runs `benchmarks/systems` or `judges` again changes the README with them."""
    readme = " ".join((REPO_ROOT / "README.md").read_text(encoding="utf-8").split())

    def short(value, digits=3):
        return f"{value:.{digits}f}".replace("0.", ".", 1)

    primary = pd.read_csv(REPO_ROOT / "benchmarks/systems/primary.csv", index_col="arm")
    frontier = pd.read_csv(REPO_ROOT / "benchmarks/systems/frontier.csv", index_col="arm")
    quoted = [primary.loc[arm] for arm in ("grpo_max", "grpo", "hybrid")]
    quoted += [frontier.loc[arm] for arm in ("grpo_max", "grpo", "hybrid", "polychromic")]
    for row in quoted:
        said = f"{short(row['difference'])} [{short(row['low'])}, {short(row['high'])}]"
        assert said in readme, (row.name, said)
    assert (primary.loc[["grpo_max", "grpo"], "p_holm"] < 0.001).all() and "both p < .001 after Holm" in readme
    checks = pd.read_csv(REPO_ROOT / "outputs/published/over_training/checks.csv")
    checks = checks[(checks["metric"] == "pass@10") & (checks["setting"] == "hybrid")].set_index("versus")
    for name in ("baseline_long", "hybrid_no_reward", "hybrid_no_diversity"):
        row = checks.loc[name]
        said = f"{short(row['difference'])} [{short(row['ci_low'])}, {short(row['ci_high'])}]"
        assert said in readme, (name, said)
    second = pd.read_csv(REPO_ROOT / "outputs/published/over_training_second/answers.csv")
    row = second[(second["question"] == "4 beside a temperature") & (second["setting"] == "hybrid")
                 & (second["metric"] == "pass@10")].iloc[0]
    assert f"{short(row['difference'])} [{short(row['ci_low'])}, {short(row['ci_high'])}]" in readme
    ladder = pd.read_csv(REPO_ROOT / "benchmarks/judges/ladder.csv", index_col="rung")
    assert f"Over {ladder.loc['judge', 'n_systems']:.0f} systems" in readme
    for rung in ("judge", "twin", "length"):
        assert re.search(rf"(?<![\d.-]){re.escape(short(ladder.loc[rung, 'with_gold'], 2))}(?!\d)", readme), rung


def test_one_version_everywhere():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(REPO_ROOT / "settings.ini", encoding="utf-8")
    version = settings["DEFAULT"]["version"]
    changelog = (REPO_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    citation = yaml.safe_load((REPO_ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert version == grpo_engage.__version__ == citation["version"] == released[0][0]
    assert released[0][1] == str(citation["date-released"])
    assert [one for one, _ in released] == sorted((one for one, _ in released), reverse=True)


def test_the_readme_is_short():
    assert len((REPO_ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
