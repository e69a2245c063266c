"""The surface that scripts and recipes depend on: a verb, option or key that comes or goes is a decision made here."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import get_type_hints

from mcore_swift.cli import build_parser
from mcore_swift.recipe import Recipe, SourceSection

VERBS = {
    "train": "RECIPE --print-recipe --help-recipe",
    "plan": "RECIPE --gpus --ranks --build --explain --json",
    "generate": "MODEL --prompt --adapter --max-new-tokens --temperature --top-p --seed --raw --tp --pp --device",
    "convert": "SRC DST --dtype --workers --max-shard-size --dry-run --config --strict --optimizer --download",
    "verify": "A B --any-dtype --max-ulp --config --logits --text --windows --window-length --max-difference "
    "--min-top1 --max-kl --json",
    "inspect": "PATH --json --check",
    "merge": "BASE ADAPTER DST --dtype",
    "launch slurm": "RECIPE --nodes --gpus-per-node --fast-domain --run --spares --time --no-requeue --array --sweep "
    "--dependency --name --site --max-restarts --step-timeout --bad-steps --no-preflight --here --dry-run",
    "launch kubernetes": "RECIPE --print --kind --nodes --gpus-per-node --fast-domain --spares --node-selector "
    "--host-network --rdma --image --python --claim --mount --run --shared-memory --name --namespace --queue --site "
    "--max-restarts --step-timeout --bad-steps",
    "launch local": "RECIPE --max-restarts --step-timeout --bad-steps",
    "launch ssh": "HOSTFILE --ranks-per-node --spares --address --ssh RECIPE --max-restarts --step-timeout --bad-steps",
    "launch status": "RUN --json",
    "data validate": "FILE --format --tokenizer --sequence-length",
    "data prepare": "FILE --output --tokenizer --workers --no-eod",
}

KEYS = {
    "model": "path init overrides tokenizer mtp_loss_scale trainable freeze",
    "data": "train validation validation_split format packing sequence_length too_long truncate equal_pairs "
    "share_prompts shuffle streaming cache_dir chat_template adapter_field",
    "parallel": "tp pp vpp cp cp_comm_type hierarchical_cp ep etp dp sequence_parallel pipeline_layout "
    "first_stage_layers last_stage_layers account_embedding account_loss",
    "objective": "name loss losses beta gamma label_smoothing sft_weight f_divergence f_alpha ld_alpha discopop_tau "
    "alphapo desirable_weight undesirable_weight dft centering reference reference_path teacher temperature top_k "
    "distill_weight",
    "adapter": "name path targets rank alpha dropout rslora dora share_a modules_to_save init quantization "
    "double_quantization several learning_rate_ratio activation layers first_tokens last_tokens merge",
    "optimizer": "name weight_decay beta1 beta2 eps clip_grad distributed fsdp main_params exp_avg_dtype "
    "exp_avg_sq_dtype offload_fraction galore_rank galore_interval galore_scale galore_targets lisa_layers "
    "lisa_interval muon_momentum muon_nesterov muon_steps "
    "muon_coefficients muon_scale muon_extra_scale muon_precision",
    "schedule": "steps epochs global_batch_size micro_batch_size learning_rate min_learning_rate warmup_steps decay "
    "decay_steps skip_steps eval_interval eval_batches",
    "precision": "dtype fp8 fp8_format fp8_param_gather",
    "moe": "aux_loss aux_loss_coeff z_loss_coeff expert_bias_update_rate router_dtype capacity_factor drop_policy "
    "pad_to_capacity dispatcher grouped router_fusion permute_fusion shared_expert_overlap",
    "checkpoint": "dir interval final keep asynchronous optimizer resume export overwrite",
    "logging": "interval tensorboard wandb_project wandb_name",
    "runtime": "device ranks seed threads recompute recompute_modules recompute_method recompute_layers "
    "loss_chunk offload_layers offload_modules overlap tp_overlap ep_overlap delay_wgrad profile_steps",
}


def surface(parser: argparse.ArgumentParser, verb: str = "") -> dict[str, str]:
    """Each verb's words, without -h."""
    verbs: dict[str, str] = {}
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                verbs |= surface(inner, f"{verb} {name}".strip())
        elif "--help" not in action.option_strings:
            words += action.option_strings or [str(action.metavar)]
    return verbs or {verb: " ".join(words)}


def test_verbs_and_options() -> None:
    assert surface(build_parser()) == VERBS


def test_recipe_keys() -> None:
    hints = get_type_hints(Recipe)
    found = {section.name: [field.name for field in fields(hints[section.name])] for section in fields(Recipe)}
    assert found == {section: keys.split() for section, keys in KEYS.items()}
    assert [field.name for field in fields(SourceSection)] == ["path", "weight"]
