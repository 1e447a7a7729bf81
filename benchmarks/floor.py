"""How fast could a GRPO step be? Operations and bytes of each part, and the time that arithmetic or memory allows.

    python benchmarks/floor.py OUT.csv [--policy smollm2-135m] [--posts 2 --replies 8 --prompt 62 --tokens 32]

Counts multiply-adds as two operations and leaves out attention's own products, norms and activations (a few per cent
at these lengths) and LoRA (2 r / width of each product). With N weights of the layers, V x d of the output layer, G
posts of P tokens and B = G K replies of R:

    part                 plain                                        shared prefix
    prompts, sampling    B P 2N                                       G P 2N
    tokens, sampling     B R (2N + 2Vd), weights read R times         the same
    policy, forward      B (P + R) (2N + 2Vd)                         (G P + B (R - 1)) 2N + B R 4Vd
    policy, backward     B (P + R) (2N + 4Vd)                         (G P + B (R - 1)) 2N

(plain: TRL on a CPU asks its output layer about every position, and makes the logits again in the backward pass;
shared: about replies alone, and the slope is made in the forward pass.) The floor of a part is the larger of operations
over the best rate of matrix products and bytes over the best rate of reading, both measured here at the start; the
columns `h100` take its data sheet's 989 TFLOP/s (bfloat16, dense) and 3.35 TB/s, with two bytes a weight.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_engage.base.core import say, write_csv
from grpo_engage.policy.base_models import ensure_policy

H100 = {"operations": 989e12, "bytes": 3.35e12}


def best(function, times: int) -> float:
    """Least seconds of a call."""
    seen = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seen.append(time.perf_counter() - start)
    return min(seen)


def rates_here() -> dict[str, float]:
    """Operations a second of a large float32 product, bytes a second of reading what is in no cache."""
    size = 1024
    left, right, long = torch.randn(size, size), torch.randn(size, size), torch.randn(100_000_000)
    return {"operations": 2 * size**3 / best(lambda: left @ right, 20), "bytes": 4 * len(long) / best(long.sum, 5)}


def parts(layers: int, head: int, posts: int, replies: int, prompt: int, tokens: int) -> pd.DataFrame:
    """Operations and weights read of each part, both ways; layers: N, head: V d."""
    rows, whole = posts * replies, prompt + tokens
    shared = posts * prompt + posts * replies * (tokens - 1)
    table = [
        ("prompts, sampling", rows * prompt * 2 * layers, posts * prompt * 2 * layers, layers),
        ("tokens, sampling", rows * tokens * 2 * (layers + head), rows * tokens * 2 * (layers + head),
         tokens * (layers + head)),
        ("policy, forward", rows * whole * 2 * (layers + head), shared * 2 * layers + rows * tokens * 4 * head,
         layers + head),
        ("policy, backward", rows * whole * (2 * layers + 4 * head), shared * 2 * layers, layers + head)]
    return pd.DataFrame(table, columns=["part", "plain_operations", "shared_operations", "weights_read"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", default="smollm2-135m")
    for name, value in (("posts", 2), ("replies", 8), ("prompt", 62), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    place = ensure_policy(given.policy)
    model, config = AutoModelForCausalLM.from_pretrained(place), AutoConfig.from_pretrained(place)
    head = config.vocab_size * config.hidden_size
    layers = sum(weight.numel() for weight in model.base_model.layers.parameters())
    here = rates_here()
    say(f"{layers / 1e6:.1f} M weights in the layers, {head / 1e6:.1f} M in the output layer; here "
        f"{here['operations'] / 1e9:.0f} GFLOP/s, {here['bytes'] / 1e9:.1f} GB/s")
    table = parts(layers, head, given.posts, given.replies, given.prompt, given.tokens)
    for way in ("plain", "shared"):
        for name, rates, width in (("here", here, 4), ("h100", H100, 2)):
            table[f"{way}_{name}_seconds"] = (table[f"{way}_operations"] / rates["operations"]).clip(
                lower=table["weights_read"] * width / rates["bytes"])
    total = table.drop(columns="part").sum().to_frame().T.assign(part="step")
    table = pd.concat([table, total], ignore_index=True)
    facts = {"policy": given.policy, "posts": given.posts, "replies": given.replies, "prompt": given.prompt,
             "tokens": given.tokens, "gflops_here": here["operations"] / 1e9, "gbytes_here": here["bytes"] / 1e9}
    write_csv(given.out, table.assign(**facts)[[*facts, *table]])
    print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
