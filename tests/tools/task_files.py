"""Task files of lm-evaluation-harness with data beside them, so that no hub is asked."""

import json

CHOICES = ["a wave", "the the turns", "xqzj", "again by"]
QUESTIONS = [
    {"question": "the state of " * (1 + n % 5), "choices": CHOICES, "answer": n % 4}
    for n in range(12)
]
TEXTS = [{"text": "the wave decays and turns é " * (1 + n)} for n in range(6)]
PROMPTS = [{"prompt": "the state of a " * n, "answer": "the"} for n in range(7)]

_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{more}
metric_list:
{metrics}
"""
_GREEDY = 'generation_kwargs: {until: ["e "], max_gen_toks: 12, do_sample: false}'
_KINDS = {
    "choosing": (
        "multiple_choice",
        QUESTIONS,
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer',
        ["acc", "acc_norm"],
    ),
    "reading": (
        "loglikelihood_rolling",
        TEXTS,
        'doc_to_text: ""\ndoc_to_target: "{{text}}"',
        ["byte_perplexity", "bits_per_byte"],
    ),
    "writing": (
        "generate_until",
        PROMPTS,
        'doc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\n' + _GREEDY,
        ["exact_match"],
    ),
}


def write_tasks(folder):
    """A task of each kind: `choosing`, `reading` and `writing`."""
    folder.mkdir(parents=True)
    for name, (kind, documents, more, metrics) in _KINDS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in documents))
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics)
        (folder / f"{name}.yaml").write_text(
            _TASK.format(name=name, data=data, kind=kind, more=more, metrics=listed)
        )
    return folder
