"""How often does the whole pipeline claim something when there is nothing to claim?

Pseudo-runs, `nano` and small (baseline 20 steps, grpo 10, two seeds, 24 validation and 24 test posts, 16 replies each):

- `A/A baseline`, `A/A grpo`: both arms are one setting with other training seeds. Every claim is false.
- `shuffled likes`: likes and retweets change places within each post before anything reads them; reward, judge,
  references and both arms are made from that table, and the judge that learned from it decides.
- `noise reward`: grpo is paid by a hash of the text, another one in each run, and starts from the baseline's adapters.

Data, adapters and evaluation are the pipeline's own functions. The adapters of the A/A kinds are a pool that is trained
once: runs take disjoint sets of four until the pool is used up, then it is dealt again in another order; each run has
posts of its own draw. Runs of `shuffled likes` share the texts, and nothing that was learned.

    python proofs/false_alarms.py OUT.csv [--runs 24]   # half an hour on two cores; goes on where it was cut off

OUT.csv gets a row for each run and claim as the runs end, OUT_table.csv at the end the share of runs with each claim,
its exact interval and what was promised.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from hashlib import sha256
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.stats import beta

from grpo_engage.base.core import REPO_ROOT, child_seed, read_json, say, write_csv, write_parquet
from grpo_engage.data.pairs import data_stage, load_pairs
from grpo_engage.evaluation import evaluation
from grpo_engage.evaluation.settings import EvaluationSettings
from grpo_engage.policy.base_models import quiet_libraries
from grpo_engage.policy.replies import instruction_of, loading_options, policy_stage, read_policy
from grpo_engage.rewards import reward_model
from grpo_engage.rewards.heuristic import heuristic_reward_stage
from grpo_engage.rewards.training_reward import training_reward
from grpo_engage.train.arm_training import train_arm
from grpo_engage.train.hybrid import training_examples
from grpo_engage.train.settings import TrainSettings

KINDS = ("A/A baseline", "A/A grpo", "shuffled likes", "noise reward")
SEEDS = (0, 1)
STEPS = {"baseline": 20, "grpo": 10}
TRAINING = dict(max_new_tokens=20, posts_per_step=4, num_generations=8, gradient_accumulation=0, watch_every=0,
                report_to="none", save_steps=1000, allow_unvalidated_reward=True, reward="learned")
EVALUATION = dict(arms=["baseline", "again"], seeds=list(SEEDS), include_base=False, n_test_posts=24,
                  n_validation_posts=24, n_samples=16, max_new_tokens=20, batch_size=384, embeddings=False, n_boot=500)
CONVERSATIONS, SHUFFLED_CONVERSATIONS = 1200, 500
FRACTIONS = [0.3, 0.25, 0.13, 0.16, 0.16]
COLUMNS = ["kind", "run", "claim", "claimed", "promised"]

# ---- what counts as a claim ------------------------------------------------------------------------------------------


def _decided(decision: pd.DataFrame, said: str, statuses: tuple[str, ...]) -> bool:
    """Whether a criterion whose text holds `said` has one of `statuses`. Raises: ValueError without such a criterion:
    a table that says nothing of the kind must not be counted as silent."""
    rows = decision[decision["criterion"].str.contains(said, regex=True)]
    if rows.empty:
        raise ValueError(f"decision.csv has no criterion like {said!r} (it has {sorted(set(decision['criterion']))}): "
                         "mend proofs/false_alarms.py, which counts it")
    return bool(rows["status"].isin(statuses).any())


def claims_of(tables: dict[str, pd.DataFrame]) -> dict[str, bool]:
    """Claim -> whether this run makes it, from its decision.csv, comparisons.csv, robustness.csv and, where there is
    one, primary.csv (keys: their names without ending), for the arm `again`.

    A family (the headline metrics of comparisons.csv, the rows of primary.csv) claims something when any adjusted
    p-value is below 0.05. Raises: ValueError where a table holds nothing to count.
    """
    decision, comparisons, robustness = (tables[name].query("arm == 'again'")
                                         for name in ("decision", "comparisons", "robustness"))
    family = comparisons["p_holm"].dropna()
    if family.empty or robustness.empty:
        raise ValueError(f"comparisons.csv has {len(family)} adjusted p-values and robustness.csv {len(robustness)} "
                         "rows for the arm again: there is nothing to count")
    claims = {"decision.csv: pass@10 above the baseline": _decided(decision, r"pass@10 above the baseline", ("met",)),
              "decision.csv: pass@10 above or below the baseline": _decided(
                  decision, r"pass@10 above the baseline", ("met", "not met")),
              "decision.csv: a metric below the baseline's": _decided(
                  decision, r"below the baseline", ("not met",)),
              "comparisons.csv: any headline metric, p_holm < 0.05": bool((family < 0.05).any())}
    if "primary" in tables:
        primary = tables["primary"].query("arm == 'again'")
        if primary.empty or primary["p_holm"].isna().all():
            raise ValueError("primary.csv has no p_holm for the arm again: there is nothing to count")
        claims["primary.csv: any arm, p_holm < 0.05"] = bool((primary["p_holm"] < 0.05).any())
    apart = robustness["conclusion"] != "not told apart"
    for (view, metric), rows in apart.groupby([robustness["view"], robustness["metric"]], sort=True):
        claims[f"robustness.csv: {metric} by {view}"] = bool(rows.any())
    return claims | {"robustness.csv: any row": bool(apart.any())}


def promised(kind: str, claim: str) -> float:
    """The share of runs that may make `claim` at most, NaN where nothing is promised.

    0.05 for a family or a single 95% interval, half of it for one direction. Only in the A/A kinds is every difference
    false: what is trained on noise may truly be worse, and a reward that was learned from noise may truly lead
    somewhere; of those runs "above the baseline" and the gate's "validated" alone are held against a promise. A whole
    table of single intervals promises nothing together.
    """
    if claim.startswith("gate"):
        return 0.025 if kind == "shuffled likes" else float("nan")
    if claim.endswith(("pass@10 above the baseline", "a metric below the baseline's")):
        one_sided = 0.025 if "above" in claim else 0.05
        return one_sided if kind.startswith("A/A") or "above" in claim else float("nan")
    return 0.05 if kind.startswith("A/A") and claim != "robustness.csv: any row" else float("nan")


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """OUT_table.csv: columns kind, claim, runs, claimed, share, low, high (Clopper and Pearson's exact 95% interval),
    promised, and found: "too many" where the interval lies above what was promised, else "".

    rows: OUT.csv. Runs of the A/A kinds that share adapters are counted as if they did not.
    """
    order = {kind: place for place, kind in enumerate(KINDS)}
    table = rows.groupby(["kind", "claim"], sort=False).agg(
        runs=("run", "nunique"), claimed=("claimed", "sum"), promised=("promised", "first")).reset_index()
    table = table.sort_values("kind", key=lambda kinds: kinds.map(order), kind="stable", ignore_index=True)
    n, c = table["runs"].to_numpy(), table["claimed"].to_numpy()
    table["share"] = c / n
    table["low"] = np.where(c == 0, 0.0, beta.ppf(0.025, np.maximum(c, 1), n - c + 1))
    table["high"] = np.where(c == n, 1.0, beta.ppf(0.975, c + 1, np.maximum(n - c, 1)))
    table["found"] = np.where(table["low"] > table["promised"], "too many", "")
    return table[["kind", "claim", "runs", "claimed", "share", "low", "high", "promised", "found"]]


# ---- the parts of a run ----------------------------------------------------------------------------------------------


def shuffled_within_posts(pairs: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`pairs` with likes and retweets of each conversation's replies in another order, a reply's two together."""
    random, moved = np.random.default_rng(seed), np.arange(len(pairs))
    for rows in pairs.reset_index(drop=True).groupby("conversation_id", sort=True).indices.values():
        moved[rows] = random.permutation(rows)
    outcome = [name for name in ("reply_likes", "reply_retweets") if name in pairs]
    return pairs.assign(**{name: pairs[name].to_numpy()[moved] for name in outcome})


def make_data(folder: Path, n_conversations: int) -> None:
    """The stages data, heuristic_reward and policy in `folder`, which is kept when it is complete."""
    if (folder / "policy" / "policy.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    data_stage(folder, n_conversations=n_conversations, fractions=FRACTIONS)
    heuristic_reward_stage(folder)
    policy_stage(folder, sample_posts=1, samples_per_post=1)  # last: where it is, the folder is complete


def make_models(folder: Path, seed: int) -> None:
    """The stage reward_model in `folder`, which is kept when it is complete."""
    if (folder / "reward_model" / "misjudged.csv").exists():  # written last
        return
    shutil.rmtree(folder / "reward_model", ignore_errors=True)
    # the exploits are half of this stage's time, and no claim
    with patch.object(reward_model, "unseen_exploit_table", lambda *_, **__: pd.DataFrame({"left_out": []})):
        reward_model.reward_model_stage(folder, seed=seed, judge_backbone="states", members=1)


def train(world: Path, out: Path, arm: str, seed: int, start: Path | None = None, reward: Callable | None = None,
          reward_id: str = "") -> None:
    """`arm` with training seed `seed` into `out`/adapter by what stage train calls; kept when it is there."""
    if (out / "adapter").exists():
        return
    settings = TrainSettings.make(arm=arm, seed=seed, max_steps=STEPS[arm], **TRAINING)
    objective, facts = settings.objective(), read_json(world / "policy" / "policy.json")
    if objective.beta and reward is None:
        reward, reward_id, _ = training_reward(world, settings.reward)
    train_arm(read_policy(world), training_examples(world, load_pairs(world), objective, "same"), out, settings,
              objective=objective, reward=reward, reward_id=reward_id, warm_start=start,
              seed=child_seed(seed, "train", arm), loading=loading_options(facts), instruction=instruction_of(facts),
              base_name=facts["name"], label=arm)


def noise(run: int) -> Callable:
    """A reward (posts, replies) -> (n,) in [0, 1) that is a hash of the two texts and the number `run`."""
    def reward(posts, replies):
        return np.array([int.from_bytes(sha256(f"{run}\n{post}\n{reply}".encode("utf-8", "surrogatepass")).digest()[:6])
                         / 2**48 for post, reply in zip(posts, replies, strict=True)])
    return reward


def evaluate(world: Path, folder: Path, adapters: dict[str, list[Path]], run: int, judge: str,
             temperatures: Sequence[float] = ()) -> dict[str, bool]:
    """`claims_of` the stage evaluation in `folder` (removed afterwards), on posts that number `run` draws.

    adapters: arm -> folders with an adapter, one for each of SEEDS. temperatures: beside 1, of which each arm then gets
    the one that is best on validation.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("data", "heuristic_reward", "reward_model", "policy"):
        (folder / name).symlink_to((world / name).resolve())
    for arm, places in adapters.items():
        for seed, place in zip(SEEDS, places, strict=True):
            shutil.copytree(place / "adapter", folder / "train" / arm / f"seed{seed}" / "adapter")
    settings = EvaluationSettings.make(**EVALUATION, judge=judge, seed=run, temperatures=list(temperatures))
    with patch.object(evaluation, "draw_figures", lambda *_, **__: []):  # half of the time, and no claim
        evaluation.evaluation_stage(folder, settings)
    tables = {name: pd.read_csv(path) for name in ("decision", "comparisons", "robustness", "primary")
              if (path := folder / "evaluation" / f"{name}.csv").exists()}
    shutil.rmtree(folder)
    return claims_of(tables)


def dealt(run: int, pool: int) -> list[int]:
    """Four adapters of a pool of `pool` for run number `run`: disjoint within each deal, every deal in a new order."""
    deal, place = divmod(run, pool // 4)
    return np.random.default_rng(child_seed(0, "deal", str(deal))).permutation(pool)[4 * place:4 * place + 4].tolist()


def pool_folder(work: Path, arm: str, seed: int) -> Path:
    """Where the pool keeps an adapter."""
    return work / "pool" / arm / f"seed{seed}"


def pseudo_run(work: Path, kind: str, run: int, pool: int, temperatures: Sequence[float] = ()) -> pd.DataFrame:
    """Rows of OUT.csv (COLUMNS) of one run of `kind`; its folder is removed when it ends."""
    world, folder, claims = work / "world", work / f"{kind.replace('/', '').replace(' ', '_')}-{run}", {}
    taken, judge = dealt(run, pool), "model" if kind == "shuffled likes" else "auto"
    if kind.startswith("A/A"):
        places = [pool_folder(work, kind.removeprefix("A/A "), seed) for seed in taken]
        adapters = {"baseline": places[:2], "again": places[2:]}
    elif kind == "noise reward":
        starts, paid = [pool_folder(work, "baseline", seed) for seed in taken[:2]], [folder / f"{s}" for s in SEEDS]
        for seed, start, out in zip(taken, starts, paid, strict=False):
            train(world, out, "grpo", seed, start / "adapter", noise(run), f"noise {run}")
        adapters = {"baseline": starts, "again": paid}
    else:
        world = folder / "world"
        for name in ("data", "heuristic_reward", "policy"):
            shutil.copytree(work / "plain" / name, world / name, dirs_exist_ok=True)
        write_parquet(world / "data" / "pairs.parquet", shuffled_within_posts(load_pairs(work / "plain"), run))
        make_models(world, run)
        verdicts = read_json(world / "reward_model" / "validation.json")["verdicts"]
        claims |= {f"gate: {name} validated": verdicts[name]["verdict"] == "validated" for name in ("reward", "judge")}
        starts, paid = ([folder / arm / str(seed) for seed in SEEDS] for arm in STEPS)
        for seed, start, out in zip(SEEDS, starts, paid, strict=True):
            train(world, start, "baseline", seed)
            train(world, out, "grpo", seed, start / "adapter")
        adapters = {"baseline": starts, "again": paid}
    claims |= evaluate(world, folder / "run", adapters, run, judge, temperatures)
    shutil.rmtree(folder)
    return pd.DataFrame([[kind, run, claim, int(made), promised(kind, claim)] for claim, made in claims.items()],
                        columns=COLUMNS)


# ---- all of them -----------------------------------------------------------------------------------------------------


def quietly(function: Callable, *arguments: object) -> object:
    """`function(*arguments)` without its progress lines: those of dozens of small runs hide one's own."""
    quiet_libraries()
    with redirect_stdout(StringIO()):
        return function(*arguments)


def in_parallel(jobs: int, calls: list[tuple], label: str) -> list:
    """Results of `calls` (function, arguments ...), as they end, with a progress line for each."""
    results = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(quietly)(*call) for call in calls)
    for number, result in enumerate(results, start=1):
        say(f"{label}: {number} of {len(calls)}")
        yield result


def finished(out: Path) -> pd.DataFrame:
    """The rows that OUT.csv holds already."""
    return pd.read_csv(out) if out.exists() else pd.DataFrame(columns=COLUMNS)


def run_all(out: Path, work: Path, n_runs: int, kinds: Sequence[str], jobs: int, pool: int,
            temperatures: Sequence[float] = ()) -> pd.DataFrame:
    """Make what is missing of OUT.csv, then write and return the table beside it."""
    rows = finished(out)
    done = set(rows[["kind", "run"]].itertuples(index=False, name=None))
    wanted = [(kind, run) for run in range(n_runs) for kind in kinds if (kind, run) not in done]
    used = sorted({seed for kind, run in wanted if kind != "shuffled likes" for seed in dealt(run, pool)})
    if used:
        list(in_parallel(1, [(make_data, work / "world", CONVERSATIONS)], "data"))
        list(in_parallel(1, [(make_models, work / "world", 0)], "reward and judge"))
        for arm in STEPS if any(kind == "A/A grpo" for kind, _ in wanted) else ("baseline",):
            calls = [(train, work / "world", pool_folder(work, arm, seed), arm, seed,
                      pool_folder(work, "baseline", seed) / "adapter" if arm == "grpo" else None) for seed in used
                     if not (pool_folder(work, arm, seed) / "adapter").exists()]
            list(in_parallel(jobs, calls, f"pool of {arm}"))
    if any(kind == "shuffled likes" for kind, _ in wanted):
        list(in_parallel(1, [(make_data, work / "plain", SHUFFLED_CONVERSATIONS)], "data to shuffle"))
    for made in in_parallel(jobs, [(pseudo_run, work, kind, run, pool, temperatures) for kind, run in wanted], "runs"):
        rows = pd.concat([rows, made], ignore_index=True) if len(rows) else made
        write_csv(out, rows.sort_values(["kind", "run"], kind="stable"))
    if rows.empty:
        raise ValueError(f"--runs {n_runs}: no run was made, so there is nothing to count")
    table = summarise(rows)
    write_csv(out.with_name(f"{out.stem}_table.csv"), table)
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="OUT.csv; its finished runs are kept")
    parser.add_argument("--runs", type=int, default=24, help="runs of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--temperatures", nargs="*", type=float, default=[],
                        help="beside 1, for every arm: each doubles the replies (another OUT for another list)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--pool", type=int, default=48, help="adapters of each arm of the A/A kinds, four a run")
    parser.add_argument("--work", type=Path, default=REPO_ROOT / "outputs" / "false_alarms",
                        help="folder for data and adapters; delete it together with OUT.csv")
    args = parser.parse_args()
    if args.runs < 1 or args.pool < 4:
        parser.error(f"--runs {args.runs} must be at least 1 and --pool {args.pool} at least 4")
    table = run_all(args.out, args.work, args.runs, args.kinds, args.jobs, args.pool, args.temperatures)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
