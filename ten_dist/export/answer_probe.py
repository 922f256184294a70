"""Run by :mod:`ten_dist.export.verification` in a process of its own: asks an exported model.

What works here works wherever transformers is: ten_dist cannot be imported.
"""

import json
import sys


def main() -> None:
    """Read a question from standard input, and write the answer to the file it names."""
    # Python then says that there is no such module, wherever it may lie.
    sys.modules["ten_dist"] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    question = json.load(sys.stdin)
    folder = question["folder"]
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    model = model.double().eval()
    with torch.no_grad():
        logits = model(torch.tensor(question["probe"])).logits
        continuation = model.generate(
            torch.tensor(question["prompt"]),
            max_new_tokens=question["new_tokens"],
            do_sample=False,
            eos_token_id=None,
        )
    answer = {"logits": logits, "continuation": continuation}
    save_file({k: v.contiguous() for k, v in answer.items()}, question["answer"])


if __name__ == "__main__":
    main()
