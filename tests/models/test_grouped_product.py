"""The grouped product beside each expert's own, and where the experts' parameters lie in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcore_swift.models import grouped_product
from mcore_swift.models.grouped_product import ends_of, grouped_linear, in_line, rows_fit, stacked
from mcore_swift.recipe import MoeSection, OptimizerSection, ParallelSection
from tests.distributed.harness import in_fork, run_ranks
from tests.distributed.rank_model import micro_batches, open_model, recipe_for

SPLITS = ([3, 0, 5, 0], [0, 0, 0, 0], [2, 1, 4, 3])


def each_by_itself(x: Tensor, weights: Any, splits: list[int]) -> Tensor:
    return torch.cat([part @ weight.t() for part, weight in zip(x.split(splits), weights, strict=True)])


@in_fork
def test_the_product_is_each_experts_own() -> None:
    """Experts without a token, no token at all, and a gradient that is one number expanded."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, 8, 12, generator=generator, requires_grad=True)
    for splits in SPLITS:
        x = torch.randn(sum(splits), 12, generator=generator, requires_grad=True)
        expected = each_by_itself(x, weights, splits)
        wanted = torch.autograd.grad(expected.sum(), (x, weights))
        for form in (splits, torch.tensor(splits)):
            out = grouped_product.grouped_product(x, weights, ends_of(form, x.device))
            torch.testing.assert_close(out, expected)
            found = torch.autograd.grad(out.sum(), (x, weights))
            torch.testing.assert_close(found, wanted)


@in_fork
def test_parameters_get_each_experts_own_gradient() -> None:
    """One behind another in memory or not; frozen; and where main gradients are, there and nowhere else."""
    generator = torch.Generator().manual_seed(1)
    together = torch.randn(4, 8, 12, generator=generator)
    for weights in ([nn.Parameter(w) for w in together], [nn.Parameter(w.clone()) for w in together]):
        for splits in SPLITS:
            x = torch.randn(sum(splits), 12, generator=generator, requires_grad=True)
            expected = each_by_itself(x, weights, splits)
            wanted = torch.autograd.grad(expected.square().sum(), (x, *weights))
            ends = ends_of(splits, x.device)
            out = grouped_linear(x, weights, ends)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (x, *weights)), wanted)
            for main in (torch.ones(4, 8, 12), [torch.ones(8, 12) for _ in weights]):
                for weight, own in zip(weights, main, strict=True):
                    weight.main_grad, weight.grad_added_to_main_grad = own, False  # type: ignore[attr-defined]
                grouped_linear(x, weights, ends).square().sum().backward()
                for weight, own, gradient in zip(weights, main, wanted[1:], strict=True):
                    torch.testing.assert_close(own, 1 + gradient)
                    assert weight.grad_added_to_main_grad and weight.grad is not None  # type: ignore[attr-defined]
                    weight.grad = None
                    del weight.main_grad  # type: ignore[attr-defined]
            frozen = [nn.Parameter(weight.data, requires_grad=False) for weight in weights]
            (to_x,) = torch.autograd.grad(grouped_linear(x, frozen, ends).square().sum(), x)
            torch.testing.assert_close(to_x, wanted[0])


def test_what_lies_in_line_is_not_copied() -> None:
    together = torch.arange(24.0).view(4, 2, 3)
    views = list(together)
    assert stacked(views).data_ptr() == together.data_ptr() and torch.equal(stacked(views), together)
    for others in (views[::-1], views[::2], [views[0], views[2], views[1], views[3]], [v.t() for v in views]):
        found = stacked(others)
        assert torch.equal(found, torch.stack(others)) and found.data_ptr() != together.data_ptr()
    alone = [view.clone() for view in views]
    assert torch.equal(stacked(alone), together)


def test_new_parameters_are_put_in_line() -> None:
    module = nn.Module()
    for name in ("a", "b", "other", "c"):
        module.register_parameter(name, nn.Parameter(torch.randn(2, 4)))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    in_line(module, ["a", "b", "c"])
    assert [name for name, _ in module.named_parameters()] == ["other", "c", "b", "a"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    own = [module.get_parameter(name) for name in ("a", "b", "c")]
    assert stacked(own).data_ptr() == own[0].data_ptr()


@pytest.mark.parametrize(("size", "fits"), [((8, 16), True), ((8, 12), True), ((8, 6), False), ((7, 16), False)])
def test_rows_of_sixteen_bytes(size: tuple[int, int], fits: bool) -> None:
    assert rows_fit(torch.empty(size)) is fits


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
def test_training_neither_copies_weights_nor_adds_gradients_one_by_one(models: Any, distributed: bool) -> None:
    optimizer = OptimizerSection(distributed=distributed)
    layout = ParallelSection(dp=2, ep=2)
    recipe = recipe_for(models("qwen3-moe"), layout, moe=MoeSection(grouped=True), optimizer=optimizer)
    for copied, added, layers in run_ranks(copies_of_a_step, 2, recipe):
        assert layers and not copied and added == 2 * layers  # fc1 and fc2


def copies_of_a_step(recipe: Any) -> tuple[int, int, int]:
    """In one step's forward and backward passes: weights copied, main gradients added to at once, layers passed."""
    from mcore_swift.objectives.registry import OBJECTIVES
    from mcore_swift.parallel import ranks
    from mcore_swift.training import step

    model = open_model(recipe)
    view, seen = grouped_product._view, []

    def watched(tensors: Any) -> Tensor | None:
        found = view(tensors)
        seen.append((found is not None, hasattr(tensors[0], "main_grad")))
        return found

    grouped_product._view = watched
    batches = micro_batches(recipe, model.source.vocab_size, ranks())
    step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], torch.device("cpu"))
    layers = sum(hasattr(module, "num_gemms") for module in model.models[0].modules()) // 2
    copied = sum(not in_line for in_line, is_weight in seen if is_weight)
    added = sum(in_line for in_line, is_weight in seen if not is_weight)
    return copied, added, layers * len(batches)
