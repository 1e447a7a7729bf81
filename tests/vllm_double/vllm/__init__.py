"""A stand-in for vLLM, which needs a GPU: takes the calls that its interface takes (`interface.json`, recorded from the
package by `record.py`), keeps them, and samples with transformers from weights of its own, which change only when they
are pushed."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

INTERFACE = json.loads((Path(__file__).parents[1] / "interface.json").read_text(encoding="utf-8"))
__version__ = INTERFACE["version"]
made: list["LLM"] = []


def check_call(function: str, given: tuple, named: dict) -> None:
    """Raise TypeError where vLLM's `function` would not take these arguments."""
    known = INTERFACE["functions"][function]
    others = INTERFACE["fields"]["EngineArgs"] if known["any_other"] and function == "LLM.__init__" else []
    wrong = set(named) - {*known["by_place"], *known["by_name"], *others}
    if wrong or len(given) > len(known["by_place"]):
        raise TypeError(f"vLLM {__version__}: {function} does not take {sorted(wrong) or given}")


def answer(kind: str, **named) -> SimpleNamespace:
    """An answer of vLLM's class `kind`, which has these fields."""
    fields = INTERFACE["fields"].get(kind) or INTERFACE["functions"][f"{kind}.__init__"]["by_place"]
    assert set(named) <= set(fields), (kind, named)
    return SimpleNamespace(**named)


class SamplingParams:
    def __init__(self, **named):
        if wrong := set(named) - set(INTERFACE["fields"]["SamplingParams"]):
            raise TypeError(f"vLLM {__version__}: SamplingParams has no {sorted(wrong)}")
        if not 0 <= named["temperature"] <= 2:  # as `_verify_args` of 0.30.0
            raise ValueError(f"temperature must be in [0, 2], got {named['temperature']}")
        self.named = named


RequestOutput = SimpleNamespace  # TRL names it in annotations alone


class LLM:
    def __init__(self, *given, **named):
        check_call("LLM.__init__", given, named)
        self.named, self.calls, self.pushes = named, [], []
        self.model = AutoModelForCausalLM.from_pretrained(named["model"], dtype=torch.float32).eval()
        self.weights = dict(self.model.named_parameters())
        loads = SimpleNamespace(load_weights=self._load)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=loads))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        made.append(self)

    def _load(self, weights):
        for name, value in weights:
            own = self.weights[name]  # KeyError: a name that the model does not have
            assert own.shape == value.shape, (name, own.shape, value.shape)
            own.data.copy_(value)
            self.pushes.append(name)

    def reset_prefix_cache(self, *given, **named):
        check_call("LLM.reset_prefix_cache", given, named)
        self.calls.append(("reset", len(self.pushes)))

    @torch.no_grad()
    def generate(self, *given, **named):
        check_call("LLM.generate", given, named)
        prompts, asked = given[0], named["sampling_params"].named
        self.calls.append(("generate", len(prompts), asked))
        outputs = []
        for prompt in prompts:
            ids, said, chances = torch.tensor([prompt["prompt_token_ids"]]), [], []
            while len(said) < asked["max_tokens"] and not (said and said[-1] in asked["stop_token_ids"]):
                logp = (self.model(ids).logits[0, -1] / asked["temperature"]).log_softmax(-1)
                token = int(torch.multinomial(logp.exp(), 1))
                said.append(token)
                chances.append({token: answer("Logprob", logprob=float(logp[token]), rank=1)})
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            outputs.append(answer("RequestOutput", prompt_token_ids=prompt["prompt_token_ids"], outputs=[
                answer("CompletionOutput", token_ids=said, logprobs=chances)]))
        return outputs
