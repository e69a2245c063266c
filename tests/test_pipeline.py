"""Pipeline layouts as pure functions: reading, balancing, and the share of time that a pipeline stands idle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mcore_swift.pipeline import PipelineWish, balanced, bubble_fraction, imbalance, layout_of, parse, written


def layout(layers: int, *, pp: int, vpp: int = 1, mtp: int = 0, loss_cost: float = 1.4, **wish: Any) -> str:
    return written(layout_of(PipelineWish(**wish), pp=pp, vpp=vpp, layers=layers, mtp=mtp, loss_cost=loss_cost))


@pytest.mark.parametrize(
    "text", ["Ettt|(tt|)*29,m|L", "(tt|)*2tt", "E t*3 | t*2 L", "((t)*2|)*2t", "Et*20|(t*20|)*2t*20L", "E|L"]
)
def test_read_as_megatron_reads_it(text: str) -> None:
    from tests.distributed.harness import prepared

    prepared()
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    simple = text.replace(" ", "").replace("((t)*2|)", "(tt|)")  # brackets in brackets are ours alone
    theirs = PipelineParallelLayerLayout.parse_str_to_list(simple)
    assert parse(text) == tuple("".join(letters[kind.name] for kind in chunk) for chunk in theirs)


@pytest.mark.parametrize("text", ["", "x", "E(t", "E)t", "Et*", "Et*x", "*3", "e|l", "Et*-1L"])
def test_other_texts_are_no_layouts(text: str) -> None:
    assert parse(text) is None


def test_what_divides_is_even() -> None:
    assert layout(80, pp=4) == "Et*20|t*20|t*20|t*20L"
    assert layout(8, pp=2, vpp=2) == "Ett|tt|tt|ttL"


def test_balanced_where_it_does_not_divide() -> None:
    """Qwen2.5-72B's 80 layers, whose output layer takes as long as 1.4 of them."""
    assert layout(80, pp=3) == "Et*27|t*27|t*26L"
    assert layout(80, pp=6) == "Et*13|t*13|t*14|t*14|t*14|t*12L"
    assert layout(80, pp=7) == "Et*11|t*11|t*12|t*12|t*12|t*12|t*10L"


def test_deepseek_v3() -> None:
    """61 layers on 16 stages with the multi-token prediction layer, and its own loss, on the last one."""
    found = layout(61, pp=16, mtp=1, loss_cost=1.6)
    assert found == "Et*4|" + "t*4|" * 14 + "tmL"


def test_wishes() -> None:
    assert layout(5, pp=3, first_stage_layers=2) == "Ett|t|ttL"
    assert layout(5, pp=2, vpp=2, last_stage_layers=2) == "Et|t|tt|tL"
    assert layout(6, pp=2, vpp=2, account_embedding=True, account_loss=True) == "Et|tt|tt|tL"
    assert layout(2, pp=4, account_embedding=True, account_loss=True) == "E|t|t|L"
    assert layout(5, pp=3, account_loss=True) == "Ett|tt|tL"
    assert layout(4, pp=2, layout="Et|t*3L") == "Et|t*3L"


def best(layers: int, chunks: int, loss: float) -> float:
    """The shortest time of the slowest chunk, by trying everything."""
    splits = (s for s in itertools.product(range(1, layers + 1), repeat=chunks) if sum(s) == layers)
    return min(max(*split[:-1], split[-1] + loss) for split in splits)


@pytest.mark.parametrize("loss", [0.0, 0.6, 1.4, 3.2])
def test_nothing_is_faster(loss: float) -> None:
    for layers, (pp, vpp) in itertools.product(range(4, 10), [(2, 1), (3, 1), (4, 1), (2, 2)]):
        counts = balanced(layers, pp=pp, vpp=vpp, embedding=0.0, loss=loss)
        assert sum(counts) == layers and min(counts) >= 1
        assert max(*counts[:-1], counts[-1] + loss) == pytest.approx(best(layers, pp * vpp, loss))


def test_chunks_of_a_rank_are_evened_out() -> None:
    counts = balanced(80, pp=7, vpp=2, embedding=0.0, loss=1.4)
    ranks = [counts[rank] + counts[rank + 7] + 1.4 * (rank == 6) for rank in range(7)]
    assert max(ranks) - min(ranks) <= 1


def one_forward_one_backward(pp: int, micro_batches: int) -> float:
    """Idle share of 1F1B by going through it: forward takes 1, backward 2."""
    ends: dict[tuple[str, int, int], float] = {}
    orders = []
    for rank in range(pp):
        warm = min(pp - rank - 1, micro_batches)
        order = [("F", m) for m in range(warm)]
        for m in range(warm, micro_batches):
            order += [("F", m), ("B", m - warm)]
        orders.append(order + [("B", m) for m in range(micro_batches - warm, micro_batches)])
    clock, at = [0.0] * pp, [0] * pp
    while any(at[rank] < len(orders[rank]) for rank in range(pp)):
        for rank in range(pp):
            if at[rank] == len(orders[rank]):
                continue
            kind, m = orders[rank][at[rank]]
            near = rank - 1 if kind == "F" else rank + 1
            if 0 <= near < pp and (kind, near, m) not in ends:
                continue
            start = max(clock[rank], ends.get((kind, near, m), 0.0))
            clock[rank] = ends[kind, rank, m] = start + (1.0 if kind == "F" else 2.0)
            at[rank] += 1
    return 1 - 3 * micro_batches / max(clock)


@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 4), (2, 4), (4, 8), (4, 4), (8, 32)])
def test_bubble(pp: int, micro_batches: int) -> None:
    found = bubble_fraction(pp=pp, vpp=1, micro_batches=micro_batches)
    assert found == pytest.approx(one_forward_one_backward(pp, micro_batches))


def test_interleaving_divides_the_bubble() -> None:
    for vpp in (2, 4):
        bubble = bubble_fraction(pp=8, vpp=vpp, micro_batches=16)
        assert bubble / (1 - bubble) == pytest.approx(7 / 16 / vpp)


def test_imbalance() -> None:
    assert imbalance(("Ett", "tt", "ttL"), pp=3, loss_cost=0.0) == 0.0
    assert imbalance(("Ett", "tt", "ttL"), pp=3, loss_cost=1.0) == pytest.approx(1 - 7 / 9)
    assert imbalance(("Et", "t", "t", "tL"), pp=2, loss_cost=2.0) == pytest.approx(1 - 3 / 4)
