"""What only a GPU can show, in ten minutes: does each path run there, does it compute what the CPU computes, how fast.

    make gpu-check                               # -> outputs/gpu-check/: checks.csv, speed.csv, table.md
    python benchmarks/gpu_check.py OUT [--minutes 10] [--only bfloat16 resume] [--model FOLDER]
    python benchmarks/gpu_check.py OUT --tiny    # the same code where there is no GPU: proves nothing else

Two models: `nano` (pretrained here in about a minute if it is missing), whose likelihoods mean something, and one of
random weights in the shape of Qwen3-0.6B, made from a configuration, for time and memory; --model takes a real one in
its place. Nothing is fetched. result: ok, failed (with the error; the exit code is 1 then) or not run (with the reason:
no package, no GPU, time is over). `table.md` is what the README's "what was run" quotes, with the machine.
"""

import argparse
import gc
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import speed
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback

from grpo_engage.base.core import device_and_dtype, say, write_csv
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.policy.base_models import ensure_policy, quiet_libraries
from grpo_engage.policy.sampling import format_prompt, generate_replies, load_policy, load_tokenizer, reply_nll
from grpo_engage.policy.shared_prefix import largest_difference
from grpo_engage.train.arm_training import train_arm
from grpo_engage.train.objective import Objective
from grpo_engage.train.settings import TrainSettings

LIKE_QWEN3 = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                  num_key_value_heads=8, head_dim=128)  # of Qwen3-0.6B, but for its vocabulary
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16)
SIZES = ["2x8x32", "16x8x48"]  # posts x replies x new tokens; the second is a step of the preset gpu
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")


class NotRun(Exception):
    """Why a check cannot be done here."""


@dataclass
class Bench:
    """What the checks share. model: a real one's folder in place of random weights; rounds: of the ratio table."""

    folder: Path
    tiny: bool = False
    model: str = ""
    rounds: int = 5
    timings: list = field(default_factory=list)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        return simulate_pairs(40 if self.tiny else 200, seed=5)[["tweet", "reply"]].reset_index(drop=True)

    @cached_property
    def nano(self) -> str:
        return str(ensure_policy("nano"))

    @cached_property
    def large(self) -> str:
        """The folder of the model whose steps are timed."""
        if self.model:
            return self.model
        tokenizer, folder = load_tokenizer(self.nano), self.folder / "model"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(Qwen3Config(
            vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **(TINY if self.tiny else LIKE_QWEN3))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def nll(self, **loading) -> float:
        """Nats a token of the first replies under nano."""
        few = self.pairs.head(64)
        table = reply_nll(*load_policy(self.nano, **loading), few["tweet"].tolist(), few["reply"].tolist())
        return float(table["nll"].sum() / table["n_tokens"].sum())

    def train(self, name: str, objective: Objective, loading: dict | None = None, base: str = "", callbacks=(),
              **settings) -> pd.DataFrame:
        """The log of an arm, for which a reply is the better the more of its words are different and few."""
        sizes = dict(posts_per_step=4, num_generations=4, gradient_accumulation=0, report_to="none", kl_weight=0.0,
                     learning_rate_supervised=1e-3, learning_rate_policy=1e-3, batch_size=8)
        return train_arm(base or self.nano, self.pairs, self.folder / name, TrainSettings.make(**sizes | settings),
                         objective=objective, reward=variety, reward_id="variety", loading=loading, label=name,
                         callbacks=callbacks)


def variety(posts: list[str], replies: list[str]) -> np.ndarray:
    return np.array([len(set(reply.split())) / (4 + len(reply.split())) for reply in replies])


def near(found: float, wanted: float, tolerance: float, what: str) -> str:
    """`what` in words. Raises: AssertionError where found is further than `tolerance` (relative) from wanted."""
    gap = abs(found / wanted - 1)
    text = f"{what} {found:.4f} against {wanted:.4f} ({gap:.2%})"
    if not gap <= tolerance:
        raise AssertionError(f"{text}, allowed {tolerance:.0%}")
    return text


def check_bfloat16(bench: Bench) -> str:
    wanted, found = bench.nll(precision="float32"), bench.nll(precision="bfloat16")
    log = bench.train("bfloat16", Objective(0.3, 0.5, 0.2), {"precision": "bfloat16"}, max_steps=4)
    if not np.isfinite(log["loss"]).all():
        raise AssertionError(f"loss {log['loss'].tolist()}")
    return near(found, wanted, 0.02, "nats a token") + ", 4 hybrid steps"


def check_4bit(bench: Bench) -> str:
    if not find_spec("bitsandbytes"):
        raise NotRun("no package bitsandbytes")
    found = bench.nll(quantization="4bit")
    bench.train("4bit", Objective(0.3, 0.5, 0.2), {"quantization": "4bit"}, max_steps=2)
    return near(found, bench.nll(), 0.1, "nats a token") + f", 2 hybrid steps, bitsandbytes {version('bitsandbytes')}"


def check_attention(bench: Bench) -> str:
    ways = ["eager", "sdpa", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
    found = {way: bench.nll(attention=way) for way in ways}
    told = "; ".join(near(found[way], found["eager"], 0.01, way) for way in ways[1:])
    return told + ("" if len(ways) == 3 else "; flash-attn is not there")


def check_fast_path(bench: Bench) -> str:
    model, tokenizer = load_policy(bench.large)
    posts = bench.pairs["tweet"].drop_duplicates().head(4).tolist()
    table = tokenizer([format_prompt(post, tokenizer) for post in posts], padding=True, return_tensors="pt")
    table = table.to(model.device)
    gap = largest_difference(model, table["input_ids"], table["attention_mask"])
    generate_replies(model, tokenizer, posts, 2, max_new_tokens=8, label="")
    if not getattr(model, "fast_path_agrees", False):
        raise AssertionError(f"it was not taken: log-probs differ by {gap:.2g} nats")
    return f"taken; log-probs differ by {gap:.2g} nats at most in {str(model.dtype).removeprefix('torch.')}"


def check_learning(bench: Bench) -> str:
    steps = 3 if bench.tiny else 60
    reward = bench.train("learning", Objective(0, 1, 0), max_steps=steps, posts_per_step=8, num_generations=8)["reward"]
    first, last = reward[: steps // 3].mean(), reward[-(steps // 3):].mean()
    if not bench.tiny and last <= first:
        raise AssertionError(f"the reward did not rise in {steps} grpo steps: {first:.3f}, then {last:.3f}")
    return f"reward {first:.3f} in the first third of {steps} grpo steps of nano, {last:.3f} in the last"


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def check_resume(bench: Bench) -> str:
    given = dict(max_steps=8, save_steps=2)
    bench.train("whole", Objective(0.3, 0.5, 0.2), **given)
    try:
        bench.train("cut", Objective(0.3, 0.5, 0.2), callbacks=[_Stop()], **given)
    except KeyboardInterrupt:
        log = bench.train("cut", Objective(0.3, 0.5, 0.2), **given)
    else:
        raise AssertionError("training did not stop at step 5")
    one, two = (load_file(bench.folder / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    gap = max(float((one[name] - two[name]).abs().max()) for name in one)
    if len(log) != 8 or not gap <= 1e-3:
        raise AssertionError(f"{len(log)} steps, weights differ by {gap:.2g} after a stop at step 5 of 8")
    return "stopped at step 5 of 8 and resumed: " + (f"weights differ by {gap:.2g}" if gap else "the same weights")


def check_vllm(bench: Bench) -> str:
    if not find_spec("vllm"):
        raise NotRun("no package vllm")
    if device_and_dtype()[0].type != "cuda":
        raise NotRun("vllm needs a GPU")
    log = bench.train("vllm", Objective(0, 1, 0), base=bench.large, max_steps=3, generation_engine="vllm")
    return f"3 grpo steps, vllm {version('vllm')}, mean length {log['mean_length'].mean():.1f} tokens"


def peak_mb(reset: bool = False) -> float:
    """Highest GPU memory since the last reset, MB; NaN without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    found = torch.cuda.max_memory_allocated() / 2**20
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return found


def timed(step: Callable[[], float]) -> Callable[[], float]:
    """`step` with its seconds taken when the GPU has ended it."""
    def whole() -> float:
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return whole


def ratios(bench: Bench, what: str, theirs: str, size: str, steps: Callable[[str], Callable[[], float]],
           ways: tuple[str, str]) -> list[dict]:
    """Rows of the ratio table. steps: makes the step of a way; memory is of each alone, seconds of both in turn."""
    memory = {}
    for way in ways:
        gc.collect()  # a trainer and its model hold each other
        peak_mb(reset=True)
        steps(way)()
        memory[way] = peak_mb()
    gc.collect()
    made = {way: timed(steps(way)) for way in ways}
    rows = speed.rows_of(speed.in_turn(made, bench.rounds), theirs, {"what": what, "size": size})
    return [row | {"peak_gpu_mb": memory[row["way"]]} for row in rows]


def check_step(bench: Bench) -> str:
    """A GRPO step and sampling, TRL's and transformers' beside ours."""
    table, told = speed.examples(""), []
    for name in ["2x2x4"] if bench.tiny else SIZES:
        size = tuple(map(int, name.split("x")))

        def grpo(way, size=size):
            return speed.stepper(speed.trainer_of(way, size, "full", table, bench.large, str(bench.folder / "speed")))

        def sample(way, size=size):
            return speed.sampler(way, size, table, bench.large)

        for what, steps, ways in (("grpo step", grpo, ("stock grpo", "grpo")), ("sampling", sample, ("stock", "ours"))):
            rows = ratios(bench, what, ways[0], name, steps, ways)
            bench.timings += rows
            told.append(f"{what} {name} {rows[1]['seconds']:.3g} s, {rows[1]['ratio']:.2f} times as fast as {ways[0]}")
    return "; ".join(told)


CHECKS = {"bfloat16": check_bfloat16, "4bit": check_4bit, "attention": check_attention, "fast path": check_fast_path,
          "resume": check_resume, "learning": check_learning, "step": check_step, "vllm": check_vllm}


def results(bench: Bench, names: list[str], minutes: float) -> Iterator[dict]:
    """One row a check: check, result, seconds, peak_gpu_mb, note."""
    begin = time.monotonic()
    for name in names:
        start, result = time.monotonic(), "ok"
        peak_mb(reset=True)
        try:
            if start - begin > 60 * minutes:
                raise NotRun(f"{minutes:g} minutes were over")
            note = CHECKS[name](bench)
        except NotRun as reason:
            result, note = "not run", str(reason)
        except Exception as error:  # one path that fails must not hide the others; the exit code says that one did
            traceback.print_exc()
            result, note = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
        say(f"{name}: {result}, {note}")
        yield {"check": name, "result": result, "seconds": round(time.monotonic() - start, 1),
               "peak_gpu_mb": peak_mb(), "note": note}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def machine(bench: Bench) -> str:
    """The machine and its packages in a line."""
    device, dtype = device_and_dtype()
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(0)
        name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    model = bench.model or f"random weights, {'tiny' if bench.tiny else 'the shape of Qwen3-0.6B'}"
    return f"{name}; {str(dtype).removeprefix('torch.')}; {packages}; timed model: {model}"


def markdown(table: pd.DataFrame) -> str:
    """`table` as Markdown; a bar within a cell is escaped."""
    rows = [[("" if value != value else f"{value:.4g}") if isinstance(value, float) else
             str(value).replace("|", r"\|") for value in row] for row in table.itertuples(index=False)]
    lines = [list(table), ["---"] * table.shape[1], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(out: Path, head: str, checks: list[dict], timings: list[dict]) -> None:
    """checks.csv, speed.csv and table.md in `out`."""
    table, ratio = pd.DataFrame(checks), pd.DataFrame(timings)
    write_csv(out / "checks.csv", table)
    text = f"{head}\n\n{markdown(table)}\n"
    if len(ratio):
        write_csv(out / "speed.csv", ratio)
        text += f"\n{markdown(ratio[['what', 'size', 'way', 'seconds', 'ratio', 'peak_gpu_mb', 'rounds']])}\n"
    (out / "table.md").write_text(text, encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10, help="no check begins after these")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--model", default="", help="folder or Hub id of the model that is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of the large one; needs no GPU")
    given = parser.parse_args(words)
    if not torch.cuda.is_available() and not given.tiny:
        print("there is no GPU here: --tiny runs the same code on the CPU, and says nothing about a GPU",
              file=sys.stderr)
        return 2
    quiet_libraries()
    checks, scratch = [], Path(tempfile.mkdtemp(prefix="grpo_engage_gpu_"))
    try:
        bench = Bench(scratch, given.tiny, given.model, given.rounds)
        head = machine(bench)
        for row in results(bench, given.only, given.minutes):
            checks.append(row)
            write(given.out, head, checks, bench.timings)  # what is done is kept if the machine goes away
    finally:
        shutil.rmtree(scratch)
    print((given.out / "table.md").read_text(encoding="utf-8"))
    return int(any(row["result"] == "failed" for row in checks))


if __name__ == "__main__":
    sys.exit(main())
