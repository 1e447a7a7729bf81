"""The paper stage on a made-up run: what it writes, what it refuses, and that both engines really set it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typst

from grpo_engage.base.core import read_json, write_csv, write_json, write_parquet
from grpo_engage.paper import arms as arms_of
from grpo_engage.paper import exhibits, paper, results
from grpo_engage.paper.endpoint_exhibits import primary_table
from grpo_engage.paper.exhibits import number, with_interval
from grpo_engage.paper.pdf import HOW_TO_GET_LATEX, build_pdf, escape_latex, latex_obstacle, undefined_macros
from grpo_engage.text.safety import SAFETY_SOURCES

SOURCE = Path(__file__).parents[1] / "paper" / "main.tex"
NASTY = r"a_run $ \input{x} % # & ^ ~ { } <script> 😀"


def manifest(stage: str, **more) -> dict:
    return {"stage": stage, "status": "completed", "parameters": {"seed": 0, "top_p": 1.0},
            "git": {"commit": "0123456789abcdef", "dirty": True}, "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "hardware": {"machine": "x86_64", "system": "Linux", "cpu_count": 2, "gpus": []},
            "wall_seconds": 12.5, "cost_usd": 0.0} | more


def make_run(run_dir: Path, arms=("baseline", "grpo"), seeds=(0,), policy="nano", source="simulator") -> Path:
    """A run folder with the files that the paper stage reads, in the formats of the stages that write them."""
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame({"conversation_id": np.repeat([f"c{i}" for i in range(50)], 4), "source": source,
                          "split": np.repeat(["policy", "reward", "judge", "validation", "test"], 40),
                          "reply_likes": rng.negative_binomial(0.3, 0.2, 200).astype(float)})
    pairs = pairs.assign(reply_time_diff_seconds=rng.lognormal(7, 1, 200),
                         reply_author_followers=rng.lognormal(6, 2, 200).round())
    write_parquet(run_dir / "data" / "pairs.parquet", pairs)
    write_csv(run_dir / "data" / "rejected.csv", pd.DataFrame({"row": [7], "reason": ["empty"], "excerpt": ["x"]}))
    for stage in ("heuristic_reward", "reward_model"):
        write_json(run_dir / stage / "validation.json", VALIDATION[stage])
    write_json(run_dir / "policy" / "policy.json", {"name": policy, "n_parameters": 1_100_000, "dtype": "float32",
                                                    "sha256": "ab" * 32,
                                                    "provenance": {"source": NASTY, "weights": "4-bit, dequantised"}})
    for stage in ("data", "heuristic_reward", "reward_model", "policy", "evaluation"):
        write_json(run_dir / stage / "manifest.json", manifest(stage, counts={"exploits": 30, "exploits_refused": 29}))
    metrics, curves = [], []
    for place, arm in enumerate(("base", *arms)):
        for seed in seeds if arm != "base" else seeds[:1]:
            for metric in ("pass@1", "pass@5", "pass@10", "self_bleu", "distinct_2", "rouge_l", "judge_engagement",
                           "reward_engagement", "gold_appeal", "length"):
                value = np.nan if metric == "gold_appeal" and source != "simulator" else 0.4 + place / 10 + seed / 100
                metrics.append((arm, seed, metric, value, value - 0.1, value + 0.1, 16))
        curves += [(arm, k, k / 20, k / 20 - 0.05, k / 20 + 0.05, 16, len(seeds)) for k in range(1, 17)]
    evaluation = run_dir / "evaluation"
    write_csv(evaluation / "metrics.csv", pd.DataFrame(
        metrics, columns=["arm", "seed", "metric", "value", "ci_low", "ci_high", "n"]))
    write_csv(evaluation / "curves.csv", pd.DataFrame(
        curves, columns=["arm", "k", "value", "ci_low", "ci_high", "n", "n_seeds"]))
    over = "posts and seeds" if len(seeds) > 1 else "posts, of one trained seed"
    write_csv(evaluation / "comparisons_by_seed.csv", pd.DataFrame(
        [(arm, "baseline", metric, -0.02, -0.1, 0.06, 0.4, 16, over, 0.11)
         for arm in ("base", *arms[1:]) for metric in ("pass@10", "self_bleu", "length")],
        columns=["arm", "versus", "metric", "difference", "low", "high", "p_value", "n_posts", "over", "smallest"]))
    write_csv(evaluation / "primary.csv", pd.DataFrame(
        [(arm, 0.5, 0.7, 0.71, 0.66, 0.05, -0.03, 0.13, 0.2, 0.4, "not told apart", over, 0.11, 16, len(seeds))
         for arm in arms[1:]],
        columns=["arm", "temperature", "versus_temperature", "value", "baseline", "difference", "low", "high",
                 "p_value", "p_holm", "conclusion", "over", "smallest", "n_posts", "n_seeds"]))
    write_csv(evaluation / "frontier.csv", pd.DataFrame(
        [(arm, 0.02, -0.05, 0.09) for arm in arms[1:]], columns=["arm", "difference", "low", "high"]))
    write_csv(evaluation / "frontier_points.csv", pd.DataFrame(
        [(arm, heat, heat == 0.5, 0.4 + heat / 4, 0.02, 0.7 - heat / 9, 0.03, 16)
         for arm in arms for heat in (0.5, 1.0)],
        columns=["arm", "temperature", "chosen", "diversity", "diversity se", "pass@10", "pass@10 se", "n_posts"]))
    write_csv(evaluation / "cautions.csv", pd.DataFrame([], columns=["kind", "arm", "short", "text"]))
    write_json(evaluation / "pass.json", {"tau": 0.7312, "validation_pass_at_10": 0.61, "warnings": [],
                                          "judge": "gold" if source == "simulator" else "model"})
    for arm in arms:
        for seed in seeds:
            folder = run_dir / "train" / arm / f"seed{seed}"
            steps = np.arange(1, 9)
            write_csv(folder / "train_log.csv", pd.DataFrame(
                {"step": steps, "loss": 3 / steps, "reward": steps / 10 if rewarded(arm) else np.nan}))
            write_json(folder / "verdict.json", {
                "loss_falling": {"answer": NOT_ASKED if rewarded(arm) else "yes"},
                "reward_rising": {"answer": "not visibly" if rewarded(arm) else NOT_ASKED}})
            write_json(folder / "manifest.json", manifest("train", wall_seconds=36.0, **trained(arm)))
    return run_dir


INTERVAL = {"estimate": 0.55, "ci_low": 0.5, "ci_high": 0.6, "n": 90}
VALIDATION = {
    "heuristic_reward": {"n_pairs": 90, "reason": None, "heuristic": INTERVAL, "length": INTERVAL},
    "reward_model": {
        "n_pairs": {"all": 120, "clear": 90, "similar_length": 40, "residual": 100},
        "agreement": {"spearman_within_posts": INTERVAL},
        "verdicts": {name: {"verdict": "validated", "validated": True, "text": f"validated: {name} & more",
                            "gain": 0.005, "ci_low": 0.004, "ci_high": 0.006} for name in ("reward", "judge")},
        "accuracy": {name: {kind: INTERVAL for kind in ("all", "clear", "similar_length", "residual")}
                     for name in ("reward", "judge", "heuristic", "length", "tfidf_ridge", "metadata")}},
}
TRAINING = {"max_steps": 8, "batch_size": 16, "learning_rate_supervised": 1e-3, "learning_rate_policy": 5e-4,
            "posts_per_step": 4, "num_generations": 4, "reward": "combined", "kl_weight": 0.02, "loss_type": "dapo",
            "warmup_steps": 0, "lora_r": 16}
WEIGHTS = {"polychromic": (1.0, 0.0, 0.3), "grpo": (0.0, 1.0, 0.0), "hybrid": (0.3, 0.5, 0.2)}


def rewarded(arm: str) -> bool:
    return arm in WEIGHTS and WEIGHTS[arm][1] > 0


def trained(arm: str, **changes) -> dict:
    """What the training stage notes of an arm: its parameters, weights, and how many replies it sampled."""
    alpha, beta, lam = WEIGHTS.get(arm, (1.0, 0.0, 0.0))
    given = TRAINING | changes
    sampled = given["max_steps"] * given["posts_per_step"] * given["num_generations"] if beta or lam else 0
    return {"parameters": given, "counts": {"replies_sampled": sampled},
            "objective": {"alpha": alpha, "beta": beta, "lam": lam, "warm_start": "baseline" if beta else "base"}}


NOT_ASKED = "not asked of this arm"


def stage(run_dir: Path, **changes) -> dict:
    settings = {"arms": ["baseline", "grpo"], "seeds": [0], "preset": "smoke", "title": "A & B: 100% of $x_1$",
                "engine": "typst", "usd_per_hour": 2.0} | changes
    return paper.paper_stage(run_dir, **settings)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "smoke")
    stage(run_dir)
    return run_dir


def read_macros(run_dir: Path) -> dict[str, str]:
    text = (run_dir / "paper" / "macros.tex").read_text()
    return dict(re.findall(r"^\\newcommand\{\\([A-Za-z]+)\}\{(.*)\}$", text, re.M))


def banner_pages(folder: Path) -> list[int]:
    """The pages on which the warning stands, asked of typst itself."""
    question = folder / "question.typ"
    question.write_text((folder / "main.typ").read_text() +
                        "\n#context [#metadata(query(<banner>).map(it => it.location().page())) <pages>]")
    answer = typst.query(str(question), "<pages>", field="value", one=True, ignore_system_fonts=True)
    question.unlink()
    return json.loads(answer)


def test_everything_is_there(smoke):
    folder = smoke / "paper"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in ("frontier", "data_margins", "training_curves", "pass_at_k")
               for kind in ("pdf", "png")}
    tables = {f"tables/{name}.tex" for name in ("results", "arms", "rivals", "primary", "comparisons", "data",
                                                "rewards", "provenance")}
    assert figures | tables | {"macros.tex", "main.tex", "main.pdf", "manifest.json", "references.bib"} <= names
    facts = read_json(folder / "manifest.json")
    assert facts["status"] == "completed" and facts["smoke"] is True and facts["pdf"]["engine"] == "typst"


def test_numbers_are_the_runs(smoke):
    macros = read_macros(smoke)
    metrics = pd.read_csv(smoke / "evaluation" / "metrics.csv").set_index(["arm", "metric"])
    assert float(macros["PassTenGrpo"]) == pytest.approx(metrics.loc[("grpo", "pass@10"), "value"], abs=5e-4)
    assert float(macros["PassTenGrpoLow"]) == pytest.approx(metrics.loc[("grpo", "pass@10"), "ci_low"], abs=5e-4)
    assert macros["PassThreshold"] == "0.731" and macros["NumReplies"] == "200" and macros["NumRejected"] == "1"
    likes = pd.read_parquet(smoke / "data" / "pairs.parquet")["reply_likes"]
    assert macros["ShareZeroLikes"] == f"{100 * np.mean(likes == 0):.1f}\\%"
    # 36 s at 2 dollars an hour, beside the metrics in the one table
    results = (smoke / "paper" / "tables" / "results.tex").read_text()
    assert macros["TrainCostGrpo"] == "0.0200" and "0.0200" in results and "36.0" in results
    assert "0.60 {[}0.50, 0.70{]}" in results


def test_no_result_is_typed_into_the_source(smoke):
    body = SOURCE.read_text().split(r"\begin{document}")[1]
    prose = re.sub(r"(?s)\\begin\{equation\}.*?\\end\{equation\}|\$[^$]*\$", " ", body)
    prose = re.sub(r"\[width=[\d.]+\\linewidth\]|\\(ref|eqref|label|input|citep?|citet)\{[^}]*\}", " ", prose)
    prose = re.sub(r"Pass@10|distinct-2|%.*", " ", prose)  # two names of metrics
    assert re.findall(r"\d+(?:\.\d+)?", prose) == []
    assert undefined_macros(SOURCE.read_text(), (smoke / "paper" / "macros.tex").read_text()) == []


def captions_of_figures(source: str) -> dict[str, str]:
    """Each figure file that `source` (LaTeX) includes -> the caption of the environment that it stands in."""
    found = {}
    for body in re.findall(r"(?s)\\begin\{figure\}.*?\\end\{figure\}", source):
        caption = re.search(r"(?s)\\caption\{(.*)\}\\label", body)
        for name in re.findall(r"\\includegraphics(?:\[[^]]*\])?\{figures/(\w+)\.pdf\}", body):
            found[name] = caption.group(1) if caption else ""
    return found


# What both the notebook and the paper call to draw the figure.
DRAWN_BY = {"frontier": "plot_temperatures", "data_margins": "draw_margins", "training_curves": "curves_figure",
            "pass_at_k": "plot_pass_curves"}


def test_every_caption_names_the_notebook_that_makes_the_figure(smoke):
    source, macros = SOURCE.read_text(), read_macros(smoke)
    captions = captions_of_figures(source)
    assert len(captions) == source.count(r"\includegraphics") and set(captions) == set(paper.FIGURES) == set(DRAWN_BY)
    for name, caption in captions.items():
        quoted = re.search(r"\(\\(Notebook[A-Za-z]+)\)\.$", caption)
        assert quoted, f"the caption of {name} does not end with the macro of its notebook: {caption}"
        notebook = re.fullmatch(r"notebook \\texttt\{(.+)\}", macros[quoted.group(1)]).group(1).replace("\\", "")
        assert notebook == paper.FIGURES[name][1], f"the caption of {name} names the notebook of another figure"
        made = json.loads((SOURCE.parents[1] / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))
        code = "".join("".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code")
        assert f"{DRAWN_BY[name]}(" in code, f"{notebook} does not draw {name}"


def test_a_caption_without_its_notebook_would_be_seen():
    figure = r"\begin{figure}\includegraphics[width=1cm]{figures/x.pdf}\caption{A (b\n).}\label{x}\end{figure}"
    assert captions_of_figures(figure) == {"x": r"A (b\n)."}
    assert captions_of_figures(figure.replace("caption", "footnote")) == {"x": ""}


def test_smoke_says_so_on_its_first_page(smoke):
    assert banner_pages(smoke / "paper") == [1]
    assert "SMOKE RUN" in (smoke / "paper" / "main.typ").read_text()


def test_other_runs_have_no_banner_and_say_what_their_seeds_support(tmp_path):
    run_dir = make_run(tmp_path / "real", seeds=(0, 1, 2), policy="smollm2-135m", source="file")
    stage(run_dir, seeds=[0, 1, 2], preset="pheme-cpu")
    text = (run_dir / "paper" / "main.typ").read_text()
    assert "SMOKE" not in text and "may be read as evidence" in text.replace("\n", " ")
    macros = read_macros(run_dir)
    assert macros["NumSeeds"] == "3 training seeds" and macros["RunBanner"] == ""
    assert "GoldAppealGrpo" not in macros  # NaN: not computable on real data, so it cannot be quoted
    assert "Appeal" not in (run_dir / "paper" / "tables" / "results.tex").read_text()
    arms = ["baseline", "polychromic", "grpo", "hybrid", "baseline_long", "a_b"]  # more than a page is wide
    make_run(tmp_path / "few", arms=arms, seeds=(0, 1), policy="smollm2-135m")
    stage(tmp_path / "few", arms=arms, seeds=[0, 1], preset="pheme-cpu")
    found = [line.split(" & ") for line in (tmp_path / "few/paper/tables/arms.tex").read_text().splitlines()]
    assert [line[1:] for line in found if line[0] == "Reward calls"] == [["0", "0", "128", "128", r"0 \\"],
                                                                        ["0", "", "", "", r" \\"]]
    assert "supports no claim" in read_macros(tmp_path / "few")["ClaimStatement"]


def test_same_run_same_bytes(smoke, tmp_path):
    copy = tmp_path / "smoke"
    shutil.copytree(smoke, copy)
    stage(copy)
    for path in (smoke / "paper").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (copy / path.relative_to(smoke)).read_bytes() == path.read_bytes(), path.name


def test_strangers_text_stays_text(tmp_path):
    run_dir = make_run(tmp_path / "it's 100% $x_1$ & #1")
    stage(run_dir)
    typ = (run_dir / "paper" / "main.typ").read_text()
    assert r"\\input{x}" in typ and "U+1F600" in typ


def test_the_primary_table_shows_the_corrected_p_value_and_what_it_rests_on(tmp_path):
    table = primary_table(results.load_run(make_run(tmp_path), ["baseline", "grpo"], [0]))
    row = next(line for line in table.splitlines() if line.startswith("grpo"))
    cells = [cell.strip().replace("{}", "") for cell in row.rstrip("\\ ").split("&")]
    assert cells[1:3] == ["0.50", "0.710"] and cells[4:6] == ["0.400", "0.110"]  # p 0.2 before the correction
    assert cells[-2:] == ["16", "posts, of one trained seed"]


def test_comparisons_say_what_they_rest_on_and_what_they_would_have_found(tmp_path):
    """What all intervals are over is said once, in the caption; where they differ, in a column."""
    run = results.load_run(make_run(tmp_path), ["baseline", "grpo"], [0])

    def cells_of(shown):
        row = next(line for line in exhibits.comparisons_table(shown).splitlines() if "Pass@10" in line)
        return [cell.strip().replace("{}", "") for cell in row.rstrip("\\ ").split("&")]

    assert cells_of(run)[-2:] == ["0.110", "16"] and len(cells_of(run)) == 5
    over = exhibits.comparisons_over(run).replace("{}", "")  # of escaping
    assert over == "Every interval is over posts, of one trained seed."
    twice = pd.concat([run.comparisons, run.comparisons.assign(over="posts and seeds")])
    mixed = replace(run, comparisons=twice)
    assert cells_of(mixed)[-3:] == ["0.110", "posts, of one trained seed", "16"]
    assert exhibits.comparisons_over(mixed) == ""


def test_names_of_arms_stay_text(tmp_path):
    """A rival is called as its file is; an arm of ours may have an underscore."""
    run = results.load_run(make_run(tmp_path, arms=("baseline", "baseline_long")), ["baseline", "baseline_long"], [0])
    rivals = exhibits.rivals_table(replace(run, rivals=run.metrics[run.metrics["arm"] == "baseline"].assign(arm=NASTY)))
    assert escape_latex(NASTY) in rivals and NASTY not in rivals
    assert r"baseline\_long" in exhibits.results_table(run, 1.0)


def test_what_is_missing_is_named(tmp_path):
    run_dir = make_run(tmp_path / "smoke")
    (run_dir / "data" / "rejected.csv").unlink()
    (run_dir / "train" / "grpo" / "seed0" / "train_log.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"data/rejected.csv, train/grpo/seed0/train_log.csv"):
        stage(run_dir)
    assert read_json(run_dir / "paper" / "manifest.json")["status"] == "failed"


def test_an_unfinished_stage_makes_no_paper(tmp_path):
    run_dir = make_run(tmp_path / "smoke")
    write_json(run_dir / "train" / "grpo" / "seed0" / "manifest.json", manifest("train", status="running"))
    with pytest.raises(ValueError, match=r"train/grpo/seed0 \(running\)"):
        stage(run_dir)


def test_an_arm_that_was_not_evaluated_makes_no_paper(tmp_path):
    run_dir = make_run(tmp_path / "smoke")
    path = run_dir / "evaluation" / "metrics.csv"
    write_csv(path, pd.read_csv(path).query("arm != 'grpo'"))
    with pytest.raises(ValueError, match="lacks grpo seed 0"):
        stage(run_dir)


def test_an_undefined_macro_is_an_error_in_every_engine(smoke, tmp_path):
    folder = tmp_path / "paper"
    shutil.copytree(smoke / "paper", folder)
    (folder / "main.tex").write_text((folder / "main.tex").read_text().replace(r"\RunName", r"\RunNome"))
    for engine in ("auto", "typst", "latexmk"):
        with pytest.raises(ValueError, match=r"quotes \\RunNome"):
            build_pdf(folder, engine)


def test_without_tex_it_says_how_to_get_it(smoke, tmp_path, monkeypatch):
    folder = tmp_path / "paper"
    shutil.copytree(smoke / "paper", folder)
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing is installed there
    built = build_pdf(folder, "auto")
    assert built["engine"] == "typst" and HOW_TO_GET_LATEX in built["note"]
    with pytest.raises(RuntimeError, match="apt-get install"):
        build_pdf(folder, "latexmk")


@pytest.mark.skipif(latex_obstacle(SOURCE.read_text()) is not None, reason="TeX is not installed on this machine")
class TestLatex:
    def test_it_is_set_by_latex(self, smoke, tmp_path):
        run_dir = make_run(tmp_path / "it's 100% $x_1$ & #1")
        built = stage(run_dir, engine="auto")
        assert built["engine"] == "latexmk"
        assert (run_dir / "paper" / "main.pdf").read_bytes().startswith(b"%PDF")
        assert not list((run_dir / "paper").glob("*.aux"))
        first = (run_dir / "paper" / "main.pdf").read_bytes()
        build_pdf(run_dir / "paper", "latexmk")
        assert (run_dir / "paper" / "main.pdf").read_bytes() == first

    def test_an_error_names_the_line_and_leaves_the_log(self, smoke, tmp_path):
        folder = tmp_path / "paper"
        shutil.copytree(smoke / "paper", folder)
        (folder / "main.tex").write_text((folder / "main.tex").read_text().replace(r"\maketitle", r"\maketitel"))
        with pytest.raises(RuntimeError, match=r"(?s)Undefined control sequence.*maketitel"):
            build_pdf(folder, "latexmk")
        assert (folder / "main.log").exists()


def test_pooling_over_seeds_against_the_definition():
    rng = np.random.default_rng(1)
    values = rng.random(5)
    frame = pd.DataFrame({"arm": "a", "seed": range(5), "metric": "m", "value": values, "ci_low": values - 0.1,
                          "ci_high": values + 0.2, "n": 9})
    row = results.pool_seeds(frame).iloc[0]
    half = 2.7764451051977987 * values.std(ddof=1) / np.sqrt(5)  # Student's t, 4 degrees of freedom, from a table
    assert row["value"] == pytest.approx(values.mean())
    assert row["value"] - row["ci_low"] == pytest.approx(np.sqrt(0.1**2 + half**2))
    assert row["ci_high"] - row["value"] == pytest.approx(np.sqrt(0.2**2 + half**2))


def test_numbers_keep_their_sign_and_intervals_their_ends():
    assert [number(value) for value in (0.5, -0.5, -0.0004, 1234.5678, float("nan"), None)] == [
        "0.500", "$-$0.500", "0.000", r"1\,234.568", "--", "--"]
    assert with_interval(0.2, -0.1, 0.35) == "0.20 {[}$-$0.10, 0.35{]}" and with_interval(0.2, None, 0.3) == "0.20"


def test_many_arms_become_rows(tmp_path):
    arms = ["base", "baseline", "grpo", "hybrid", "polychromic", "matched"]
    run_dir = make_run(tmp_path / "wide", arms=arms)
    text = exhibits.results_table(results.load_run(run_dir, arms, [0]), 0.0)
    assert text.splitlines()[0].count("r") >= 10 and "\nmatched &" in text


@pytest.mark.parametrize("source", ["word list", "some_body/toxic-bert"])
def test_a_share_of_insults_says_who_counted_it(tmp_path, source):
    run_dir = make_run(tmp_path / "smoke")
    metrics = pd.read_csv(run_dir / "evaluation" / "metrics.csv")
    write_csv(run_dir / "evaluation" / "metrics.csv", pd.concat([metrics, metrics.query("metric == 'pass@1'").assign(
        metric="safety_insult")]))
    if source != "word list":  # an evaluation from before there were classifiers has no such file
        write_json(run_dir / "evaluation" / "safety.json", {
            "sources": SAFETY_SOURCES | {"safety_insult": source, "guard_toxic": f"word list or {source}"}})
    stage(run_dir)
    table, macros = (run_dir / "paper" / "tables" / "results.tex").read_text(), read_macros(run_dir)
    assert escape_latex(f"Insults, share ({source})") in table
    assert escape_latex(source) in macros["SafetySources"] and macros["ToxicSource"].endswith(escape_latex(source))
    assert {r"\SafetySources", r"\ToxicSource"} <= set(re.findall(r"\\[A-Z][A-Za-z]+", SOURCE.read_text()))
    run = results.load_run(run_dir, ["baseline", "grpo"], [0])
    rows = run.comparisons.assign(metric="safety_insult", p_holm=np.nan)
    assert f"({escape_latex(source)})" in exhibits.comparisons_table(replace(run, comparisons=rows))


def test_two_numbers_never_share_a_name(tmp_path):
    arms = ["baseline", "a-b", "a_b"]
    run = results.load_run(make_run(tmp_path / "same", arms=arms), arms, [0])
    with pytest.raises(ValueError, match="two numbers would be called PassOneAB"):
        paper.metric_macros(run)


def test_paths_of_the_machine_stay_out(tmp_path):
    run_dir = make_run(tmp_path / "smoke")
    facts = {"seed": 0, "data_path": "/home/somebody/posts.jsonl", "n_conversations": 50,
             "safety_classifier": "/home/somebody/toxic"}
    write_json(run_dir / "data" / "manifest.json", manifest("data", parameters=facts))
    macros = paper.parameter_macros(results.load_run(run_dir, ["baseline", "grpo"], [0]))
    assert macros["ParamDataNConversations"] == "50" and "somebody" not in str(macros)


def test_an_override_of_the_gate_marks_every_table_and_the_text(tmp_path):
    run_dir = make_run(tmp_path / "smoke")
    stage(run_dir)
    tables = sorted((run_dir / "paper" / "tables").glob("*.tex"))
    assert not any("not validated" in path.read_text() for path in tables)
    path = run_dir / "train" / "grpo" / "seed0" / "manifest.json"
    write_json(path, read_json(path) | {"reward_validated": False})
    built = stage(run_dir)
    assert len(tables) == 8 and all(path.read_text().count("Reward not validated") == 1 for path in tables)
    assert "did not pass its validation" in read_macros(run_dir)["RewardStatement"] and built["engine"] == "typst"


def test_a_judge_that_decides_and_did_not_pass_marks_every_table_and_the_text(tmp_path):
    run_dir = make_run(tmp_path / "real", source="other")
    path = run_dir / "reward_model" / "validation.json"
    found = read_json(path)
    found["verdicts"]["judge"] |= {"verdict": "too little to tell", "validated": False, "text": "too little: 31 pairs"}
    write_json(path, found)
    stage(run_dir)
    tables = sorted((run_dir / "paper" / "tables").glob("*.tex"))
    assert all(table.read_text().count("Judge not validated: too little to tell") == 1 for table in tables)
    macros = read_macros(run_dir)
    said = macros["RewardStatement"]
    assert "The judge that decides did not pass" in said and "31 pairs" in said
    assert (macros["VerdictJudge"], macros["VerdictReward"]) == ("too little to tell", "validated")
    write_json(path, {name: value for name, value in found.items() if name != "verdicts"})
    with pytest.raises(ValueError, match="run the stage reward_model again"):
        stage(run_dir)


def test_too_few_posts_and_worse_safety_mark_every_table(tmp_path):
    run_dir = make_run(tmp_path / "pilot")
    write_csv(run_dir / "evaluation" / "cautions.csv", pd.DataFrame(
        [("few posts", "", "4 test posts", "only 4"), ("safety", "a_b", "safety worse: a_b", "worse"),
         ("seeds", "", "one seed", "1 of 3")], columns=["kind", "arm", "short", "text"]))
    stage(run_dir)
    for table in sorted((run_dir / "paper" / "tables").glob("*.tex")):
        text = table.read_text()
        assert text.count(r"\textbf{4 test posts}") == 1 and text.count(r"\textbf{Safety worse: a\_b}") == 1
        assert "One seed" not in text  # said in the text, of every run alike


# ---- sentences that were wrong --------------------------------------------------------------------------------------

def sentence(run, arm: str) -> str:
    """What the paper says of one arm's training, as plain text."""
    said = arms_of.training_sentences(run).replace("{,}", ",").replace("{}", "")
    return re.search(rf"\\texttt\{{{arm}\}} (.*?)(?= \\texttt|$)", said).group(1)


def test_training_is_told_by_what_each_arm_took_and_not_by_the_stages_parameters(tmp_path):
    """polychromic was said to take the baseline's 16 references; it takes one for each of its posts, and samples."""
    arms = ["baseline", "polychromic", "grpo", "hybrid"]
    run = results.load_run(make_run(tmp_path, arms=arms), arms, [0])
    assert "8 steps of 16 references, at a learning rate of 0.001, falling to zero" in sentence(run, "baseline")
    assert "of 4 references and 16 sampled replies (4 to each of 4 posts), at a learning rate of 0.001" in sentence(
        run, "polychromic")
    assert "reward" not in sentence(run, "polychromic").split(";")[0] and "from base)" in sentence(run, "polychromic")
    assert "of 16 sampled replies (4 to each of 4 posts), at a learning rate of 0.0005, constant" in sentence(
        run, "grpo")
    assert "weights 0.3, 0.5, 0.2, from baseline" in sentence(run, "hybrid")
    assert "4 references and 16 sampled" in sentence(run, "hybrid") and "combined reward" in sentence(run, "hybrid")
    assert "its loss fell says: yes (1 of 1)" in sentence(run, "polychromic")


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a tabular by their first cell."""
    lines = [line.rstrip("\\ ").split(" & ") for line in table.splitlines() if " & " in line]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_the_table_of_arms_holds_all_that_differs_and_nothing_else(tmp_path):
    arms = ["baseline", "polychromic", "grpo"]
    run_dir = make_run(tmp_path, arms=arms)
    found = cells(arms_of.arms_table(results.load_run(run_dir, arms, [0])))
    assert found["References a step"] == ["16", "4", "0"] and found["Reward calls"] == ["0", "0", "128"]
    assert found["Learning rate"] == ["0.001", "0.001", "0.0005"]
    assert found["Replies sampled in all"] == ["0", "128", "128"] and "Steps" not in found
    assert not any("lora" in row for row in found)
    path = run_dir / "train" / "grpo" / "seed0" / "manifest.json"
    write_json(path, read_json(path) | trained("grpo", lora_r=8, max_steps=9, model="/home/somebody/x"))
    made = arms_of.arms_table(results.load_run(run_dir, arms, [0]))
    assert cells(made)["Steps"] == ["8", "8", "9"] and cells(made)[r"\texttt{lora\_r}"] == ["16", "16", "8"]
    assert "somebody" not in made


def test_the_table_of_arms_says_what_is_equal_and_what_was_tuned_by_settings_and_file(tmp_path):
    arms = ["baseline", "polychromic", "grpo"]
    run_dir = make_run(tmp_path, arms=arms)
    run = results.load_run(run_dir, arms, [0])
    facts = {arm: arms_of.arm_facts(run, arm) for arm in arms}
    rows = [{"policy": "nano", "arm": arm, "weights": " ".join(f"{weight:g}" for weight in facts[arm]["weights"]),
             **{name: facts[arm][name] for name in ("steps", "schedule", "references", "posts", "k")},
             "learning_rate": factor * facts[arm]["learning_rate"], "chosen": factor == 1}
            for arm in arms for factor in (0.5, 1, 2, 4)]
    file = tmp_path / "tuning.csv"
    write_csv(file, pd.DataFrame(rows))
    said = arms_of.fairness_sentence(run, file)
    assert "in those that have any): samples." in said and "(4 learning rates an arm" in said
    assert "equal budget" in said.split("learning rate.")[0] and said.endswith("tuned so: schedule, references.")
    write_csv(file, pd.DataFrame(rows[:-1]))  # one arm had a try less
    said = arms_of.fairness_sentence(run, file)
    assert "Tuned for each arm" not in said and "tuned so: learning rate (tuned for " in said
    write_csv(file, pd.DataFrame(rows).assign(policy="smollm2-135m"))  # tries of another base model
    assert "tuned so: learning rate, schedule, references." in arms_of.fairness_sentence(run, file)
    path = run_dir / "train" / "grpo" / "seed0" / "manifest.json"
    write_json(path, read_json(path) | trained("grpo", num_generations=8))
    assert "samples" in arms_of.fairness_sentence(results.load_run(run_dir, arms, [0]), file).split("tuned so:")[1]
    assert macros_of(run_dir, arms)["FairnessSentence"] == arms_of.fairness_sentence(
        results.load_run(run_dir, arms, [0]))


def test_a_run_of_a_version_that_did_not_note_the_objective_is_named(tmp_path):
    run_dir = make_run(tmp_path)
    path = run_dir / "train" / "grpo" / "seed0" / "manifest.json"
    write_json(path, {name: value for name, value in read_json(path).items() if name != "objective"})
    with pytest.raises(ValueError, match=r"train/grpo/seed0/manifest.json .* train the arm again"):
        stage(run_dir)


def macros_of(run_dir: Path, arms=("baseline", "grpo"), usd_per_hour: float = 2.0) -> dict[str, str]:
    """What the paper could quote, without making it."""
    run = results.load_run(run_dir, arms, [0])
    return paper.run_macros(run, title="x", preset="x", usd_per_hour=usd_per_hour)


def test_a_number_on_part_of_the_posts_says_on_how_many(tmp_path):
    run_dir = make_run(tmp_path / "smoke")
    path = run_dir / "evaluation" / "metrics.csv"
    metrics = pd.read_csv(path)
    few = (metrics["metric"] == "pass@10") & (metrics["arm"] == "grpo")
    real = metrics[metrics["arm"] == "baseline"].assign(arm="real")
    real.loc[real["metric"] == "pass@10", ["value", "n"]] = [1.0, 3]
    write_csv(path, pd.concat([metrics.assign(n=metrics["n"].where(~few, 12)), real]))
    run, macros = results.load_run(run_dir, ["baseline", "grpo"], [0]), macros_of(run_dir)
    row = next(line for line in exhibits.results_table(run, 2.0).splitlines() if line.startswith("Pass@10"))
    assert row.count("$n$") == 1 and "($n$ = 12)" in row.split("&")[-1]
    assert "1.00 ($n$ = 3)" in exhibits.rivals_table(run)
    assert macros["ResultSentences"].count("($n$ = 12)") == 1 and "$n$ = 16" not in macros["ResultSentences"]
    assert (macros["PassTenGrpoPosts"], macros["PassTenBaselinePosts"]) == ("12", "16")


def test_without_a_price_no_cost_is_stated(tmp_path):
    run_dir = make_run(tmp_path / "smoke")
    macros = macros_of(run_dir, usd_per_hour=0.0)
    assert {macros[name] for name in ("TotalCost", "UsdPerHour", "TrainCostGrpo")} == {exhibits.NO_PRICE}
    table = exhibits.results_table(results.load_run(run_dir, ["baseline", "grpo"], [0]), 0.0)
    assert cells(table)["Training cost (USD)"] == ["--", exhibits.NO_PRICE, exhibits.NO_PRICE] and "36.0" in table
    priced = macros_of(run_dir)  # five stages of 12.5 s and two trainings of 36 s at 2 dollars an hour
    assert (priced["TotalCost"], priced["UsdPerHour"]) == ("0.07 US dollars", "2.00 US dollars")


def test_sentences_follow_the_run(tmp_path):
    simulated, real = make_run(tmp_path / "a"), make_run(tmp_path / "b", source="file")
    write_json(real / "reward_model" / "manifest.json", manifest("reward_model", parameters={
        "shared_features": True, "members": 5, "hidden_size": 0, "control": "residual", "validate_on": "test"}))
    for run_dir, limit, shares in ((simulated, "are simulated", "not recorded"), (real, "one file", "shares features")):
        macros = macros_of(run_dir)
        assert limit in macros["DataLimit"] and shares in macros["JudgeShares"]
    assert macros["RewardHeads"] == "an ensemble of 5 linear models" and macros["ValidatedOn"] == "test"
    assert r"\texttt{residual}" in macros["Confounds"]
    # What an arm does is the run's to say, and whose figures are published is not to be made up.
    assert not re.search(r"published (share|margin|quantile)|\\texttt\{(grpo|hybrid|polychromic)\}", SOURCE.read_text())
