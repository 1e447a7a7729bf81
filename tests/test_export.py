"""A trained model as others get it: loaded without this package, from a folder, a Hub's cache, a double of the Hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_engage.base.core import read_json, write_csv, write_json
from grpo_engage.policy.replies import sampling_facts
from grpo_engage.policy.sampling import load_adapted, load_policy
from grpo_engage.run.export import exported
from grpo_engage.run.settings import load_preset, resolve_config
from grpo_engage.train.loop import lora_config, save_adapter

POST = "Is the bridge öffen? 🌉 <|end|> {x}"


def a_run(folder, base, name):
    """A run that trained grpo, whose adapter says other things than its base, and was evaluated a little."""
    config = resolve_config(load_preset("smoke"), ["arms=[baseline, grpo]"]) | {"preset": "smoke"}
    write_json(folder / "config.json", config)
    model, tokenizer = load_policy(base)
    facts = {"name": name, "sha256": None, "quantization": "none",
             "sampling": sampling_facts(tokenizer, model.config, model.generation_config)}
    write_json(folder / "policy" / "policy.json", facts)
    write_json(folder / "data" / "manifest.json", {"parameters": {"source": "file"}, "counts": {
        "pairs": 900, "conversations": 80}})
    place = folder / "train" / "grpo" / "seed0"
    write_json(place / "manifest.json", {"status": "completed", "parameters": {"max_steps": 40}, "reward": "combined"})
    adapted = get_peft_model(model, lora_config(4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, weight in adapted.named_parameters():
            if "lora_" in part:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    save_adapter(adapted, place / "adapter", name)
    write_csv(folder / "evaluation" / "temperatures.csv", pd.DataFrame({
        "arm": ["grpo", "grpo"], "temperature": [0.5, 1.0], "chosen": [True, False]}))
    return folder


def log_probs(model, tokenizer):
    ids = tokenizer(POST, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits.log_softmax(-1)


def test_a_merged_model_says_what_the_adapter_said(base, tmp_path):
    run_dir = a_run(tmp_path / "run", base, "nano")
    folder = exported(run_dir, "grpo", tmp_path / "a model 😀", merge=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    adapted = load_adapted(base, run_dir / "train" / "grpo" / "seed0" / "adapter")
    mine, theirs, plain = (log_probs(*pair) for pair in ((model, tokenizer), adapted, load_policy(base)))
    assert (mine - theirs).abs().max() < 1e-4 and (plain - theirs).abs().max() > 0.1
    facts = read_json(run_dir / "policy" / "policy.json")["sampling"]
    asked = read_json(folder / "prompt.json")
    assert tokenizer(asked["prompt"])["input_ids"] == facts["prompt_ids"] and asked["temperature"] == 0.5
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "must not be used" in card and "generated text; mark it" in card and "base_model:" not in card
    assert not [*folder.glob("*.bin")], "no pickle"
    with pytest.raises(FileExistsError, match="is there already"):
        exported(run_dir, "grpo", folder, merge=True)
    with pytest.raises(ValueError, match="export it with --merge"):
        exported(run_dir, "grpo", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


LOADED = """
import json, sys
import torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
assert not any(name.startswith("grpo_engage") for name in sys.modules)
asked = json.loads((Path(folder) / "prompt.json").read_text())
chat = [{"role": "system", "content": asked["instruction"]}, {"role": "user", "content": "late again?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
assert model.generate(**ids, do_sample=True, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
with torch.inference_mode():
    torch.save(model(input_ids=ids).logits.log_softmax(-1), sys.argv[3])
"""


def test_an_adapter_is_found_with_its_base_by_peft_alone(base, tmp_path):
    """The base lies in a Hub's cache, as after a download, at a commit; nothing of ours is imported."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--me--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / commit).symlink_to(base)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    run_dir = a_run(tmp_path / "run", base, "me/tiny")
    facts = read_json(run_dir / "policy" / "policy.json")
    write_json(run_dir / "policy" / "policy.json", facts | {"provenance": {"revision": commit}})
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1",
                                "GRPO_ENGAGE_RUNS": str(tmp_path)}
    made = subprocess.run([sys.executable, "-m", "grpo_engage", "export", "--run", "run", "--arm", "grpo", "--out",
                           str(tmp_path / "adapter")], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    settings = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/tiny", commit)
    loaded = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "adapter"), POST, str(tmp_path / "out.pt")],
                            env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    theirs = log_probs(*load_adapted(base, run_dir / "train" / "grpo" / "seed0" / "adapter"))
    assert (torch.load(tmp_path / "out.pt", weights_only=True) - theirs).abs().max() < 1e-4
    assert "base_model: me/tiny" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def hub():
    """A double of the Hub's interface: takes what `huggingface_hub` sends, and forgets nothing of it."""
    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.server.heard.append((self.path, self.headers.get("Authorization", ""), body))
            here = f"http://127.0.0.1:{self.server.server_port}"
            answer, status = {}, 200
            if "good" not in self.headers.get("Authorization", ""):
                answer, status = {"error": "Invalid username or password."}, 401
            elif self.path == "/api/repos/create":
                answer = {"url": f"{here}/me/mine"}
            elif "/preupload/" in self.path:
                answer = {"files": [{"path": entry["path"], "uploadMode": "regular", "shouldIgnore": False}
                                    for entry in json.loads(body)["files"]]}
            elif "/commit/" in self.path:
                answer = {"commitUrl": f"{here}/me/mine/commit/1", "commitOid": "1" * 40, "success": True}
            self.reply(status, answer)

        def do_GET(self):
            self.reply(200, {"id": "me/mine", "sha": "0" * 40, "siblings": []})

        def reply(self, status, answer):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.heard = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("token", ["good", "bad"])
def test_a_push_sends_every_file_and_the_token_stands_nowhere_else(base, tmp_path, hub, token):
    run_dir, secret = a_run(tmp_path / "run", base, "nano"), f"hf_{token}_secret"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": secret, "HF_HOME": str(tmp_path / "home"),
        "GRPO_ENGAGE_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "grpo_engage", "export", "--run", run_dir.name, "--arm", "grpo",
                           "--merge", "--out", str(tmp_path / "out"), "--push", "me/mine"], env=environment,
                          capture_output=True, text=True, timeout=240)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "README.md", "prompt.json", "config.json"} <= written
    assert secret not in done.stdout + done.stderr
    assert not any(secret.encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())
    if token == "bad":
        assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert f"{hub.server_port}/me/mine" in done.stdout
    [commit] = [body for path, _, body in hub.heard if "/commit/" in path]
    sent = {json.loads(line)["value"]["path"] for line in commit.splitlines() if json.loads(line)["key"] == "file"}
    assert sent == written
    [created] = [json.loads(body) for path, _, body in hub.heard if path == "/api/repos/create"]
    assert created.get("private") is True or created.get("visibility") == "private", created
    assert all("hf_good" in sender for _, sender, _ in hub.heard)
