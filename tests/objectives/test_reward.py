"""Reward models: loss, metrics and gradients as TRL 1.16.0's RewardTrainer has them, at any layout; folders that
transformers and PEFT open, with our scores."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_swift.cli import main
from mcore_swift.models.stages import pipeline_layout
from mcore_swift.parallel import resolve
from mcore_swift.recipe import AdapterSection, ObjectiveSection, ParallelSection, Recipe
from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (fixtures)
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import hf_copies, merge, open_model, recipe_for
from tests.objectives import trl_oracle
from tests.objectives.here import Found, compute
from tests.objectives.test_against_trl import assert_as_trl
from tests.objectives.test_layouts import EXPERTS, FORMS, LAYOUTS, LEFT_OUT, assert_same
from tests.objectives.test_runs import LORA, write
from tests.peft.test_lora import ALL, peft_folder
from tests.test_bad_runs import good_model, place, train  # noqa: F401  (fixtures)

ONE = ParallelSection()
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rm": ({}, {}),
    "centering": ({"centering": 0.05}, {"center_rewards_coefficient": 0.05}),
}
SECTIONS = {case: ObjectiveSection(name="rm", **own) for case, (own, _) in CASES.items()}


def scored(model: Path) -> Path:
    """The folder of a reward model with the decoder of a language model's, written by transformers."""
    folder = model.parent / f"{model.name}-scored"
    if not folder.exists():
        run_ranks(_write_scored, 1, model, folder)
    return folder


def _write_scored(model: Path, folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    opened: Any = AutoModelForSequenceClassification
    found = opened.from_pretrained(model, dtype=torch.float32, num_labels=1)
    with torch.no_grad():
        found.score.weight.copy_(
            0.2 * torch.randn(found.score.weight.shape, generator=torch.Generator().manual_seed(3))
        )
    found.config.pad_token_id = 0
    found.save_pretrained(folder)


def with_all_rewards(metrics: dict[str, float]) -> dict[str, float]:
    """TRL's metrics are those of all answers together."""
    return metrics | {
        "min_reward": min(metrics["reward_chosen_min"], metrics["reward_rejected_min"]),
        "mean_reward": (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2,
        "max_reward": max(metrics["reward_chosen_max"], metrics["reward_rejected_max"]),
    }


@functools.cache
def trl(folder: Path, margins: bool) -> dict[str, trl_oracle.Result]:
    cases = {case: theirs for case, (_, theirs) in CASES.items()}
    return run_ranks(trl_oracle.rm, 1, folder, margins, cases, timeout=300)[0]


@pytest.mark.slow
@pytest.mark.parametrize("margins", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["margins", "plain"])
def test_as_trl(models: Any, margins: bool) -> None:
    folder = scored(models("qwen3"))
    found = compute(folder, ONE, SECTIONS, margins=margins)
    for case, expected in trl(folder, margins).items():
        one = found[case]
        one = replace(one, metrics=with_all_rewards(one.metrics), evaluated=with_all_rewards(one.evaluated))
        assert_as_trl(one, expected, case)
    assert found["rm"].loss != found["centering"].loss


@functools.cache
def at_layout(folder: Path, layout: str, packing: bool) -> dict[str, Found]:
    section = (LAYOUTS | EXPERTS | {"one rank": ONE})[layout]
    return compute(folder, section, {"centering": SECTIONS["centering"]}, packing=packing, margins=True)


SLOW = {("TP2+SP", True), ("CP2xPP2", False), ("PP2xVPP2", True)}


def marked(layout: str, packing: bool) -> Any:
    marks = pytest.mark.slow if (layout, packing) in SLOW else pytest.mark.nightly
    return pytest.param(layout, packing, marks=marks, id=f"{layout}-{'packed' if packing else 'rows'}")


@pytest.mark.parametrize(("layout", "packing"), [marked(*form) for form in FORMS if form not in LEFT_OUT])
def test_layout(models: Any, layout: str, packing: bool) -> None:
    folder = scored(models("qwen3"))
    assert_same(at_layout(folder, layout, packing), at_layout(folder, "one rank", True))


@pytest.mark.nightly
@pytest.mark.parametrize("layout", EXPERTS)
def test_experts(models: Any, layout: str) -> None:
    folder = scored(models("qwen3-moe"))
    assert_same(at_layout(folder, layout, True), at_layout(folder, "one rank", True))


def tokens_of_other_ranks_missing(patch: pytest.MonkeyPatch) -> None:
    """Under sequence parallelism each rank's gradient of the score stays its own."""
    from mcore_swift.models.score_head import ScoreHead

    right = ScoreHead.__init__

    def wrong(self: Any, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    patch.setattr(ScoreHead, "__init__", wrong)


def read_one_token_early(patch: pytest.MonkeyPatch) -> None:
    from tests.objectives import rows

    right = rows.collate_judged

    def wrong(*args: Any, **kwargs: Any) -> Any:
        batch = right(*args, **kwargs)
        sequences = batch.sequences
        assert sequences is not None
        index = sequences.index.roll(-1, dims=1)
        return replace(batch, loss_mask=(index >= 0).float(), sequences=replace(sequences, index=index))

    patch.setattr(rows, "collate_judged", wrong)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("plant", "layout"), [(tokens_of_other_ranks_missing, "TP2+SP"), (read_one_token_early, "one rank")]
)
def test_a_planted_fault_is_found(models: Any, monkeypatch: pytest.MonkeyPatch, plant: Any, layout: str) -> None:
    folder = scored(models("qwen3"))
    right = at_layout(folder, "one rank", True)
    prepared()
    plant(monkeypatch)
    section = (LAYOUTS | {"one rank": ONE})[layout]
    found = compute(folder, section, {"centering": SECTIONS["centering"]}, margins=True)
    with pytest.raises(AssertionError):
        assert_same(found, right)


# --- the score --------------------------------------------------------------------------------------------------------


def _parameters(recipe: Recipe) -> dict[str, torch.Tensor]:
    return dict(hf_copies(open_model(recipe), lambda parameter: parameter.data))


def begun(folder: Path, layout: ParallelSection, world_size: int) -> dict[str, torch.Tensor]:
    recipe = replace(recipe_for(folder, layout), objective=ObjectiveSection(name="rm"))
    return merge(run_ranks(_parameters, world_size, recipe))


def test_a_score_begins_as_transformers_begins_it(models: Any) -> None:
    """Beside the decoder of a language model, whose embedding is its output layer, too; the same at any layout."""
    folder = models("qwen2-tied")
    found = begun(folder, ParallelSection(tp=2, pp=2), 4)
    language_model = load_file(folder / "model.safetensors")
    score = found.pop("score.weight")
    assert found.keys() == language_model.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, language_model[name]) for name, tensor in found.items())
    assert torch.equal(score, begun(folder, ParallelSection(), 1)["score.weight"])
    width = json.loads((folder / "config.json").read_text())["initializer_range"]
    assert score.shape[0] == 1 and score.std().item() == pytest.approx(width, rel=0.3)
    assert abs(score.mean().item()) < width / 2


# --- through the command ----------------------------------------------------------------------------------------------


def run(place: Path, *more: str) -> list[dict[str, Any]]:  # noqa: F811
    """metrics.jsonl of a run of two steps and an evaluation."""
    file = write(place, judged=False)
    data = ("--data.train", file, "--data.validation", file, "--data.sequence_length", "160")
    code, errors = train(place, "--objective.name", "rm", "--schedule.eval_interval", "1", *data, *more)
    assert code == 0, errors
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


def scores(place: Path, model: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: F811
    """What transformers gives for the rows: chosen and rejected, in one padded batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        for side in ("chosen", "rejected")
        for row in rows
    ]
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
    return found[: len(rows)], found[len(rows) :]


def _opened(place: Path) -> dict[str, float]:  # noqa: F811
    """The evaluation's metrics by transformers from the run's folder; and the largest difference of PEFT's scores."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    opened: Any = AutoModelForSequenceClassification
    model = opened.from_pretrained(place / "run" / "hf", dtype=torch.float32).eval()
    assert (model.config.num_labels, model.config.pad_token_id, type(model).__name__) == (
        1,
        0,
        "Qwen2ForSequenceClassification",
    )
    chosen, rejected = scores(place, model)
    found = {
        "eval_reward_chosen": chosen.mean(),
        "eval_reward_rejected": rejected.mean(),
        "eval_reward_chosen_min": chosen.min(),
        "eval_reward_rejected_max": rejected.max(),
        "eval_accuracy": (chosen > rejected).float().mean(),
        "eval_loss": -torch.nn.functional.logsigmoid(chosen - rejected).mean(),
    }
    if (place / "run" / "adapter").exists():
        base = opened.from_pretrained(place / "model", dtype=torch.float32, num_labels=1, pad_token_id=0)
        through_peft = scores(place, PeftModel.from_pretrained(base, str(place / "run" / "adapter")).eval())
        found["peft"] = (torch.cat(through_peft) - torch.cat([chosen, rejected])).abs().max()
    return {name: float(value) for name, value in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_what_a_run_writes_gives_our_scores(place: Path, how: str) -> None:  # noqa: F811
    """From a language model; packed here, in padded rows there; the template's text behind the answer counts."""
    keys = LORA if how == "lora" else ("--parallel.tp", "2", "--parallel.pp", "2", "--schedule.learning_rate", "1e-2")
    first, *_, last = run(place, *keys, "--schedule.learning_rate", "3e-2")
    assert first["loss_tokens"] > 0 and abs(last["eval_margin"]) > 1e-4
    (found,) = run_ranks(_opened, 1, place)
    if how == "lora":
        assert found.pop("peft") < 1e-5
        config = json.loads((place / "run" / "adapter" / "adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    for name, value in found.items():
        assert last[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_resumed_run_is_the_same_bit_for_bit(place: Path, how: str) -> None:  # noqa: F811
    keys = (*(LORA if how == "lora" else ()), "--parallel.pp", "2")
    whole = run(place, *keys)
    exported = load_file(place / "run" / "hf" / "model.safetensors")
    shutil.rmtree(place / "run" / "checkpoints" / "step-00000002")
    resumed = run(place, *keys)
    kept = ("loss", "grad_norm", "reward_chosen", "reward_rejected_max", "eval_loss", "eval_reward_chosen_min")
    assert [{k: row.get(k) for k in kept} for row in resumed] == [{k: row.get(k) for k in kept} for row in whole]
    again = load_file(place / "run" / "hf" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items()) and "score.weight" in again


@pytest.mark.nightly
def test_a_reward_model_goes_on_as_one_only(place: Path) -> None:  # noqa: F811
    run(place, "--schedule.learning_rate", "3e-2")
    shutil.rmtree(place / "model")
    shutil.move(place / "run" / "hf", place / "model")
    code, errors = train(place, "--checkpoint.resume", "never", "--checkpoint.overwrite", "true")
    assert code == 2 and "Qwen2ForSequenceClassification, which gives a text a score" in errors, errors
    evaluated = run(place, "--checkpoint.resume", "never", "--checkpoint.overwrite", "true")[0]
    assert evaluated["reward_chosen"] != 0


@pytest.mark.nightly
def test_from_a_megatron_checkpoint_of_a_language_model(place: Path) -> None:  # noqa: F811
    """Its output layer is left out; the score begins with the same numbers."""
    from ckpt_tools.convert import convert

    first = run(place)[0]
    convert(place / "model", place / "megatron")
    keys = ("--checkpoint.resume", "never", "--checkpoint.overwrite", "true", "--model.path", str(place / "megatron"))
    assert run(place, *keys)[0]["loss"] == first["loss"]


# --- adapters, conversion, planning -----------------------------------------------------------------------------------


def with_score(model: Path) -> AdapterSection:
    """LoRA with a score, as PEFT's folder has them."""
    folder = model.parent / "adapter-scored"
    if not folder.exists():
        shutil.copytree(peft_folder(model, model.parent / "adapter-plain", "lora", ALL), folder)
        weights = load_file(folder / "adapter_model.safetensors")
        weights["base_model.model.score.weight"] = load_file(scored(model) / "model.safetensors")["score.weight"]
        save_file(weights, folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    return AdapterSection(name="lora", path=str(folder))


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "PP2xVPP2", "CP2", "DP2", "TP2xPP2"])
def test_adapters_at_a_layout(models: Any, layout: str) -> None:
    """The gradients of A and B, and of the score."""
    model = models("qwen3")
    one, found = (
        compute(model, section, {"rm": SECTIONS["centering"]}, adapter=with_score(model), margins=True)
        for section in (ONE, LAYOUTS[layout])
    )
    assert "score.weight" in one["rm"].gradients
    assert_same(found, one)


@pytest.mark.nightly
def test_there_and_back(models: Any, tmp_path: Path) -> None:
    from ckpt_tools.convert import convert

    folder = scored(models("qwen3-moe"))
    convert(folder, tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert main(["verify", str(folder), str(tmp_path / "megatron")]) == 0


RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def test_the_plan_counts_the_score(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2.5-7B's is one row in place of 152,064, and is trained beside the adapters."""

    def plan(name: str) -> dict[str, Any]:
        assert main(["plan", str(RECIPES / f"qwen2.5_7b_{name}.yaml"), "--gpus", "8", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    dpo, rm = plan("dpo"), plan("rm")
    assert dpo["parameters"] - rm["parameters"] == (152_064 - 1) * 3584
    (pairs,), (own,) = ([stage["bytes"] for stage in found["stages"]] for found in (dpo, rm))
    assert own["gradients"] - pairs["gradients"] == 4 * 3584


@pytest.mark.nightly
def test_built_ranks_hold_what_is_planned(models: Any) -> None:
    from mcore_swift.models.build import read_source
    from perf import fake_world

    plan = resolve(ParallelSection(tp=2, pp=2), world_size=None)
    source = read_source(models("qwen2-tied"), as_scored=True)
    chunks, platform = pipeline_layout(source, plan), prepared()
    built = fake_world.build(source, plan, platform, range(4))
    for check in fake_world.checks(source, plan, chunks, built, layers=platform.layers):
        assert check.holds, check
