"""The choice of experts among groups where a model ranks groups otherwise than Megatron-Core does.

Megatron 0.19.2 ranks a group by the sum of its top_k // groups best scores, which is DeepSeek-V3's rule for
DeepSeek-V3's sizes. DeepSeek-V2 ranks it by its best score (arXiv 2405.04434, section 2.2.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn


@dataclass
class GroupChoice:
    """Takes the place of a router's replay, Megatron's way to have experts chosen by someone else.

    best: how many of a group's scores are added up to rank it.
    """

    best: int

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable[..., object]
    ) -> tuple[Tensor, Tensor]:
        """scores [tokens, experts] → scores and numbers [tokens, topk] of the best experts of the best groups."""
        assert num_groups and group_topk
        grouped = scores.view(scores.size(0), num_groups, -1)
        ranks = grouped.topk(self.best, dim=-1).values.sum(-1)
        chosen = ranks.new_zeros(ranks.shape).scatter_(1, ranks.topk(group_topk, dim=-1).indices, 1).bool()
        return grouped.masked_fill(~chosen[..., None], float("-inf")).view_as(scores).topk(topk, dim=-1)


def rank_groups_by(model: nn.Module, best: int) -> None:
    """Makes all routers of the model that choose among groups rank a group by its `best` best scores."""
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.config.moe_router_group_topk:
            module.router_replay = GroupChoice(best)  # type: ignore[assignment]
