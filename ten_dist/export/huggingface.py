"""A run's model as a folder that transformers loads without ten_dist.

`config.json`, weights in safetensors, tokenizer, `generation_config.json`, a model card,
and :mod:`ten_dist.export.modeling_ten`, which computes the model in plain torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ten_dist.checkpoint import WEIGHT, CheckpointReader
from ten_dist.config.model import EIGENSTATE_FIELDS, TemporalEigenstateConfig
from ten_dist.data.chat_template import ChatTemplate
from ten_dist.data.manifest import CHAT_TEMPLATE_NAME
from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.export.model_card import model_card
from ten_dist.export.verification import verify
from ten_dist.extras import require_packages
from ten_dist.files import new_folder, write_json, write_text
from ten_dist.run_folder import RunFolder
from ten_dist.run_record import RunRecord
from ten_dist.trained_model import tokenizer_of

LARGEST_FILE = 5 * 10**9
"""Bytes of weights in one file."""
MODELLING_FILE = "modeling_ten.py"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# What concerns training alone, or how a scan is computed.
_NOT_EXPORTED = {
    "energy_reg_weight",
    "energy_kind",
    "z_loss_weight",
    "gradient_checkpointing",
    "scan_backend",
}
_RENAMED = {".input_weight": ".in_proj.weight", ".output_weight": ".out_proj.weight"}
# A rounded rotation would be wrong by more with every step.
_ALWAYS_FLOAT32 = ("alpha_base", "omega_base")


def export_huggingface(
    folder: RunFolder, checkpoint: Path, output: Path, dtype: torch.dtype
) -> float:
    """Write the folder, whole or not at all, after its model was compared with the run's.

    Args:
        folder: the run.
        checkpoint: one of its checkpoints, whose bytes are sound.
        output: a new or empty folder.
        dtype: of the weights.

    Returns:
        The largest difference of a logit between the exported model and the run's.

    Raises:
        ConfigurationError: the output is there already, transformers is not installed, or
            weights are too large for the type.
        TrainingError: the exported model does not compute what the run's does.
        OSError: the file system refuses.
    """
    # Which loads the export before it is done.
    require_packages("an export", ["transformers"], "export")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(
            f"--output {output} is there already: name a new folder"
        )
    record = folder.read()
    with new_folder(output) as temporary:
        with CheckpointReader(checkpoint) as reader:
            _write_weights(reader, temporary, dtype)
            state = reader.record.state
        ends = _write_tokenizer(folder, temporary)
        _write_configuration(record, temporary, dtype, ends)
        source = Path(__file__).with_name(MODELLING_FILE)
        shutil.copyfile(source, temporary / MODELLING_FILE)
        write_text(temporary / "README.md", model_card(record, state, output.name))
        return verify(temporary, record.model, checkpoint, dtype)


def exported_config(model: TemporalEigenstateConfig) -> dict[str, object]:
    """The fields of a model that `config.json` has, by name."""
    left_out = set(_NOT_EXPORTED)
    if model.mixer == "attention":
        left_out |= set(EIGENSTATE_FIELDS) - {"hten_scales"}
    return {n: v for n, v in model.to_dict().items() if n not in left_out}


def exported_name(name: str) -> str:
    """What a tensor of a checkpoint is called in an exported model."""
    for ours, theirs in _RENAMED.items():
        if name.endswith(ours):
            name = name.removesuffix(ours) + theirs
    return f"model.{name}"


def _write_weights(reader: CheckpointReader, folder: Path, dtype: torch.dtype) -> None:
    """`model.safetensors`, or several files and their index."""
    shards = list(_shards(reader, dtype))
    if len(shards) == 1:
        _save(reader, shards[0], folder / WEIGHTS_NAME, dtype)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _save(reader, names, folder / file, dtype)
        weight_map |= {exported_name(name): file for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)


def _shards(reader: CheckpointReader, dtype: torch.dtype) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, shape in reader.shapes.items():
        own = shape.numel() * dtype.itemsize
        if names and size + own > LARGEST_FILE:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _save(
    reader: CheckpointReader, names: list[str], path: Path, dtype: torch.dtype
) -> int:
    """Write some tensors to a file; returns their bytes."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        kept = name.rpartition(".")[2] in _ALWAYS_FLOAT32
        tensor = reader.tensor(WEIGHT, name)
        tensors[exported_name(name)] = tensor if kept else _as(tensor, dtype, name)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise TrainingError(f"{path} cannot be written: {error}") from None
    return sum(tensor.nbytes for tensor in tensors.values())


def _as(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in a type that holds its values."""
    converted = tensor.to(dtype)
    if not converted.isfinite().all() and tensor.isfinite().all():
        raise ConfigurationError(
            f"{name} has weights of up to {float(tensor.abs().max()):.3g}, more than "
            f"{_DTYPES[dtype]} holds: give --dtype bf16 or fp32"
        )
    return converted


def _write_tokenizer(folder: RunFolder, output: Path) -> list[int]:
    """The tokenizer as the run's data were made with it, and the chat template.

    Returns:
        Ids of the tokens that end what a model writes.
    """
    tokenizer = tokenizer_of(folder)
    write_text(output / "tokenizer.json", tokenizer.to_json())
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.separator)
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            **names,
        },
    )
    write_json(output / "special_tokens_map.json", names)
    ends = [tokenizer.separator_id]
    if folder.chat_template_file.is_file():
        what = str(folder.chat_template_file)
        template = ChatTemplate.read(folder.chat_template_file, what)
        write_text(output / CHAT_TEMPLATE_NAME, template.source)
        end = template.turn_end(tokenizer).tolist()
        # The first tokens of a longer end may well stand within an answer.
        if len(end) == 1 or (end and end[-1] in tokenizer.special_ids.values()):
            ends.append(end[-1])
    return list(dict.fromkeys(ends))


def _write_configuration(
    record: RunRecord, output: Path, dtype: torch.dtype, ends: list[int]
) -> None:
    separator = record.data.separator_id
    # A document starts where another has ended.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator)
    module = MODELLING_FILE.removesuffix(".py")
    write_json(
        output / "config.json",
        {
            "model_type": "ten",
            "architectures": ["TenForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{module}.TenConfig",
                "AutoModel": f"{module}.TenModel",
                "AutoModelForCausalLM": f"{module}.TenForCausalLM",
            },
            **exported_config(record.model),
            "tie_word_embeddings": True,
            "dtype": _DTYPES[dtype],
            **tokens,
        },
    )
    # A list where a turn of a conversation ends otherwise than a document.
    generation = {**tokens, "eos_token_id": ends if len(ends) > 1 else separator}
    write_json(output / "generation_config.json", generation)
