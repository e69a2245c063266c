"""`mcore-swift plan`: known models' numbers, real modules against the formula and the model, and what is refused."""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mcore_swift.cli import main
from mcore_swift.models.build import ModelSource, read_source
from mcore_swift.models.keys import global_shapes
from mcore_swift.models.stages import pipeline_layout
from mcore_swift.parallel import ParallelPlan, resolve
from mcore_swift.recipe import ParallelSection, Recipe
from perf import fake_world
from perf.fake_world import BuiltRank, Check, Part
from perf.parameters import EXPERTS
from tests.distributed.harness import prepared
from tests.distributed.tiny_models import tiny_config

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
QWEN_72B = RECIPES / "qwen2.5_72b_1024gpus.yaml"
QWEN_235B = RECIPES / "qwen3_235b_a22b_1024gpus.yaml"
DEEPSEEK = RECIPES / "deepseek_v3_2048gpus.yaml"


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- by formula -------------------------------------------------------------------------------------------------------


def test_qwen_72b_on_1024_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(QWEN_72B), "--gpus", "1024")
    assert found["parameters"] == 72_706_203_648  # what the Hugging Face folder's index says, halved
    assert found["layout"]["dp"] == 32 and found["layout"]["world_size"] == 1024
    assert found["batch"] == {
        "global_batch_size": 1024,
        "micro_batch_size": 1,
        "micro_batches": 32,
        "tokens": 1024 * 4096,
    }
    assert found["pipeline"]["layout"] == "Et*20|t*20|t*20|t*20L"
    assert found["pipeline"]["bubble"] == pytest.approx(3 / 35)
    dense = [stage["parameters"]["dense"] for stage in found["stages"]]
    assert [round(count / 1e6, 1) for count in dense] == [2350.2, 2194.5, 2194.5, 2350.2]
    embedding = 152_064 * 8192 // 8
    layer = (10_240 * 8193 + 8192 * 8192 + 3 * 29_568 * 8192) // 8 + 2 * 8192  # qkv with bias, proj, MLP; norms
    assert dense[0] == embedding + 20 * layer and dense[1] == 20 * layer
    sizes = found["stages"][1]["bytes"]  # 6 + 12 / 32 bytes a parameter
    assert (sizes["weights"], sizes["gradients"]) == (2 * dense[1], 4 * dense[1])
    assert sizes["optimizer"] == dense[1] * 12 // 32 and sizes["total"] == dense[1] * (6 + 12 / 32)


def test_layers_that_stages_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    for pp, expected in ((3, "Et*27|t*27|t*26L"), (6, "Et*13|t*13|t*14|t*14|t*14|t*12L")):
        found = plan(capsys, str(QWEN_72B), "--gpus", str(8 * pp), f"--parallel.pp={pp}")
        assert found["pipeline"]["layout"] == expected
        assert found["pipeline"]["imbalance"] < 0.04


def test_qwen_235b_on_1024_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(QWEN_235B), "--gpus", "1024")
    assert found["parameters"] == 235_093_634_560
    assert round(found["active_parameters"] / 1e9) == 22
    assert found["stages"][1]["parameters"]["experts"] == 12 * 4 * 3 * 4096 * 1536  # 128 experts over 32 ranks


def test_a_frozen_model_beside_the_trained_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Distillation's teacher, and a policy's reference, in bf16: two bytes a parameter, no gradients, no states."""
    (teacher,) = plan(capsys, str(QWEN_72B), "--gpus=4", "--parallel.tp=4", "--parallel.pp=1")["stages"]
    (student,) = plan(capsys, str(RECIPES / "qwen2.5_7b_distill.yaml"), "--gpus=8")["stages"]
    assert student["parameters"]["dense"] * 4 == pytest.approx(7_615_616_512, rel=1e-3)
    sizes = student["bytes"]
    assert sizes["frozen"] == 2 * teacher["parameters"]["dense"] > 36e9
    assert sizes["total"] == sum(sizes[name] for name in ("weights", "gradients", "optimizer", "frozen"))
    words = ("--gpus=32", "--checkpoint.dir=run", f"--model.path={RECIPES / 'models' / 'qwen2.5-72b'}")
    for stage in plan(capsys, str(RECIPES / "qwen2.5_72b_dpo.yaml"), *words)["stages"]:
        assert stage["bytes"]["frozen"] == stage["bytes"]["weights"]
    (lora,) = plan(capsys, str(RECIPES / "qwen2.5_7b_dpo.yaml"), "--gpus=8")["stages"]
    assert lora["bytes"]["frozen"] == 0  # the reference is the model without its adapter


def test_deepseek_v3_on_2048_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(DEEPSEEK), "--gpus", "2048")
    attention = 7168 * (1536 + 576 + 128 * 128) + 1536 * 128 * 192 + 512 * 128 * 256 + 1536 + 512
    dense, expert = 3 * 18_432 * 7168, 3 * 2048 * 7168
    layer = attention + 2 * 7168 + 257 * expert + 256 * 7168  # 256 experts and a shared one, and the router
    decoder = 3 * (attention + 2 * 7168 + dense) + 58 * layer + 2 * 129_280 * 7168 + 7168
    assert decoder == 671_026_404_352
    assert found["parameters"] == decoder + layer + 2 * 7168 * 7168 + 3 * 7168  # and multi-token prediction
    assert found["pipeline"]["layout"] == "Et*4|" + "t*4|" * 14 + "tmL"
    kept = plan(capsys, str(DEEPSEEK), "--gpus", "2048", "--model.mtp_loss_scale", "0")
    assert kept["pipeline"]["layout"] == "Et*3|" + "t*4|" * 14 + "ttL"


def test_the_page_for_a_reader(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(QWEN_72B), "--gpus", "1024"]) == 0
    page = capsys.readouterr().out
    for text in (
        "72.71 B parameters",
        "TP8+SP PP4 DP32 = 1,024 ranks",
        "32 micro-batches",
        "8.6 % of a step",
        "2,350.2",
    ):
        assert text in page


def test_explain_prints_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with a key that a recipe has, the values, the reason and what to do instead."""
    hints = get_type_hints(Recipe)
    known = {s.name for s in fields(Recipe)}
    known |= {f"{s.name}.{f.name}" for s in fields(Recipe) for f in fields(hints[s.name])}
    assert main(["plan", "--explain", "--json"]) == 0
    rules = json.loads(capsys.readouterr().out)
    assert len(rules) > 50
    for rule in rules:
        assert all(fnmatch.filter(known, key) for key in rule["keys"].split(", ")), rule
        assert all(rule[part].strip() and "{" not in rule[part] for part in ("value", "reason", "instead")), rule
    assert main(["plan", "--explain"]) == 0
    page = capsys.readouterr().out
    assert "parallel.pipeline_layout" in page and "what to do" in page


# --- built ------------------------------------------------------------------------------------------------------------

SMALL = {
    "dense": ("qwen2-tied", ParallelSection(tp=2, pp=3, dp=2)),
    "interleaved": ("qwen3", ParallelSection(tp=2, pp=2, vpp=2)),
    "experts": ("qwen3-moe", ParallelSection(tp=2, pp=2, ep=2, dp=2)),
    "experts, not cut": ("qwen3-moe", ParallelSection(tp=2, pp=2, ep=4, etp=1, dp=4)),
    "experts at EP1": ("qwen3-moe", ParallelSection(tp=2, etp=1, dp=2)),
}
Small = tuple[ModelSource, ParallelPlan, list[BuiltRank]]


@pytest.fixture(scope="module")
def every_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All ranks of a small job, each built."""
    found: dict[str, Small] = {}

    def build(name: str) -> Small:
        if name not in found:
            variant, section = SMALL[name]
            folder = tmp_path_factory.mktemp("model")
            (folder / "config.json").write_text(json.dumps(tiny_config(variant, num_hidden_layers=5).to_dict()))
            source, layout = read_source(folder), resolve(section, world_size=None)
            ranks = range(layout.world_size)
            found[name] = source, layout, fake_world.build(source, layout, prepared(), ranks)
        return found[name]

    return build


def of_kinds(source: ModelSource, plan: ParallelPlan, built: list[BuiltRank]) -> list[BuiltRank]:
    return [rank for rank in built if rank.rank in fake_world.kinds(plan, pipeline_layout(source, plan))]


def wrong(source: ModelSource, plan: ParallelPlan, built: list[BuiltRank]) -> dict[int, Check]:
    """The checks that fail, by number."""
    checks = fake_world.checks(source, plan, pipeline_layout(source, plan), built, layers="torch")
    return {number: check for number, check in enumerate(checks) if check.wrong}


@pytest.mark.parametrize(
    "name", ["experts", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n != "experts")]
)
def test_what_is_said_of_two_ranks_a_stage_holds_of_all(every_rank: Any, name: str) -> None:
    """Cell by cell: the parts of all ranks cover each tensor of the model, and only the parts of copies meet."""
    source, plan, built = every_rank(name)
    assert wrong(source, plan, of_kinds(source, plan, built)) == {} == wrong(source, plan, built)
    boxes: dict[tuple[str, int | None], set[tuple[tuple[int, int], ...]]] = {}
    for part in (part for rank in built for part in rank.parts):
        boxes.setdefault((part.key, part.expert), set()).add(tuple(zip(part.offset, part.end, strict=True)))
    wholes = {(part.key, part.expert): part.whole for rank in built for part in rank.parts}
    for tensor, found in boxes.items():
        cells = [cell for box in found for cell in itertools.product(*(range(*span) for span in box))]
        assert len(cells) == len(set(cells)) == prod(wholes[tensor]), tensor
    shapes = global_shapes(source)
    assert set(boxes) == {
        (key, expert) for key, shape in shapes.items() for expert in (range(shape[0]) if EXPERTS in key else (None,))
    }


def spoiled(built: list[BuiltRank], tensor: str, **changes: Any) -> list[BuiltRank]:
    """The same ranks, but that the parts of `tensor` differ."""

    def spoil(part: Part) -> Part:
        return replace(part, **changes) if part.key == tensor else part

    return [replace(rank, parts=tuple(spoil(part) for part in rank.parts)) for rank in built]


def test_what_is_wrong_is_seen(every_rank: Any) -> None:
    source, plan, built = every_rank("experts")
    kinds = of_kinds(source, plan, built)

    def fails(ranks: list[BuiltRank]) -> list[int]:
        return list(wrong(source, plan, ranks))

    proj = "decoder.layers.2.self_attention.linear_proj.weight"
    assert fails(kinds) == []
    assert fails(spoiled(kinds, proj, key="decoder.layers.9.self_attention.linear_proj.weight")) != []
    assert fails(spoiled(kinds, proj, whole=(64, 128))) == [1, 2]
    assert fails(spoiled(kinds, proj, offset=(0, 0))) == [2]  # the last rank's part is where the first one's is
    assert fails(spoiled(kinds, proj, shape=(64, 24))) == [2, 3]
    more = replace(kinds[0].parameters, experts=kinds[0].parameters.experts + 1)
    assert fails([replace(kinds[0], parameters=more), *kinds[1:]]) == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "gpus", "ranks", "numbers"),
    [
        (QWEN_72B, 1024, 7, 72_706_203_648),
        pytest.param(QWEN_235B, 1024, 11, 235_093_634_560, marks=pytest.mark.nightly),
        pytest.param(DEEPSEEK, 2048, 19, 682_636_487_424, marks=pytest.mark.nightly),
    ],
    ids=["qwen2.5-72b", "qwen3-235b-a22b", "deepseek-v3"],
)
def test_a_thousand_gpus(capsys: pytest.CaptureFixture[str], recipe: Path, gpus: int, ranks: int, numbers: int) -> None:
    prepared()
    before = os.times()
    built = plan(capsys, str(recipe), "--gpus", str(gpus), "--build")["built"]
    spent = [now - then for now, then in zip(os.times()[:4], before[:4], strict=True)]
    assert sum(spent) < 60  # seconds of a core: 15 for DeepSeek-V3, beside other work that slows the clock only
    assert built["good"] and all(check["holds"] for check in built["checks"]) and len(built["checks"]) == 5
    assert len(built["ranks"]) == ranks
    assert f"{numbers:,} numbers" in built["checks"][3]["what"]


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "no recipe": ([], "plan needs a RECIPE, a YAML file, or --explain"),
    "no such recipe": (["gone.yaml"], "gone.yaml: the recipe can't be read"),
    "no GPUs": ([str(QWEN_72B), "--gpus", "0"], "found '0'; it must be a whole number, at least 1"),
    "an unknown option": ([str(QWEN_72B), "--gpu", "8"], "unrecognized arguments: --gpu"),
    "an unknown key": ([str(QWEN_72B), "--parallel.tpp", "8"], "parallel.tpp: unknown key. Did you mean 'tp'?"),
    "GPUs that do not fit": ([str(QWEN_72B), "--gpus", "100"], "= 32 ranks do not divide the job's 100 ranks"),
    "more data parallel ranks than there are": (
        [str(QWEN_72B), "--gpus", "64", "--parallel.dp", "4"],
        "× dp 4 = 128 ranks, but the job has 64",
    ),
    "a batch that does not fit": (
        [str(QWEN_72B), "--gpus", "96"],
        "schedule.global_batch_size: 1024 is not a multiple of schedule.micro_batch_size 1 x dp 3",
    ),
    "micro-batches that can't be interleaved": (
        [str(QWEN_72B), "--gpus", "1024", "--parallel.vpp", "2", "--schedule.global_batch_size", "96"],
        "makes 3 micro-batches a rank, but parallel.vpp > 1 needs a multiple of parallel.pp 4",
    ),
    "heads that TP does not divide": (
        [str(QWEN_72B), "--parallel.tp", "16"],
        "parallel.tp: 16 does not divide the model's 8 key-value heads",
    ),
    "more stages than layers": ([str(QWEN_72B), "--parallel.pp", "81"], "is more than the model's 80 layers"),
    "a layout in no notation": ([str(QWEN_72B), "--parallel.pipeline_layout", "80"], "found 80; allowed: text or null"),
    "a layout with an unknown letter": (
        [str(QWEN_72B), "--parallel.pipeline_layout", "Et*80|x|x|L"],
        "found Et*80|x|x|L; allowed: E for the embedding",
    ),
    "a layout of another length": (
        [str(QWEN_72B), "--parallel.pipeline_layout", "Et*20|(t*20|)*2t*21L"],
        "has other than the model's 80 layers",
    ),
    "experts that a dense model lacks": (
        [str(QWEN_72B), "--gpus", "1024", "--parallel.ep", "2"],
        "parallel.ep: 2, but qwen2 has no experts",
    ),
    "experts that EP does not divide": (
        [str(QWEN_235B), "--gpus", "960", "--parallel.ep", "60", "--schedule.global_batch_size", "960"],
        "parallel.ep: 60 does not divide the model's 128 experts",
    ),
    "expert ranks that a stage lacks": (
        [str(QWEN_235B), "--gpus", "64", "--parallel.ep", "32"],
        "ep 32 × etp 1 = 32 ranks do not divide the 8 ranks of a pipeline stage",
    ),
    "no model": ([str(QWEN_72B), "--model.path", "no/such"], "model.path: no/such has no config.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_message(capsys: pytest.CaptureFixture[str], name: str) -> None:
    words, message = REFUSED[name]
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("mcore-swift: error: ")
    assert message in captured.err and len(captured.err.splitlines()) == 1
