"""Layers of multi-token prediction: their loss and gradients against transformers' modules in float64, at layouts, and
their way through a run, trained or not."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_swift.errors import InputError
from mcore_swift.models.build import read_source
from mcore_swift.recipe import ModelSection, ParallelSection, Recipe
from tests.distributed.harness import RankFailure, prepared, run_ranks
from tests.distributed.rank_model import Trained, assert_close, documents, open_model, recipe_for, train
from tests.distributed.test_layouts import assert_same_run
from tests.distributed.tiny_models import tiny_folder, tiny_model
from tests.distributed.tiny_mtp import mtp_tensors, tiny_mtp

VARIANT = "deepseek-v3"
FIRST = 4  # Hugging Face's number of the first layer of multi-token prediction
SCALE = 0.3


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepared()
    return tiny_folder(tmp_path_factory.mktemp("mtp") / VARIANT, VARIANT)


def recipe(folder: Path, layout: ParallelSection | None = None, **choices: Any) -> Recipe:
    plain = recipe_for(folder, layout, **choices)
    return replace(plain, model=ModelSection(path=str(folder), mtp_loss_scale=SCALE))


# --- the loss ---------------------------------------------------------------------------------------------------------


def nll(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """logits [n or more, vocabulary], labels, mask [n] → the sum over labels that count."""
    logps = logits[: len(labels)].log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return -(logps * mask).sum()


def run_layer(mtp: Any, layer: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' layer on a whole document. hidden: [1, n, h] at tokens 0 to n - 1; tokens: [n], the next ones."""
    embedded, positions = mtp.embed_tokens(tokens[None]), torch.arange(len(tokens))[None]
    future = torch.full((len(tokens), len(tokens)), float("-inf"), dtype=hidden.dtype).triu(1)
    rotary = mtp.rotary_emb(embedded, position_ids=positions)
    return layer(embedded, hidden, rotary, future[None, None], positions, None)


def reference() -> tuple[float, dict[str, torch.Tensor]]:
    """The main loss, and the gradients of both losses for the layers and what they share, each document alone."""
    model = tiny_model(VARIANT, dtype=torch.float64)
    model.config._experts_implementation = "eager"  # the others know no float64
    mtp = tiny_mtp(model)
    texts = documents(model.config.vocab_size)
    count = sum(int(loss[1:].sum()) for _, loss in texts)
    main = ahead = torch.zeros((), dtype=torch.float64)
    for text, counted in texts:
        tokens, mask = torch.from_numpy(text).long(), torch.from_numpy(counted).double()
        hidden = model.model(tokens[None]).last_hidden_state
        main = main + nll(model.lm_head(hidden)[0], tokens[1:], mask[1:])
        for depth, layer in enumerate(mtp.layers, start=1):
            hidden = run_layer(mtp, layer, hidden[:, : len(tokens) - depth], tokens[depth:])
            ahead = ahead + nll(mtp.shared_head(hidden)[0], tokens[depth + 1 :], mask[depth + 1 :])
    ((main + SCALE / len(mtp.layers) * ahead) / count).backward()
    gradients = mtp_tensors(model, mtp, lambda tensor: tensor.grad)
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".experts." not in name}
    for layer in range(FIRST, FIRST + len(mtp.layers)):
        plain[f"model.layers.{layer}.embed_tokens.weight"] = plain["model.embed_tokens.weight"]
        plain[f"model.layers.{layer}.shared_head.head.weight"] = plain["lm_head.weight"]
    return float(main / count), gradients | plain


@functools.cache
def trained(folder: Path, layout: ParallelSection | None = None, **choices: Any) -> Trained:
    return train(recipe(folder, layout, **choices))


@pytest.mark.slow
def test_loss_and_gradients(folder: Path) -> None:
    loss, gradients = run_ranks(reference, 1)[0]
    found = trained(folder)
    assert found.losses[0] == pytest.approx(loss, rel=1e-6)  # the main one alone is reported
    assert_close({name: found.gradients[name] for name in gradients}, gradients)
    assert any(name.startswith(f"model.layers.{FIRST + 1}.mlp.experts.") for name in gradients)


@pytest.mark.slow
def test_what_shares_a_micro_batch_does_not_matter(folder: Path) -> None:
    assert_same_run(trained(folder, packing=False, micro_batch_size=1), trained(folder))


LAYOUTS = {
    "TP2": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "EP2xPP2": ParallelSection(ep=2, pp=2, dp=2),
    "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2),
    "PP2xVPP2": ParallelSection(pp=2, vpp=2),
    "EP2xTP2xPP2": ParallelSection(ep=2, tp=2, pp=2, dp=2),
    "CP2": ParallelSection(cp=2),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name == "EP2xPP2" else pytest.mark.nightly) for name in LAYOUTS],
)
def test_layouts(folder: Path, layout: str) -> None:
    assert_same_run(trained(folder, LAYOUTS[layout]), trained(folder))


# --- the way through a run --------------------------------------------------------------------------------------------


def export(recipe: Recipe, place: Path) -> None:
    from mcore_swift.weights.hf_folder import export as export_folder

    model = open_model(recipe)
    export_folder(model.chunks, model.rules, model.source, place, dtype=model.export_dtype)


@pytest.mark.parametrize(
    ("layout", "scale"),
    [
        pytest.param(ParallelSection(), 0.0, id="one rank, kept", marks=pytest.mark.slow),
        pytest.param(ParallelSection(pp=2, ep=2, dp=2), 0.0, id="EP2xPP2, kept", marks=pytest.mark.slow),
        pytest.param(ParallelSection(tp=2, pp=2), SCALE, id="TP2xPP2, trained", marks=pytest.mark.nightly),
    ],
)
def test_export_gives_back_every_tensor(folder: Path, tmp_path: Path, layout: ParallelSection, scale: float) -> None:
    chosen = replace(recipe(folder, layout), model=ModelSection(path=str(folder), mtp_loss_scale=scale))
    run_ranks(export, (layout.dp or 1) * layout.tp * layout.pp, chosen, tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_layers_that_are_only_kept_stay_as_they_are(folder: Path) -> None:
    found, before = train(recipe_for(folder, ParallelSection(pp=2))).parameters, load_file(folder / "model.safetensors")
    ahead = [name for name in before if name.startswith((f"model.layers.{FIRST}.", f"model.layers.{FIRST + 1}."))]
    own = [name for name in ahead if not name.endswith(("embed_tokens.weight", "shared_head.head.weight"))]
    assert own and all(torch.equal(found[name], before[name]) for name in own)
    assert torch.equal(found[f"model.layers.{FIRST}.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


# --- folders that don't fit -------------------------------------------------------------------------------------------


def changed(folder: Path, place: Path, change: Any) -> Path:
    shutil.copytree(folder, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_a_copy_that_differs_is_refused(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.{FIRST}.shared_head.head.weight"][7, 3] += 1

    place = changed(folder, tmp_path / "model", change)
    with pytest.raises(RankFailure, match=r"layers\.4\.shared_head\.head\.weight differs from lm_head\.weight"):
        train(recipe_for(place))


def test_a_folder_without_the_layers_says_so_when_it_is_exported(folder: Path, tmp_path: Path) -> None:
    """transformers writes the layers' number into config.json, and leaves their tensors out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(("model.layers.4.", "model.layers.5."))]:
            del tensors[name]

    place = changed(folder, tmp_path / "model", change)
    source = read_source(place)
    assert source.mtp_layers == source.raw["num_nextn_predict_layers"] == 0
    with pytest.raises(InputError, match=r"model\.mtp_loss_scale: 0\.1, but .* has no multi-token prediction layers"):
        read_source(place, mtp_loss_scale=0.1)
