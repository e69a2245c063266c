"""Recipes: YAML and overrides in, one frozen recipe or one clear message out."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection, ModelSection, Recipe, SourceSection
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import check_files, dump_recipe, load_recipe, recipe_help

SMALL = """\
model: {path: model}
data:
  train: [a.jsonl, {path: b.jsonl, weight: 3}]
schedule:
  steps: 40
  learning_rate: 2e-4
"""


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml", list(overrides))


def error(folder: Path, text: str, *overrides: str) -> str:
    """The message of a wrong recipe, without the folder's name."""
    with pytest.raises(InputError) as caught:
        check_recipe(load(folder, text, *overrides))
    return str(caught.value).replace(f"{folder}/", "")


def test_values_defaults_and_sources(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL)
    check_recipe(recipe)
    assert recipe.data.train == [SourceSection(path="a.jsonl"), SourceSection(path="b.jsonl", weight=3.0)]
    assert (recipe.schedule.steps, recipe.schedule.learning_rate, recipe.parallel.tp) == (40, 2e-4, 1)
    assert isinstance(recipe.data.train[1].weight, float)


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "2.e-4", "0.0002", "+2e-4", ".2e-3"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, SMALL.replace("2e-4", text)).schedule.learning_rate == 2e-4
    assert load(tmp_path, SMALL, "--schedule.learning_rate", text).schedule.learning_rate == 2e-4


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        SMALL,
        *("--parallel.tp", "2"),
        "--parallel.sequence_parallel=true",
        *("--data.train", "c.jsonl"),
        *("--data.validation", "[v.jsonl, {path: w.jsonl}]"),
        *("--schedule.steps", "null"),
        *("--schedule.epochs", "1"),
        *("--model.overrides.num_hidden_layers", "4"),
        *("--model.overrides.rope_scaling.factor", "8e0"),
        *("--optimizer.weight_decay", "0"),
        *("--optimizer.weight_decay", "0.5"),
    )
    assert (recipe.parallel.tp, recipe.parallel.sequence_parallel) == (2, True)
    assert recipe.data.train == [SourceSection(path="c.jsonl")]
    assert [source.path for source in recipe.data.validation] == ["v.jsonl", "w.jsonl"]
    assert (recipe.schedule.steps, recipe.schedule.epochs) == (None, 1.0)
    assert recipe.model.overrides == {"num_hidden_layers": 4, "rope_scaling": {"factor": 8.0}}
    assert recipe.optimizer.weight_decay == 0.5


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL + "parallel:\n  # tp: 2\n").parallel.tp == 1


def test_relative_paths_are_found_here_then_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for path in (recipes / "model", recipes / "both", here / "both"):
        path.mkdir(parents=True)
    (recipes / "corpus.idx").touch()
    monkeypatch.chdir(here)
    text = (
        "model: {path: model, tokenizer: both}\ndata: {train: [corpus, gone], cache_dir: ~/c}\ncheckpoint: {dir: model}"
    )
    recipe = load(recipes, text)
    assert (recipe.model.path, recipe.model.tokenizer) == (str(recipes / "model"), "both")
    assert [source.path for source in recipe.data.train] == [str(recipes / "corpus"), "gone"]
    assert (recipe.checkpoint.dir, recipe.data.cache_dir) == ("model", str(Path.home() / "c"))
    with pytest.raises(InputError, match=r"data\.train: no such file or folder: gone in the current directory"):
        check_files(recipe)
    check_files(replace(recipe, data=replace(recipe.data, train=recipe.data.train[:1])))


def test_dump_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    odd = ["--logging.wandb_name", "'2e-4'", "--logging.wandb_project", "2026-01-02", "--checkpoint.dir", "'no'"]
    recipe = load(tmp_path, SMALL, *odd, "--model.overrides", "{rope: {factor: 1e9, names: [a, null, '1']}}")
    assert (recipe.logging.wandb_name, recipe.logging.wandb_project) == ("2e-4", "2026-01-02")
    text = dump_recipe(recipe)
    assert load(tmp_path, text) == recipe
    for section in fields(Recipe):
        keys = [field.name for field in fields(getattr(recipe, section.name))]
        assert f"{section.name}:\n" in text and all(f"\n  {key}:" in text for key in keys)


def test_help_says_something_about_every_key(tmp_path: Path) -> None:
    text = recipe_help()
    assert "  tp: 1  # tensor parallel size [a whole number]\n" in text
    assert (
        '  decay: "cosine"  # wsd: warm-up, stable, linear decay at the end [cosine, linear, wsd, constant]\n' in text
    )
    assert (
        "  path:  # Hugging Face folder, or a Megatron checkpoint folder written by this project [text, required]"
        in text
    )
    recipe = load(tmp_path, text, "--model.path", "m", "--data.train", "a")
    assert recipe == Recipe(model=ModelSection(path="m"), data=DataSection(train=[SourceSection(path="a")]))


WRONG = [
    # (what is wrong with the file, the message)
    (
        SMALL + "modle: {}",
        "recipe.yaml:7: modle: unknown key. Did you mean 'model'? Allowed: model, data, parallel, obj",
    ),
    (
        SMALL + "parallel: {tpp: 2}",
        "recipe.yaml:7: parallel.tpp: unknown key. Did you mean 'tp'? Allowed in parallel: tp,",
    ),
    (SMALL + "  batch: 2", "recipe.yaml:7: schedule.batch: unknown key."),
    (SMALL + "steps: 2", "recipe.yaml:7: steps: unknown key. Did you mean 'schedule.steps'?"),
    (
        SMALL + "precision: {dtype: fp16}",
        "precision.dtype: found the text 'fp16'; allowed: auto, bf16, fp32. Did you mean",
    ),
    (
        SMALL + "precision: {fp8: tensor}",
        "allowed: tensorwise, delayed, blockwise, mxfp8 or null. Did you mean 'tensorwise'",
    ),
    (SMALL + "parallel: {tp: true}", "recipe.yaml:7: parallel.tp: found true; allowed: a whole number."),
    (SMALL + "parallel: {tp: '2'}", "parallel.tp: found the text '2'; allowed: a whole number."),
    (SMALL + "parallel: {tp: 2.0}", "parallel.tp: found 2.0; allowed: a whole number."),
    (SMALL + "parallel: {tp: }", "parallel.tp: found null; allowed: a whole number."),
    (SMALL + "parallel: 2", "recipe.yaml:7: parallel: found 2; allowed: a mapping."),
    (SMALL + "optimizer: {eps: small}", "optimizer.eps: found the text 'small'; allowed: a number."),
    (SMALL + "optimizer: {eps: .nan}", "optimizer.eps: found NaN; allowed: a number."),
    (SMALL + "optimizer: {eps: true}", "optimizer.eps: found true; allowed: a number."),
    (SMALL + "checkpoint: {export: 1}", "checkpoint.export: found 1; allowed: true or false."),
    (
        SMALL + "runtime: {profile_steps: [3, x]}",
        "runtime.profile_steps[1]: found the text 'x'; allowed: a whole number.",
    ),
    (SMALL.replace("weight: 3", "wait: 3"), "recipe.yaml:3: data.train[1].wait: unknown key. Did you mean 'weight'?"),
    (SMALL.replace("b.jsonl", "7"), "recipe.yaml:3: data.train[1].path: found 7; allowed: text."),
    (SMALL.replace("a.jsonl", "7"), "recipe.yaml:3: data.train[0]: found 7; allowed: a path or {path, weight}."),
    ("model: {}\ndata: {train: a}", "recipe.yaml:1: model.path is missing: Hugging Face folder"),
    ("", "recipe.yaml: model is missing: what is trained\nrecipe.yaml: data is missing"),
    ("- a\n- b", 'recipe.yaml: found ["a", "b"]; a recipe is a mapping of sections: model, data'),
    ("model: {path: a\ndata: {}", "recipe.yaml:2: not valid YAML: expected ',' or '}'"),
    ("model:\n\tpath: a", "recipe.yaml:2: not valid YAML: found character '\\t'"),
    (SMALL + "data: {train: c.jsonl}", "recipe.yaml:7: not valid YAML: the key 'data' appears twice"),
    ("model: !!python/object/apply:os.system [ls]", "recipe.yaml:1: not valid YAML: could not determine a constructor"),
    (SMALL + "logging: {wandb_name: !!binary aGk=}", "a recipe holds text, numbers, lists and mappings only"),
    ("model: &m {path: *m}\ndata: {train: a}", "recipe.yaml: a recipe holds text"),
    (SMALL + "parallel: {tp: 2, pp: x, sp: 1}", "parallel.sp: unknown key"),
    (SMALL + "parallel: {tp: 2, pp: x, sp: 1}", "parallel.pp: found the text 'x'"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    assert message in error(tmp_path, text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule.stpes", "4"], "command line: schedule.stpes: unknown key. Did you mean 'steps'?"),
        (["--parallel.tp=x"], "command line: parallel.tp: found the text 'x'; allowed: a whole number."),
        (["--parallel.tp"], "command line: --parallel.tp needs a value"),
        (["--parallel.tp", "--parallel.pp", "2"], "command line: --parallel.tp needs a value"),
        (["--parallel.tp.x", "2"], 'command line: parallel.tp: found {"x": 2}; allowed: a whole number.'),
        (["--schedule.steps.x", "2"], "command line: --schedule.steps.x: schedule.steps holds 40, no keys"),
        (["--data.train", "[a"], "command line: --data.train: '[a' is not valid YAML"),
        (["tp", "2"], "command line: found 'tp'; expected --section.key VALUE"),
    ],
)
def test_wrong_overrides(tmp_path: Path, words: list[str], message: str) -> None:
    assert message in error(tmp_path, SMALL, *words)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml: the recipe can't be read: No such file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match="can't be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\x80\x81\xff\x00")
    with pytest.raises(InputError, match=r"model\.bin: not a YAML text file"):
        load_recipe(tmp_path / "model.bin")


SEVERAL = "--adapter.name lora --data.adapter_field kind --adapter.several.a.rank 4"
CONTRADICTIONS = [
    ("--parallel.tp 0", "parallel.tp: found 0; it must be at least 1"),
    ("--schedule.micro_batch_size 0", "schedule.micro_batch_size: found 0; it must be at least 1"),
    ("--optimizer.clip_grad -1", "optimizer.clip_grad: found -1.0; it must be at least 0"),
    ("--data.validation_split 1", "data.validation_split: found 1.0; it must be at least 0 and less than 1"),
    ("--schedule.learning_rate 0", "schedule.learning_rate: found 0.0; it must be greater than 0"),
    ("--runtime.seed -1", "runtime.seed: found -1; it must be between 0 and 2147483647"),
    ("--runtime.profile_steps [0]", "runtime.profile_steps: found [0]; it must be steps counted from 1"),
    ("--model.path ''", "model.path: found ''; it must be a path, not an empty text"),
    ("--parallel.cp_comm_type a2a", "parallel.cp_comm_type: a2a needs parallel.cp > 1, found cp 1; leave it out"),
    ("--parallel.cp 2 --parallel.cp_comm_type ring", "parallel.cp_comm_type"),
    ("--parallel.cp 4 --parallel.hierarchical_cp [2,2]", "used by parallel.cp_comm_type: a2a+p2p only, found None"),
    ("--parallel.cp 4 --parallel.cp_comm_type a2a+p2p", "parallel.hierarchical_cp: found None for"),
    (
        "--parallel.cp 4 --parallel.cp_comm_type a2a+p2p --parallel.hierarchical_cp [2,4]",
        "parallel.hierarchical_cp: found [2, 4] for parallel.cp_comm_type: a2a+p2p; give two sizes above 1, of an "
        "all-to-all and of the ring, whose product is parallel.cp 4",
    ),
    ("--model.overrides {num_hidden_layers: 2}", "they need model.init: random"),
    ("--parallel.sequence_parallel true", "parallel.sequence_parallel: true needs parallel.tp > 1"),
    ("--parallel.vpp 2", "parallel.vpp: 2 model chunks a pipeline rank need parallel.pp > 1"),
    ("--parallel.first_stage_layers 2", "there is one stage, found parallel.pp 1; raise pp or leave them out"),
    ("--parallel.pp 2 --parallel.last_stage_layers 0", "parallel.last_stage_layers: found 0; it must be at least 1"),
    (
        "--parallel.pp 2 --parallel.pipeline_layout EtttL --parallel.account_loss true",
        "parallel.pipeline_layout says everything already; leave the others out",
    ),
    (
        "--parallel.pp 2 --parallel.first_stage_layers 2 --parallel.account_embedding true",
        "a stage's layers are either given or balanced",
    ),
    (
        "--parallel.pp 2 --parallel.vpp 2 --parallel.first_stage_layers 3",
        "3 and None layers can't be shared out over parallel.vpp 2 chunks",
    ),
    ("--parallel.pp 2 --parallel.pipeline_layout Ett|xL", "found Ett|xL; allowed: E for the embedding, t for a layer"),
    ("--parallel.pp 2 --parallel.pipeline_layout (t|*2", "parallel.pipeline_layout: found (t|*2; allowed: E for"),
    ("--parallel.pp 2 --parallel.pipeline_layout Et|t|tL", "the chunks of Et|t|tL are not parallel.pp 2 × vpp 1"),
    ("--parallel.pp 2 --parallel.pipeline_layout tE|tL", "tE|tL needs one embedding at its start and one loss at its"),
    ("--parallel.pp 2 --parallel.pipeline_layout Etm|tL", "Etm|tL has multi-token prediction layers elsewhere"),
    ("--parallel.pp 3 --parallel.pipeline_layout Ett||tL", "Ett||tL has a chunk with nothing in it"),
    ("--parallel.tp 2 --runtime.ranks 3", "runtime.ranks: 3 is not a multiple of what the layout needs"),
    ("--data.train []", "data.train: it is empty; name at least one file"),
    ("--data.format synthetic", "data.format: synthetic makes its own tokens; data.train is [synthetic]"),
    ("--data.format synthetic --data.train synthetic --data.validation v", "and there is no validation"),
    ("--data.streaming true --data.validation_split 0.1", "data.validation_split: 0.1 of how many rows is unknown"),
    ("--data.sequence_length 1", "data.sequence_length: found 1; it must be at least 2"),
    ("--data.train [{path: ''}]", "a source's path is empty"),
    ("--data.train [{path: a, weight: 0}]", "a source's weight must be greater than 0"),
    ("--data.validation v --data.validation_split 0.1", "data.validation_split: they exclude each other"),
    ("--schedule.eval_interval 5", "nothing to evaluate on; set data.validation or data.validation_split"),
    ("--schedule.epochs 1", "found steps 40, epochs 1.0; set exactly one of steps and epochs"),
    ("--schedule.steps null", "found steps None, epochs None; set exactly one of steps and epochs"),
    ("--schedule.micro_batch_size 3", "schedule.global_batch_size: 8 is not a multiple of schedule.micro_batch_size 3"),
    (
        "--parallel.dp 3",
        "schedule.global_batch_size: 8 is not a multiple of schedule.micro_batch_size 1 x parallel.dp 3",
    ),
    ("--schedule.min_learning_rate 1", "schedule.min_learning_rate: 1.0 is greater than schedule.learning_rate 0.0002"),
    ("--schedule.min_learning_rate 1e-5 --schedule.decay constant", "is never reached with schedule.decay: constant"),
    ("--schedule.decay wsd", "schedule.decay: wsd needs schedule.decay_steps"),
    ("--schedule.decay_steps 4", "schedule.decay_steps: 4 is used by schedule.decay: wsd only, found decay: cosine"),
    ("--schedule.warmup_steps 40", "schedule.warmup_steps: 40 must be less than schedule.steps 40"),
    (
        "--schedule.warmup_steps 10 --schedule.decay wsd --schedule.decay_steps 31",
        "schedule.decay_steps: 31 after 10 warmup_steps do not fit in schedule.steps 40",
    ),
    ("--precision.fp8 delayed --precision.dtype fp32", "precision.fp8: delayed needs precision.dtype: bf16 or auto"),
    ("--precision.fp8 delayed --runtime.device cpu", "precision.fp8: delayed needs a GPU, found runtime.device: cpu"),
    ("--precision.fp8_format e4m3", "precision.fp8_format: e4m3 does nothing without precision.fp8"),
    ("--checkpoint.interval 5", "nothing is saved without checkpoint.dir"),
    ("--checkpoint.dir d --checkpoint.overwrite true", "set checkpoint.resume: never"),
    ("--checkpoint.dir d --checkpoint.optimizer false", "checkpoint.optimizer: false leaves nothing to resume from"),
    ("--logging.wandb_name n", "logging.wandb_name: n does nothing without logging.wandb_project"),
    (
        "--runtime.recompute selective --runtime.recompute_modules [attn]",
        "runtime.recompute_modules: found ['attn']; allowed: core_attn, ",
    ),
    ("--runtime.recompute selective --runtime.recompute_modules []", "runtime.recompute_modules: it is empty"),
    ("--runtime.recompute_modules [mlp]", "they are used by runtime.recompute: selective only"),
    ("--adapter.rank 8", "adapter.name: none trains the model itself"),
    ("--adapter.name lora --adapter.rank 0", "adapter.rank: found 0; it must be at least 1"),
    ("--adapter.name lora --adapter.dropout 1.0", "adapter.dropout: found 1.0; it must be at least 0 and less than 1"),
    ("--adapter.name lora --adapter.targets []", "adapter.targets: it is empty"),
    ("--adapter.name lora --model.init random", "model.init: random weights are frozen beside the adapters"),
    (
        "--adapter.name lora --model.init random --checkpoint.export false",
        "to measure, set checkpoint.final and export",
    ),
    ("--adapter.name lora --adapter.path a --adapter.rank 8", "adapter.path: a decides targets, rank, alpha"),
    ("--adapter.name lora --adapter.init pissa --adapter.dora true", "adapter.init: pissa changes the frozen weights"),
    ("--adapter.quantization nf4", "adapter.name: none trains the model itself"),
    (
        "--adapter.name lora --adapter.double_quantization false",
        "no weights in four bits whose scales it could be about",
    ),
    ("--adapter.name lora --adapter.quantization nf4 --adapter.init pissa", "which are quantized already"),
    ("--adapter.name lora --adapter.quantization nf4 --precision.fp8 delayed", "every layer in FP8, too"),
    ("--adapter.name lora --adapter.quantization fp4 --runtime.offload_layers 1", "keeps for the backward pass is not"),
    ("--adapter.name lora --adapter.init pissa --adapter.share_a true", "each module's A starts with its own"),
    ("--adapter.name lora --adapter.several.a.rank 4", "each row has to say which of the adapters it trains"),
    ("--data.adapter_field kind", "each row has to say which of the adapters it trains"),
    (f"{SEVERAL} --adapter.several.a/b.rank 4", "adapter.several: names become folders"),
    (f"{SEVERAL} --adapter.several.b.rank 0", "adapter.several: such an adapter can't be"),
    (f"{SEVERAL} --adapter.several.b.path c --adapter.several.b.rank 4", "adapter.several: the folder decides them"),
    (f"{SEVERAL} --adapter.merge true", "adapter.several: several adapters stand on one unchanged model"),
    (f"{SEVERAL} --adapter.modules_to_save [norm]", "adapter.several: several adapters stand on one unchanged model"),
    (f"{SEVERAL} --data.streaming true", "data.adapter_field: rows are told apart in tokenized files"),
    ("--adapter.name lora --moe.expert_bias_update_rate 0.001", "it changes the frozen model's correction biases"),
    ("--adapter.name lora --model.mtp_loss_scale 0.1", "multi-token prediction are frozen"),
    ("--adapter.name lora --optimizer.name muon --optimizer.distributed false", "muon's updates are proved"),
    ("--model.freeze [lm_head] --adapter.name lora", "adapter.name: lora freezes the whole model already"),
    ("--model.trainable [lm_head] --optimizer.fsdp megatron", "proved for a model in parts"),
    ("--model.freeze [lm_head] --moe.expert_bias_update_rate 0.1", "biases of frozen layers would change, too"),
    ("--optimizer.lisa_interval 5", "optimizer.lisa_interval: 5 does nothing without optimizer.lisa_layers"),
    ("--optimizer.lisa_layers 0", "optimizer.lisa_layers: found 0; it must be at least 1"),
    ("--optimizer.lisa_layers 2 --adapter.name lora", "LISA decides itself what is trained"),
    ("--optimizer.lisa_layers 2 --optimizer.name sgd --optimizer.distributed false", "LISA is proved with adam"),
    ("--optimizer.lisa_layers 2 --optimizer.offload_fraction 1.0", "proved for states in fp32 on the device alone"),
    ("--optimizer.lisa_layers 2 --runtime.overlap true", "a gradient's reduction starts when all of a bucket's"),
    ("--optimizer.lisa_layers 2 --model.mtp_loss_scale 0.1", "would change in every step"),
    ("--adapter.name bottleneck --adapter.alpha 8", "adapter.alpha: bottleneck doesn't know it; it is for adapter"),
    ("--adapter.name lora --adapter.activation relu", "adapter.activation: lora doesn't know it; it is for"),
    ("--adapter.name bottleneck --adapter.merge true", "bottleneck can't be folded into the model's weights"),
    ("--adapter.name reft --adapter.first_tokens 0 --adapter.last_tokens 0", "nothing would be changed, or trained"),
    ("--adapter.name reft --adapter.layers []", "adapter.layers: it is empty"),
    ("--adapter.name reft --adapter.targets [mlp]", "adapter.targets: reft doesn't know it"),
    ("--adapter.name reft --runtime.recompute full", "would be changed at another micro-batch's positions"),
    ("--optimizer.galore_rank 8", "GaLore's settings do nothing for optimizer.name: adam"),
    ("--optimizer.name galore", "optimizer.name: galore is not sharded by Megatron's distributed optimizer"),
    ("--optimizer.name galore --optimizer.distributed false --adapter.name lora", "to train the whole model in little"),
    ("--runtime.recompute_layers 2", "it is used by runtime.recompute: full only, found none"),
    ("--runtime.loss_chunk 100", "runtime.loss_chunk: found 100; tensor parallel ranks share a chunk out"),
    ("--runtime.loss_chunk 48 --parallel.tp 2", "make it a multiple of 16 x parallel.tp"),
    ("--runtime.loss_chunk 1024 --objective.name rm", "rm has no logits of all positions at once"),
    ("--data.share_prompts true", "data.share_prompts: sft has no pairs of answers to the same prompt"),
    ("--data.share_prompts true --objective.name kto", "use an objective of pairs: dpo, cpo, simpo, orpo, rm"),
    ("--data.share_prompts true --objective.name dpo --data.packing false", "without packing each answer is in a row"),
    ("--data.share_prompts true --objective.name dpo --parallel.cp 2", "context parallel ranks cut each document"),
    ("--data.share_prompts true --objective.name simpo --adapter.name reft", "reft changes positions that it counts"),
    ("--data.share_prompts true --objective.name cpo --model.mtp_loss_scale 0.1", "looks for each position's next"),
    ("--data.share_prompts true --objective.name orpo --runtime.offload_layers 2", "it is not proved with"),
    (
        "--data.share_prompts true --objective.name rm --moe.dispatcher allgather --parallel.ep 2 --parallel.dp 2",
        "allgather wants as many positions",
    ),
    ("--data.share_prompts true --objective.name dpo --moe.capacity_factor 1.5", "experts would drop other tokens"),
    ("--runtime.loss_chunk 1024 --model.mtp_loss_scale 0.1", "the loss of multi-token prediction needs the logits"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_contradictions(tmp_path: Path, options: str, message: str) -> None:
    pairs = [pair.split(" ", 1) for pair in f" {options}".split(" --")[1:]]
    words = [word for key, value in pairs for word in (f"--{key}", value)]
    assert message in error(tmp_path, SMALL, *words)


def test_settings_that_go_together(tmp_path: Path) -> None:
    for options in (
        ["--parallel.tp=2", "--parallel.sequence_parallel=true", "--parallel.dp=2", "--runtime.ranks=4"],
        ["--schedule.decay=wsd", "--schedule.decay_steps=30", "--schedule.warmup_steps=10"],
        [
            "--data.format=synthetic",
            "--data.train=[synthetic]",
            "--model.init=random",
            "--model.overrides={vocab_size: 64}",
        ],
        ["--parallel.pp=2", "--parallel.vpp=2", "--parallel.pipeline_layout=Et*3|(t|)*2ttL"],
        ["--precision.fp8=delayed", "--precision.dtype=bf16", "--precision.fp8_format=e4m3"],
        ["--checkpoint.dir=d", "--checkpoint.resume=never", "--checkpoint.overwrite=true", "--checkpoint.interval=5"],
        ["--adapter.name=lora", "--model.init=random", "--checkpoint.final=false", "--checkpoint.export=false"],
        ["--objective.name=dpo", "--data.share_prompts=true", "--parallel.tp=2", "--parallel.pp=2", "--parallel.vpp=2"],
    ):
        check_recipe(load(tmp_path, SMALL, *options))


RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_of_this_repository_are_good(file: Path) -> None:
    check_recipe(load_recipe(file, ["--checkpoint.dir", "run"]))  # which `launch` gives to those that have none
