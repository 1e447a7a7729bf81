"""The judge command against a real model behind a real socket: SmolLM2-135M-Instruct on this machine.

    python proofs/llm_judge_server.py RUN_DIR [--limit 2]

`transformers serve` speaks the same protocol but needs packages that are not in the lock file (`pip install
"transformers[serving]"`). So this script puts the standard library's HTTP server in front of the model: POST
/v1/chat/completions, greedy, one request at a time. Give --url to use another server instead, such as that one. Leaves
the judge's tables in RUN_DIR/evaluation/llm_judge and prints them. A model of this size is no judge; what is shown is
that calls, parsing, both orders, cache and tables work, and how unusable its verdicts are.
"""

import argparse
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_engage.base_models import ensure_policy
from grpo_engage.llm_client import Endpoint
from grpo_engage.llm_judging import judge_run


def serve(folder: Path) -> tuple[HTTPServer, dict]:
    """A server on a free port of this machine, running in a thread; and its counts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    counts = {"calls": 0, "seconds": 0.0, "tokens": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            start = time.monotonic()
            inputs = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt",
                                                   return_dict=True)
            length = inputs["input_ids"].shape[1]
            with torch.inference_mode():
                made = model.generate(**inputs, do_sample=False, max_new_tokens=body["max_tokens"])[0, length:]
            counts["calls"] += 1
            counts["seconds"] += time.monotonic() - start
            counts["tokens"] += length
            content = json.dumps({
                "object": "chat.completion", "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": {
                    "role": "assistant", "content": tokenizer.decode(made, skip_special_tokens=True)}}],
                "usage": {"prompt_tokens": length, "completion_tokens": len(made)}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--url", default="", help="a server that is already there")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    server, counts = (None, {}) if args.url else serve(Path(ensure_policy("smollm2-135m")))
    url = args.url or f"http://127.0.0.1:{server.server_port}/v1"
    start = time.monotonic()
    tables = judge_run(args.run_dir, Endpoint(url, args.model, timeout=120), limit=args.limit, repeats=1, injected=1)
    print(f"{counts} in {time.monotonic() - start:.0f} s")
    for name in ("summary", "agreement", "flips"):
        print(f"\n{name}\n{tables[name].round(3).to_string(index=False, max_colwidth=50)}")
    for name in ("pairwise", "absolute"):
        print(f"\n{name}: reasons\n{tables[name]['reason'].value_counts().to_string()}")
    before = counts.get("calls")
    judge_run(args.run_dir, Endpoint(url, args.model, timeout=120), limit=args.limit, repeats=1, injected=1)
    if before is not None and counts["calls"] != before:
        sys.exit(f"{counts['calls'] - before} questions were asked again, though all had an answer")
    print("\na second time: all answers came from the cache")


if __name__ == "__main__":
    main()
