"""Does training do what it claims? Settings of the objective, paired by post and seed (simulator, `nano`).

    python benchmarks/learning.py RUN OUT [--seeds 0,1,...,7] [--settings a,b] [--simplex] [--report]

RUN is a run (stages data to policy) on simulated data, whose reward trains the arms; its split `policy` holds the
training posts. Every setting is sampled on `--posts` validation posts at the end of its steps (what starts from the
baseline also halfway), and on as many test posts at the end. Interrupted, it goes on where it was; several may
share the seeds. With --report nothing is trained: by_post.parquet, comparisons.csv, means.csv, pass_rule.csv and the
figures are made from what is there.

A reply passes by a run's rule: it beats at least the share tau of the real replies to its post (notebook
evaluation/12_pass_rule). One height of gold for all posts stands beside it, "pass@10 absolute".
"""

import argparse
from pathlib import Path

import pandas as pd

from grpo_engage.base.core import read_json, say, write_csv, write_parquet
from grpo_engage.base.plots import savefig
from grpo_engage.data.pairs import load_pairs
from grpo_engage.data.truth import gold_of
from grpo_engage.evaluation.evaluation import choose_posts, posts_with_replies
from grpo_engage.evaluation.pass_rule import pass_rule_table
from grpo_engage.evaluation.scoring import allowed
from grpo_engage.policy.replies import read_policy
from grpo_engage.rewards.training_reward import training_reward
from grpo_engage.stats.intervals import holm
from grpo_engage.studies.learning_study import (
    SETTINGS,
    Setting,
    at_distance,
    compare_settings,
    plot_against_kl,
    plot_simplex,
    simplex_settings,
    study_by_post,
    study_marks,
    study_setting,
)
from grpo_engage.train.objective import Objective

METRICS = ("pass@1", "pass@10", "pass@1 absolute", "pass@10 absolute", "gold", "reward", "self_bleu", "distinct_2",
           "ead", "rouge_l", "nll", "kl", "length")
SPLITS = ("validation", "test")
PAIRS = [(f"polychromic_{name}", other) for name in ("self_bleu", "distinct_n", "cosine", "vendi")
         for other in ("supervised_8", "baseline")]
PAIRS += [("constant_d", "supervised_8"), ("grpo", "baseline"), ("grpo", "baseline_long"),
          ("grpo_diverse", "grpo"), ("hybrid", "grpo"), ("hybrid", "baseline"), ("max_at_10", "grpo_16"),
          ("max_at_10_diverse", "grpo_16"), ("max_at_10_diverse", "max_at_10"), ("baseline_long", "baseline")]
AT_DISTANCE = [("grpo_diverse", "grpo"), ("hybrid", "grpo"), ("max_at_10", "grpo_16"), ("max_at_10", "grpo"),
               ("max_at_10_diverse", "grpo_16"), ("max_at_10_diverse", "grpo")]


def held_out(run: Path, n_posts: int) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Split -> (posts, references): posts that have a reference, and those references."""
    pairs, labels = load_pairs(run), pd.read_parquet(run / "reward_model" / "labels.parquet")
    good = pairs[pairs["row"].isin(labels.loc[labels["reference"], "row"])].rename(columns={"conversation_id": "post"})
    found = {}
    for split in SPLITS:
        posts = posts_with_replies(pairs, split)
        posts = choose_posts(posts[posts["post"].isin(good["post"])].reset_index(drop=True), n_posts, 0)
        found[split] = posts, good[good["post"].isin(posts["post"])][["post", "tweet", "reply"]]
    return found


def gather(out: Path, settings: dict[str, Setting]) -> pd.DataFrame:
    """Every sample: columns setting, seed, split, step and those of `sample_setting`, then nll of its post."""
    found = []
    for name in settings:
        for path in sorted(out.glob(f"{name}/seed*/*-*.parquet")):
            if path.name.startswith("nll-"):
                continue
            split, step = path.stem.rsplit("-", 1)
            part = pd.read_parquet(path).merge(pd.read_parquet(path.with_name(f"nll-{path.name}")), on="post")
            found.append(part.assign(setting=name, seed=int(path.parent.name.removeprefix("seed")), split=split,
                                     step=int(step)))
    return pd.concat(found, ignore_index=True)


def simplex_aim(compared: pd.DataFrame, mixtures: list[str], corners: list[str]) -> pd.DataFrame:
    """Is a mixture's Pass@10 above that of every single term, each at the largest KL that both reach?

    One row a mixture: the smallest difference, and the largest one-sided p-value over the single terms (all must hold,
    so the largest counts), then Holm's over the mixtures.
    """
    own = compared[compared["at"].str.startswith("KL") & (compared["metric"] == "pass@10")
                   & compared["setting"].isin(mixtures) & compared["versus"].isin(corners)].copy()
    half = own["p_value"] / 2
    own["above"] = half.where(own["difference"] > 0, 1 - half)
    table = own.groupby("setting").agg(smallest_difference=("difference", "min"), p_above_all=("above", "max"),
                                       single_terms=("versus", "size")).reset_index()
    return table.assign(p_holm=holm(table["p_above_all"]))


def report(out: Path, settings: dict[str, Setting], vocabulary: int) -> None:
    samples = gather(out, settings)
    last = {name: setting.options["max_steps"] for name, setting in settings.items()}
    ended = samples[samples["step"] == samples["setting"].map(last)]
    marks = study_marks(ended)
    say("pass marks: " + ", ".join(f"{rule} {tau:.3f} on {column}" for rule, (column, tau) in marks.items()))
    judged = ended[ended["split"] == "validation"].assign(arm=ended["setting"]).reset_index(drop=True)
    write_csv(out / "pass_rule.csv", pass_rule_table(judged, sorted(judged["arm"].unique()), marks, allowed(judged)))
    keys = ["setting", "seed", "split", "step"]
    by_post = pd.concat([study_by_post(part, marks, vocabulary).assign(**dict(zip(keys, key, strict=True)))
                         .merge(part[["post", "nll"]].drop_duplicates(), on="post")
                         for key, part in samples.groupby(keys, sort=True)], ignore_index=True)
    write_parquet(out / "by_post.parquet", by_post)
    by_post["last"] = by_post["step"] == by_post["setting"].map(last)
    means = by_post.groupby(["split", "setting", "step"])[list(METRICS)].mean().reset_index()
    seeds = by_post.groupby(["split", "setting", "step"])["seed"].nunique().rename("n_seeds").reset_index()
    write_csv(out / "means.csv", means.merge(seeds))
    rows = []
    for split in SPLITS:
        final = by_post[by_post["last"] & (by_post["split"] == split)]
        rows += [{"split": split, "at": "last step"} | compare_settings(final, first, second, metric)
                 for first, second in PAIRS if {first, second} <= set(final["setting"]) for metric in METRICS]
    # every policy setting starts at the baseline's last step, which is distance 0 for it
    path = by_post[by_post["split"] == "validation"]
    start = path[(path["setting"] == "baseline") & path["last"]].assign(kl=0.0, step=0)
    moved = pd.concat([path[path["setting"].map(lambda name: settings[name].start == "baseline")]]
                      + [start.assign(setting=name) for name in settings if settings[name].start == "baseline"])
    whole = moved.groupby(["setting", "seed"])["last"].transform("any") & (
        moved.groupby(["setting", "seed"])["step"].transform("nunique") > 1)
    moved = moved[whole]  # a seed that is still being trained has its start alone
    reached = moved.groupby(["setting", "seed", "step"])["kl"].mean().groupby(["setting", "seed"]).max()
    corners = [name for name in settings if name.startswith("mix_") and name.count("0") == 2]
    mixtures = [name for name in settings if name.startswith("mix_") and name not in corners]
    for first, second in [*AT_DISTANCE, *((mixture, corner) for mixture in mixtures for corner in corners)]:
        if not {first, second} <= set(reached.index.get_level_values(0)):
            continue
        # the largest distance that every seed of both has reached
        distance = float(min(reached[first].min(), reached[second].min()))
        pair = moved[moved["setting"].isin([first, second])]
        rows += [{"split": "validation", "at": f"KL {distance:.2f}"}
                 | compare_settings(at_distance(pair, distance, metric), first, second, metric)
                 for metric in METRICS if metric != "kl"]
    compared = pd.DataFrame(rows)
    write_csv(out / "comparisons.csv", compared)
    if mixtures:
        write_csv(out / "simplex_aim.csv", simplex_aim(compared, mixtures, corners))
    curves = moved.groupby(["setting", "step"])[list(METRICS)].mean().reset_index()
    ternary = curves[curves["setting"].str.startswith("mix_") & (curves["step"] > 0)]
    savefig(plot_against_kl(curves[~curves["setting"].str.startswith("mix_")]), out / "figures" / "against_kl")
    if len(ternary):
        final = ternary.sort_values("step").groupby("setting").last().reset_index()
        weights = pd.DataFrame([vars(settings[name].objective) for name in final["setting"]])
        write_csv(out / "simplex.csv", pd.concat([weights, final], axis=1))
        savefig(plot_simplex(pd.concat([weights, final], axis=1), "pass@10"), out / "figures" / "simplex")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--simplex", action="store_true", help="also the ten mixtures of alpha, beta and lam in thirds")
    parser.add_argument("--lam", type=float, default=0, help="instead of each setting's own, where there is one")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate of objectives without the reward")
    parser.add_argument("--policy-rate", type=float, default=1e-3, help="learning rate of objectives with the reward")
    parser.add_argument("--posts", type=int, default=40)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    settings = {name: SETTINGS[name] for name in given.settings.split(",")}
    if given.lam:
        settings = {name: Setting(Objective(s.objective.alpha, s.objective.beta, given.lam), s.start, s.options)
                    if s.objective.lam else s for name, s in settings.items()}
    settings |= simplex_settings() if given.simplex else {}
    if not given.report:
        pairs, base = load_pairs(given.run), read_policy(given.run)
        labels = pd.read_parquet(given.run / "reward_model" / "labels.parquet")
        examples = pairs[(pairs["split"] == "policy") & pairs["row"].isin(labels.loc[labels["reference"], "row"])]
        reward, identifier, validated = training_reward(given.run)
        say(f"{len(examples)} references; reward {identifier.split()[0]}, validated: {validated}")
        held = held_out(given.run, given.posts)
        for seed in (int(part) for part in given.seeds.split(",")):
            for name, setting in settings.items():
                study_setting(name, setting, seed, given.out, base, examples[["tweet", "reply"]].sort_index(), held,
                              reward, identifier, gold_of(pairs), learning_rates=(given.rate, given.policy_rate))
    if given.report:
        vocabulary = len({word for text in load_pairs(given.run)["reply"] for word in text.lower().split()})
        report(given.out, settings, vocabulary)
        print(pd.read_csv(given.out / "comparisons.csv").round(4).to_string(index=False))
        print(f"reward: {read_json(given.run / 'reward_model' / 'validation.json')['verdict']['text']}")


if __name__ == "__main__":
    main()
