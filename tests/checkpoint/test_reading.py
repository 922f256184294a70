"""Slices that any number of writers wrote are read as whole tensors."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ten_dist.checkpoint import (
    EXP_AVG,
    MOMENTS,
    WEIGHT,
    CheckpointReader,
    CheckpointRecord,
    RunState,
    TensorSlice,
    checksum_damage,
    damage,
    read_record,
    write_tensors,
)
from ten_dist.checkpoint.layout import (
    tensor_file_name,
)
from ten_dist.errors import ConfigurationError

SHAPES = st.lists(
    st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=4
)


def values_of(kind, shapes):
    generator = torch.Generator().manual_seed(len(kind))
    return {
        name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


def write_checkpoint(folder, shapes, cuts, writers):
    """A checkpoint whose tensors are cut at random places, the slices dealt out."""
    folder.mkdir(parents=True)
    tensors = {kind: values_of(kind, shapes) for kind in (WEIGHT, *MOMENTS)}
    slices = [[] for _ in range(writers)]
    for number, (name, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        edges = sorted({0, size, *(cut % size for cut in cuts)})
        for at, (start, stop) in enumerate(itertools.pairwise(edges)):
            slices[(number + at) % writers].append(TensorSlice(name, start, stop))
    files = {}
    for writer, held in enumerate(slices):
        for kinds in ((WEIGHT,), MOMENTS):
            flat = {
                piece.key(kind): tensors[kind][piece.name].view(-1)[
                    piece.start : piece.stop
                ]
                for kind in kinds
                for piece in held
            }
            file = tensor_file_name(kinds[0], writer, writers)
            files[file] = write_tensors(
                folder / file,
                {key: value.shape for key, value in flat.items()},
                torch.float32,
                flat.__getitem__,
            )
    index = {
        "writers": writers,
        "tensors": {
            name: {
                "shape": shape,
                "slices": [
                    [piece.start, piece.stop, writer]
                    for writer, held in enumerate(slices)
                    for piece in held
                    if piece.name == name
                ],
            }
            for name, shape in shapes.items()
        },
    }
    (folder / "index.json").write_text(json.dumps(index))
    record = CheckpointRecord(
        state=RunState(),
        optimizer_steps=0,
        probe_loss=0.0,
        state_identity={},
        precision="fp32",
        world_size=writers,
        zero_stage=2,
        files=files,
    )
    (folder / "checkpoint.json").write_text(json.dumps(record.to_dict()))
    return tensors


def test_a_record_with_a_flipped_bit_is_damaged(tmp_path):
    """Also where the flip leaves it JSON, in a name or a value."""
    record = CheckpointRecord(
        state=RunState(),
        optimizer_steps=0,
        probe_loss=0.5,
        state_identity={"global_batch_size": 8},
        precision="fp32",
        world_size=1,
        zero_stage=2,
    )
    text = json.dumps(record.to_dict())
    (tmp_path / "checkpoint.json").write_text(text)
    assert read_record(tmp_path) == record
    for old, new in (("global_batch", "glob`l_batch"), ('size": 8', 'size": 9')):
        assert old in text
        (tmp_path / "checkpoint.json").write_text(text.replace(old, new))
        assert "does not have the checksum" in damage(tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    shapes=SHAPES,
    cuts=st.lists(st.integers(0, 400), max_size=6),
    writers=st.integers(1, 5),
    ends=st.tuples(st.integers(0, 400), st.integers(0, 400)),
)
def test_any_range_of_any_cutting(tmp_path_factory, shapes, cuts, writers, ends):
    folder = tmp_path_factory.mktemp("any") / "step_00000001"
    shapes = {f"layer.{n}": shape for n, shape in enumerate(shapes)}
    tensors = write_checkpoint(folder, shapes, cuts, writers)
    assert damage(folder) is None and checksum_damage(folder) is None
    with CheckpointReader(folder) as reader:
        for kind, of_kind in tensors.items():
            for name, values in of_kind.items():
                assert torch.equal(reader.tensor(kind, name), values)
                start, stop = sorted(end % (values.numel() + 1) for end in ends)
                part = reader.read(kind, name, start, stop)
                assert torch.equal(part, values.view(-1)[start:stop])


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step_00000001"
    write_checkpoint(folder, {"a": [4, 3], "b": [5]}, [2, 7], 2)
    return folder


def test_one_file_for_others_to_use(checkpoint, tmp_path):
    with CheckpointReader(checkpoint) as reader:
        reader.export(tmp_path / "model.safetensors")
        reader.export(tmp_path / "half.safetensors", torch.bfloat16)
        weights = load_file(tmp_path / "model.safetensors")
        halves = load_file(tmp_path / "half.safetensors")
        assert weights.keys() == halves.keys() == {"a", "b"}
        for name, values in weights.items():
            assert torch.equal(values, reader.tensor(WEIGHT, name))
            assert torch.equal(halves[name], values.bfloat16())


def test_every_changed_byte_is_found(checkpoint):
    file = checkpoint / tensor_file_name(EXP_AVG, 1, 2)
    whole = file.read_bytes()
    for at in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[at] ^= 16
        file.write_bytes(changed)
        assert str(file) in checksum_damage(checkpoint), at
        # One of two ranks finds it.
        parts = [checksum_damage(checkpoint, part, 2) for part in range(2)]
        assert sum(part is not None for part in parts) == 1
    file.write_bytes(whole)
    assert checksum_damage(checkpoint) is None


def test_a_slice_that_nobody_wrote(checkpoint):
    index = json.loads((checkpoint / "index.json").read_text())
    slices = index["tensors"]["a"]["slices"]
    index["tensors"]["a"]["slices"] = [s for s in slices if s[0] != 2]
    (checkpoint / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="elements 2 to 7 of a are missing"):
        CheckpointReader(checkpoint)
