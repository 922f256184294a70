"""Run by :mod:`benchmarks.export` in an environment of torch and transformers alone.

    python -I export_worker.py EXPORTED QUESTION ANSWER

QUESTION is a safetensors file with a probe [1, T], the run's logits for it [1, T, V], and
its greedy continuation [1, P + N] of a prompt [1, P]. ANSWER becomes a JSON object.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def main() -> None:
    """Compare an exported model with what the run's has answered."""
    for name in ("ten_dist", "deepspeed"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed here"
    folder, question, answered = sys.argv[1:]
    asked = load_file(question)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, trust_remote_code=True, dtype=torch.float32).eval()
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    length = asked["prompt"].shape[1]
    steps = asked["continued"].shape[1] - length
    with torch.no_grad():
        logits = model(asked["probe"]).logits
        continued = model.generate(
            asked["prompt"], max_new_tokens=steps, do_sample=False, eos_token_id=None
        )
    equal = (continued == asked["continued"])[:, length:]
    answer = {
        "difference": float((logits - asked["logits"]).abs().max()),
        "equal_tokens": int(equal.sum()),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    Path(answered).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
