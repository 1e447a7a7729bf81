"""Records the interface of vLLM that TRL calls, from a wheel: python tests/vllm_double/record.py vllm-0.30.0-….whl"""

import ast
import json
import sys
import zipfile
from pathlib import Path

FUNCTIONS = {"LLM.__init__": "entrypoints/llm.py", "LLM.generate": "entrypoints/llm.py",
             "LLM.sleep": "entrypoints/llm.py", "LLM.wake_up": "entrypoints/llm.py",
             "LLM.reset_prefix_cache": "entrypoints/llm.py", "RequestOutput.__init__": "outputs.py"}
FIELDS = {"SamplingParams": "sampling_params.py", "EngineArgs": "engine/arg_utils.py", "CompletionOutput": "outputs.py",
          "Logprob": "logprobs.py"}


def recorded(wheel: Path) -> dict:
    """Names of the arguments of each function and of the fields of each class, and which may be given by place."""
    with zipfile.ZipFile(wheel) as archive:
        trees = {name: ast.parse(archive.read(f"vllm/{name}")) for name in {*FUNCTIONS.values(), *FIELDS.values()}}

    def class_of(name: str, file: str) -> ast.ClassDef:
        return next(node for node in trees[file].body if isinstance(node, ast.ClassDef) and node.name == name)

    functions = {}
    for name, file in FUNCTIONS.items():
        owner, function = name.split(".")
        found = next(node.args for node in class_of(owner, file).body
                     if isinstance(node, ast.FunctionDef) and node.name == function)
        functions[name] = {"by_place": [argument.arg for argument in found.args][1:],
                           "by_name": [argument.arg for argument in found.kwonlyargs],
                           "any_other": found.kwarg is not None}
    fields = {name: [node.target.id for node in class_of(name, file).body if isinstance(node, ast.AnnAssign)]
              for name, file in FIELDS.items()}
    return {"version": wheel.name.split("-")[1], "functions": functions, "fields": fields}


if __name__ == "__main__":
    place = Path(__file__).with_name("interface.json")
    place.write_text(json.dumps(recorded(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
