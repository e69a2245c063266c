"""Stand-ins for what needs a GPU, so that the paths around it run on the CPU. Used inside forked ranks only.

`LeanAdam` keeps to the contract of Transformer Engine's FusedAdam (2.20): the forms it holds its states in, how they
are asked for and set, `decoupled_grad`, the step in each group. `pretend_on_gpu` makes Megatron's HybridDeviceOptimizer
take the distributed optimizer's shards for a GPU's; `meshes_of_cpus` gives FSDP meshes for its meshes of GPUs.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch


class LeanAdam(torch.optim.Optimizer):
    """AdamW whose moments may be bf16, and whose fp32 parameters may be the remainders of bf16 ones."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable and master_weight_dtype == torch.float32
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = store_param_remainders and master_weights

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        state = self.state[param]
        for name, dtype in self.dtypes.items():
            state[name] = torch.zeros_like(param, dtype=dtype)
        if self.master_weights and store_param_remainders:
            state["master_param"] = torch.zeros_like(param, dtype=torch.int16)
        elif self.master_weights:
            state["master_param"] = param.detach().float().clone()

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        held = self.state[param][name]
        return held if held.dtype == torch.int16 else held.float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        from mcore_swift.training.optimizer_state import join_remainder, split_remainder

        if (param.decoupled_grad if self.use_decoupled_grad else param.grad) is None:  # type: ignore[union-attr]
            return
        remainders = self.store_param_remainders and param.dtype == torch.bfloat16
        if not self.state[param]:
            self.initialize_state(param, remainders)
        state = self.state[param]
        grad = (param.decoupled_grad if self.use_decoupled_grad else param.grad).float()  # type: ignore[union-attr]
        main = join_remainder(param, state["master_param"]) if remainders else state.get("master_param", param)
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        main = main * (1 - group["lr"] * group["weight_decay"])
        denominator = (square.sqrt() / (1 - beta2 ** group["step"]) ** 0.5).add_(group["eps"])
        main = main.addcdiv(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        param.copy_(main)
        if remainders:
            state["master_param"].copy_(split_remainder(param, main))
        elif "master_param" in state:
            state["master_param"].copy_(main)


def install_lean_adam() -> None:
    """Makes Megatron-Core take LeanAdam for Transformer Engine's FusedAdam, in this process."""
    import megatron.core.optimizer as optimizer

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].FusedAdam = LeanAdam  # type: ignore[attr-defined]
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = LeanAdam, False  # type: ignore[assignment]
    from megatron.core.optimizer import distrib_optimizer

    distrib_optimizer.Adam = LeanAdam  # type: ignore[attr-defined]
    for module in (optimizer, sys.modules["megatron.core.optimizer.optimizer_config"]):
        module.is_te_min_version = lambda version, **_: True  # type: ignore[attr-defined]


def pretend_on_gpu() -> None:
    """Tensors that HybridDeviceOptimizer is given are "on a GPU", with what is made of them, until `.cpu()`."""
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    on_gpu: dict[int, torch.Tensor] = {}  # the tensors are kept, so that no id is used twice
    original = hybrid_optimizer.HybridDeviceOptimizer.__init__

    def init(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        on_gpu.update((id(param), param) for group in params for param in group["params"])
        original(self, params, *args, **kwargs | {"pin_cpu_grads": False})

    def spreading(method: Any) -> Any:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            result = method(self, *args, **kwargs)
            if id(self) in on_gpu:
                on_gpu[id(result)] = result
            return result

        return call

    clone = torch.Tensor.clone
    hybrid_optimizer.HybridDeviceOptimizer.__init__ = init
    tensor: Any = torch.Tensor
    for name in ("detach", "clone", "float"):
        setattr(tensor, name, spreading(getattr(tensor, name)))
    tensor.is_cuda = property(lambda self: id(self) in on_gpu)
    tensor.cpu = lambda self: clone(self)
    tensor.pin_memory = lambda self, *args: self


def meshes_of_cpus() -> None:
    """Meshes of GPUs are meshes of CPUs, and Megatron-FSDP, which wants a GPU's number, has one where it is made."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
    from torch.distributed.device_mesh import DeviceMesh

    mesh_init, fsdp_init, from_group = DeviceMesh.__init__, MegatronFSDP.__init__, DeviceMesh.from_group

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        mesh_init(self, "cpu", *args, **kwargs)

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        current_device = torch.cuda.current_device
        torch.cuda.current_device = lambda: 0
        try:
            fsdp_init(self, *args, **kwargs)
        finally:
            torch.cuda.current_device = current_device

    def of_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu", *args, **kwargs)

    DeviceMesh.__init__ = init  # type: ignore[method-assign]
    DeviceMesh.from_group = staticmethod(of_group)  # type: ignore[method-assign]
    MegatronFSDP.__init__ = make  # type: ignore[method-assign]
