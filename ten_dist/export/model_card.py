"""The model card of an exported model: figures of its run, and nothing else."""

from __future__ import annotations

import math
from pathlib import PurePosixPath

from ten_dist.checkpoint.record import RunState
from ten_dist.run_record import RunRecord

_SETTINGS = (
    "optimizer",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "gradient_clipping",
    "precision",
    "seed",
)


def model_card(record: RunRecord, state: RunState, name: str) -> str:
    """The text of README.md.

    Args:
        record: of the run.
        state: of the checkpoint.
        name: of the model.
    """
    model, schedule, metrics = record.model, record.schedule, state.metrics
    tokens = state.step * schedule.tokens_per_step
    if model.mixer == "attention":
        kind = "A transformer, trained as the baseline of a Temporal Eigenstate Network"
    else:
        scales = ",".join(map(str, model.scales))
        kind = "A Temporal Eigenstate Network (TEN)"
        if model.hten_scales is not None:
            kind = f"A hierarchical Temporal Eigenstate Network (HTEN, scales {scales})"
        if model.levels is not None:
            kind += f" with levels {','.join(map(str, model.levels))}"
    facts = {
        "width": model.dim,
        "layers": model.n_layers,
        "vocabulary": f"{model.vocab_size:,}",
    }
    if model.mixer != "attention":
        facts["of a layer"] = model.describe_eigenstates()
    facts |= {
        "data": _names(record.data.train),
        "documents kept apart": "yes"
        if model.document_separator_id is not None
        else "no",
        "steps": f"{state.step:,} of {schedule.steps:,}",
        "tokens": f"{tokens:,}",
        "row length": f"{schedule.seq_len:,} tokens",
        "batch": f"{schedule.global_batch_size:,} rows",
    }
    training = record.training.to_dict()
    facts |= {name.replace("_", " "): training[name] for name in _SETTINGS}
    facts["schedule"] = schedule.describe_learning_rate()
    if record.training.peak_of_muon is not None:
        facts["muon learning rate"] = record.training.peak_of_muon
    for key, text in (
        ("ce_loss", "training loss"),
        ("val_loss", "held-out loss"),
        ("val_bits_per_byte", "held-out bits per byte"),
    ):
        validated = metrics.get("validated_step") == state.step
        known = isinstance(metrics.get(key), float) and math.isfinite(metrics[key])
        if known and (validated or not key.startswith("val_")):
            facts[text] = f"{metrics[key]:.4f}"
    facts |= _history(record)
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- ten
---

# {name}

{kind}, trained with ten_dist {record.versions.get("ten_dist", "")}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`trust_remote_code` runs `modeling_ten.py` of this folder, which is plain torch. Losses are in nats a token.

| of the run | |
|---|---|
{rows}

## Limits

A base model: it continues text as its data do, and was not tuned to follow instructions, to be truthful or to be
safe. It was not evaluated beyond the figures above. {_length_limit(schedule.seq_len)}
"""


def _history(record: RunRecord) -> dict[str, str]:
    """How the run began and came to its length, where that is not from nothing at once."""
    facts = {}
    origin = record.origin
    if origin is not None:
        name = PurePosixPath(origin.path).name
        step = "" if origin.step is None else f", step {origin.step:,}"
        facts["began with the weights of"] = f"{name}{step}"
        if origin.embedding_rows is not None:
            facts["tokens that kept their embedding"] = f"{origin.embedding_rows:,}"
    if record.extensions:
        facts["made longer"] = ", ".join(
            f"at step {e.step:,} of {e.steps_before:,}" for e in record.extensions
        )
    return facts


def _length_limit(seq_len: int) -> str:
    return (
        f"Rows of training had {seq_len:,} tokens; how well it uses more than that was "
        "not measured."
    )


def _names(places: dict[str, str]) -> str:
    """Names of token sets, without the folders they lie in."""
    return ", ".join(
        name or PurePosixPath(place.rstrip("/")).name for name, place in places.items()
    )
