"""Model, optimizer and DeepSpeed put together."""

from __future__ import annotations

import random
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import set_z3_leaf_modules

from ten_dist.config.training import OptimizerOptions
from ten_dist.deepspeed_config import offloads, zero_stage
from ten_dist.engine.deepspeed_internals import import_muon
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.muon_ranks import distribute
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.model import TemporalEigenstateNetwork
from ten_dist.model.block import Block
from ten_dist.model.precision import autocast
from ten_dist.optimizer.muon import RATE_FACTOR, Muon


def build_engine(
    run: ResolvedRun, deepspeed_config: dict[str, Any], ranks: Ranks
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around the network with its initial weights.

    The network is sharded from the start at ZeRO stage 3, and computes as `--precision`
    says.

    Args:
        run: of which model, seed and training options count.
        deepspeed_config: for `deepspeed.initialize`.
        ranks: of the run.
    """
    training = run.training
    random.seed(training.seed)
    np.random.seed(training.seed % 2**32)
    torch.manual_seed(training.seed)
    sharded = zero_stage(deepspeed_config) == 3
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config, enabled=sharded):
        model = TemporalEigenstateNetwork(run.model_config)
    # Around the model and not around the engine, which on GPUs switches off an autocast
    # that its configuration does not name.
    forward = autocast(ranks.device, training.precision)(model.forward)
    model.forward = forward  # type: ignore[method-assign]
    if training.compile:
        _compile_blocks(model, sharded)
    optimizer = _make_optimizer(model, training, deepspeed_config, ranks.device)
    import_muon()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config
    )
    if isinstance(optimizer, Muon):
        distribute(optimizer, engine, ranks, training.precision)
    return engine


def _compile_blocks(model: TemporalEigenstateNetwork, sharded: bool) -> None:
    """Have torch compile the forward of every block, each as one graph.

    Alike blocks share a graph. A second batch size makes it one for all sizes, so that
    validation costs few compilations. Only the function is replaced: hooks of the module
    stay outside of the graph, and names of parameters do not change.
    """
    if sharded:
        # Their parameters are then gathered together, before the graph runs: a gathering
        # inside of it would break it into pieces.
        set_z3_leaf_modules(model, [Block])
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)


def _make_optimizer(
    model: TemporalEigenstateNetwork,
    options: OptimizerOptions,
    deepspeed_config: dict[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices with weight decay, everything else without; or Muon
    for the matrices of the blocks, with AdamW for everything else.

    Recurrence parameters, norms and biases take no decay (docs/model.md#scan). The learning rate
    is set at every step by the trainer, for Muon's matrices times :data:`RATE_FACTOR`.
    """
    rate, peak_of_muon = options.peak_of_adamw, options.peak_of_muon
    groups = model.parameter_groups(options.weight_decay, peak_of_muon is not None)
    matrices = groups.pop(0) if peak_of_muon is not None else None
    betas = (options.adam_beta1, options.adam_beta2)
    adamw: torch.optim.Optimizer
    if device.type == "cuda" and offloads(deepspeed_config, "offload_optimizer"):
        adamw = DeepSpeedCPUAdam(groups, lr=rate, betas=betas, adamw_mode=True)
    else:
        # One pass over each tensor, without copies of it on the way, on CPUs as well.
        adamw = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    if matrices is None or peak_of_muon is None:
        return adamw
    matrices |= {"lr": peak_of_muon, "momentum": options.momentum_of_muon}
    return Muon({**matrices, RATE_FACTOR: peak_of_muon / rate}, adamw)
