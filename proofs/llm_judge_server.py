"""The judge command against a real model behind a real server: `transformers serve` with SmolLM2-135M-Instruct.

    pip install --target FOLDER openai uvicorn fastapi starlette rich python-multipart
    PYTHONPATH=FOLDER python proofs/llm_judge_server.py RUN_DIR [--limit 2]

The server's packages are not in the lock file: nothing else here needs them, and a folder of their own leaves the
environment as it is. RUN_DIR is a run that is evaluated. Leaves the judge's tables in RUN_DIR/evaluation/llm_judge and
prints them; fails if a second call asks anything again. A model of this size is no judge; what is shown is that calls,
parsing, both orders, cache and tables work, and how unusable its verdicts are.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2

from grpo_engage.judges.endpoint import Endpoint
from grpo_engage.judges.llm_judging import judge_run
from grpo_engage.policy.base_models import ensure_policy


@contextmanager
def served(model: Path, port: int, log: Path, seconds: float = 180):
    """`transformers serve` with `model` on a port of this machine; its output goes to `log`."""
    with open(log, "w") as handle:
        server = subprocess.Popen([Path(sys.executable).with_name("transformers"), "serve", model, "--host",
                                   "127.0.0.1", "--port", str(port)], stdout=handle, stderr=handle)
        try:
            end = time.monotonic() + seconds
            while server.poll() is None and time.monotonic() < end:
                try:
                    if httpx2.get(f"http://127.0.0.1:{port}/health").is_success:
                        break
                except httpx2.TransportError:
                    pass  # it is not listening yet
                time.sleep(0.5)
            else:
                sys.exit(f"the server did not start:\n{log.read_text()[-2000:]}")
            yield
        finally:
            server.terminate()
            server.wait(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--port", type=int, default=8093)
    args = parser.parse_args()
    model, log = ensure_policy("smollm2-135m"), Path(tempfile.mkdtemp(prefix="grpo_engage_serve_")) / "server.log"
    # so small a model does not end its answers by itself: few tokens, and eight times as many where there is no verdict
    endpoint = Endpoint(f"http://127.0.0.1:{args.port}/v1", str(model), max_tokens=16)

    def judge() -> tuple[dict, int]:
        before = log.read_text().count("POST /v1/chat/completions")
        tables = judge_run(args.run_dir, endpoint, limit=args.limit, repeats=1, injected=1)
        return tables, log.read_text().count("POST /v1/chat/completions") - before

    with served(model, args.port, log):
        start = time.monotonic()
        tables, calls = judge()
        print(f"{calls} calls reached the server in {time.monotonic() - start:.0f} s")
        for name in ("summary", "agreement", "flips"):
            print(f"\n{name}\n{tables[name].round(3).to_string(index=False, max_colwidth=50)}")
        for name in ("pairwise", "absolute"):
            print(f"\n{name}: reasons\n{tables[name]['reason'].value_counts().to_string()}")
        _, again = judge()
    if again or not calls:
        sys.exit(f"{calls} calls at first; {again} questions were asked again, though all had an answer")
    print("\na second time: all answers came from the cache")


if __name__ == "__main__":
    main()
