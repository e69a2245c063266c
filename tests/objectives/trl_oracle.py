"""What TRL 1.16.0 computes for the rows of `rows.py`: its trainers' own loss, metrics and gradients, on the CPU.

The trainers are built on a tokenizer of words and a data set of one row, which their constructors insist on, and are
then handed the test's token ids through their own collators. Runs in a forked process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.objectives.rows import MARGINS, answers

NAMES = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
    "nll_loss": "nll",
    "log_odds_chosen": "log_odds",
    "kl": "kl",
    "accuracy": "accuracy",
    "margin": "margin",
    "min_reward": "min_reward",
    "mean_reward": "mean_reward",
    "max_reward": "max_reward",
}
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "per_device_train_batch_size": 9,
    "max_length": 64,
}


@dataclass(frozen=True)
class Result:
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]


def alone() -> None:
    """Takes the harness' rank variables away: accelerate would join its job."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w1")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def result(loss: torch.Tensor, metrics: Mapping[str, Any], model: Any) -> Result:
    found = {NAMES[name]: _last(value) for name, value in metrics.items() if name in NAMES}
    return Result(float(loss), found, gradients(model))


def _last(value: Any) -> float:
    return float(value[-1] if isinstance(value, list) else value)


def dpo(folder: Path, reference: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """trl.DPOTrainer with each case's DPOConfig; all parameters are trained, the reference is a model of its own."""
    alone()
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    model, other = load(folder), load(reference)
    size = model.config.vocab_size
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in answers(size)]
    found = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as place:
            trainer: Any = DPOTrainer(
                model=model,
                ref_model=other,
                args=DPOConfig(output_dir=place, **ARGUMENTS, **case),
                train_dataset=Dataset.from_list([{"prompt": "w2 w3", "chosen": "w4", "rejected": "w5"}]),
                processing_class=tokenizer(size),
            )
            model.train().zero_grad()
            loss = trainer.compute_loss(model, trainer.data_collator(rows))
            loss.backward()
            found[name] = result(loss, trainer._metrics["train"], model)
    return found


def dpo_adapter(folder: Path, adapter: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """trl.DPOTrainer training LoRA matrices read from `adapter`; the reference is the model with them switched off."""
    alone()
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import load_file
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    weights = load_file(adapter / "adapter_model.safetensors")
    settings: Any = LoraConfig.from_pretrained(str(adapter))
    settings.inference_mode = False
    size = load(folder).config.vocab_size
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in answers(size)]
    found = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as place:
            # A new adapter, filled in afterwards: for one that is there already TRL takes a copy of it as reference.
            trainer: Any = DPOTrainer(
                model=load(folder),
                args=DPOConfig(output_dir=place, **ARGUMENTS, **case),
                train_dataset=Dataset.from_list([{"prompt": "w2 w3", "chosen": "w4", "rejected": "w5"}]),
                processing_class=tokenizer(size),
                peft_config=settings,
            )
            with torch.no_grad():
                for key, parameter in trainer.model.named_parameters():
                    if key.replace(".default", "") in weights:
                        parameter.copy_(weights[key.replace(".default", "")])
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
            loss.backward()
            one = result(loss, trainer._metrics["train"], trainer.model)
            plain = {
                key.removeprefix("base_model.model.").replace(".default", ""): g for key, g in one.gradients.items()
            }
            found[name] = Result(one.loss, one.metrics, plain)
    return found


def kto(folder: Path, reference: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """trl.KTOTrainer with each case's KTOConfig, all rows in one batch, as the divergence is estimated."""
    alone()
    from datasets import Dataset
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    model, other = load(folder), load(reference)
    size = model.config.vocab_size
    rows = []
    for row, (prompt, chosen, rejected) in enumerate(answers(size)):
        rows.append({"prompt_ids": prompt, "completion_ids": (chosen, rejected)[row % 2], "label": row % 2 == 0})
    found = {}
    for name, case in cases.items():
        shifted = rows
        if case.get("loss_type", "kto") == "kto":
            shifted = [row | {"KL_completion_ids": rows[i - 1]["completion_ids"]} for i, row in enumerate(rows)]
        with tempfile.TemporaryDirectory() as place:
            dummy = [{"prompt": "w2 w3", "completion": "w4", "label": label} for label in (True, False)]
            trainer: Any = KTOTrainer(
                model=model,
                ref_model=other,
                args=KTOConfig(output_dir=place, **ARGUMENTS, **case),
                train_dataset=Dataset.from_list(dummy),
                processing_class=tokenizer(size),
            )
            model.train().zero_grad()
            loss = trainer.compute_loss(model, trainer.data_collator(shifted))
            loss.backward()
            metrics = dict(trainer._metrics["train"])
            if case.get("loss_type", "kto") != "kto":
                metrics.pop("kl")
            found[name] = result(loss, metrics, model)
    return found


def rm(folder: Path, margins: bool, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """trl.RewardTrainer with each case's RewardConfig; all parameters are trained."""
    alone()
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    opened: Any = AutoModelForSequenceClassification
    model = opened.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    size = model.config.vocab_size
    rows: list[dict[str, Any]] = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in answers(size)]
    if margins:
        rows = [row | {"margin": margin} for row, margin in zip(rows, MARGINS, strict=True)]
    found = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as place:
            trainer: Any = RewardTrainer(
                model=model,
                args=RewardConfig(output_dir=place, **ARGUMENTS, **case),
                train_dataset=Dataset.from_list([{"chosen": "w2 w3 w4", "rejected": "w2 w3 w5"}]),
                processing_class=tokenizer(size),
            )
            model.train().zero_grad()
            loss = trainer.compute_loss(model, trainer.data_collator(rows))
            loss.backward()
            found[name] = result(loss, trainer._metrics["train"], model)
    return found


def cpo(folder: Path, reference: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """trl.experimental.cpo.CPOTrainer: CPO and SimPO. TRL's simpo sets cpo_alpha itself unless it is given."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return _without_reference(CPOTrainer, CPOConfig, folder, cases, one_token_prompts=0)


def orpo(folder: Path, reference: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """trl.experimental.orpo.ORPOTrainer. Its likelihood term takes prompts in, so here they are one token long."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return _without_reference(ORPOTrainer, ORPOConfig, folder, cases, one_token_prompts=1)


def _without_reference(
    trainer_class: Any,
    config_class: Any,
    folder: Path,
    cases: Mapping[str, Mapping[str, Any]],
    *,
    one_token_prompts: int,
) -> dict[str, Result]:
    alone()
    from datasets import Dataset

    model = load(folder)
    size = model.config.vocab_size
    batch: dict[str, torch.Tensor] = {}
    for side, name in ((1, "chosen"), (2, "rejected")):
        rows = [(row[0][-one_token_prompts:], row[side]) for row in answers(size)]
        batch[f"{name}_input_ids"] = _padded([p + a for p, a in rows], 0)
        batch[f"{name}_labels"] = _padded([[-100] * len(p) + a for p, a in rows], -100)
        batch[f"{name}_attention_mask"] = _padded([[1] * len(p + a) for p, a in rows], 0)
    found = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as place:
            trainer: Any = trainer_class(
                model=model,
                args=config_class(output_dir=place, remove_unused_columns=False, **ARGUMENTS, **case),
                train_dataset=Dataset.from_list([{"prompt": "w2 w3", "chosen": "w4", "rejected": "w5"}]),
                processing_class=tokenizer(size),
            )
            model.train().zero_grad()
            loss, metrics = trainer.get_batch_loss_metrics(model, batch)
            loss.backward()
            # Means of logps over an answer's labels here, where TRL's loss is one of means: a name for two things.
            metrics = {key: value for key, value in metrics.items() if not key.startswith("logps/")}
            if metrics["nll_loss"] == 0:
                metrics.pop("nll_loss")  # not computed
            found[name] = result(loss, metrics, model)
    return found


def _padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
