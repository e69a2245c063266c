"""What must hold for each value by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# None is checked by its type. Read each row left to right: bound, test, keys.
BOUNDS: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "at least 1",
        lambda x: x >= 1,
        "parallel.tp parallel.pp parallel.vpp parallel.cp parallel.ep parallel.etp parallel.dp "
        "parallel.first_stage_layers parallel.last_stage_layers "
        "schedule.steps schedule.global_batch_size schedule.micro_batch_size schedule.decay_steps "
        "schedule.eval_batches logging.interval runtime.ranks runtime.threads runtime.recompute_layers "
        "optimizer.muon_steps optimizer.lisa_layers optimizer.lisa_interval "
        "optimizer.galore_rank optimizer.galore_interval adapter.rank",
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        "optimizer.weight_decay optimizer.clip_grad schedule.min_learning_rate schedule.warmup_steps "
        "adapter.first_tokens adapter.last_tokens "
        "schedule.eval_interval checkpoint.interval checkpoint.keep runtime.offload_layers runtime.loss_chunk "
        "model.mtp_loss_scale moe.aux_loss_coeff moe.z_loss_coeff moe.expert_bias_update_rate "
        "objective.gamma objective.sft_weight objective.centering "
        "objective.desirable_weight objective.undesirable_weight",
    ),
    ("at least 2", lambda x: x >= 2, "data.sequence_length objective.top_k"),
    ("greater than 0, at most 1", lambda x: 0 < x <= 1, "objective.distill_weight"),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "optimizer.offload_fraction objective.ld_alpha"),
    ("at least 0 and less than 0.5", lambda x: 0 <= x < 0.5, "objective.label_smoothing"),
    ("loss weights greater than 0", lambda x: all(weight > 0 for weight in x.values()), "objective.losses"),
    (
        "greater than 0",
        lambda x: x > 0,
        "optimizer.galore_scale "
        "adapter.alpha adapter.learning_rate_ratio moe.capacity_factor optimizer.muon_extra_scale optimizer.eps "
        "schedule.epochs schedule.learning_rate objective.beta objective.f_alpha objective.discopop_tau "
        "objective.temperature",
    ),
    (
        "at least 0 and less than 1",
        lambda x: 0 <= x < 1,
        "data.validation_split optimizer.beta1 optimizer.beta2 optimizer.muon_momentum adapter.dropout",
    ),
    ("between 0 and 2147483647", lambda x: 0 <= x < 2**31, "runtime.seed"),
    ("steps counted from 1", lambda x: min(x, default=1) >= 1, "runtime.profile_steps schedule.skip_steps"),
    (
        "a path, not an empty text",
        bool,
        "model.path model.tokenizer data.chat_template data.cache_dir checkpoint.dir adapter.path "
        "objective.reference_path objective.teacher",
    ),
]
