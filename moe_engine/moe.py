"""The mixture-of-experts layer: router, gate, permutation, experts."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor, nn

from moe_engine.config import ACTIVATIONS, MoEConfig
from moe_engine.router import JitterKey, Router, RouterStats

# A backend is a module with
#   route(logits, top_k, gate, select_bias) → (routed, RouterStats)
#   expert_mlp(x, w_up, b_up, w_down, b_down, *routed, activation, save, autotune) → out
#   check_available()
# where `routed` is the gate weights and the order of the rows, as that backend wants them.
_BACKENDS = {"torch": "moe_engine.torch_backend", "triton": "moe_engine.triton_backend"}


def _backend(name: str) -> ModuleType:
    """The module of a backend, able to run. The Triton kernels are imported for those who ask for them.

    Raises:
        ValueError: it cannot run here.
    """
    module = importlib.import_module(_BACKENDS[name])
    module.check_available()
    return module


@functools.cache
def _gpu_backend() -> ModuleType | None:
    """What `auto` takes for tensors on a GPU; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        return _backend("triton")
    except (ImportError, ValueError) as error:
        warnings.warn(f"the torch backend computes the experts, which is slow on a GPU: {error}", stacklevel=3)
        return _backend("torch")


class MoELayer(nn.Module):
    """Sparse mixture of experts.

    >>> out, stats = MoELayer(MoEConfig(d_model=64, d_ff=128))(torch.randn(4, 16, 64))

    Parameters: `router.weight (E, D)`, `router.bias (E)`, `w_up (E, D, 2F)` with gate and up columns interleaved
    (even = gate), `b_up (E, 2F)`, `w_down (E, F, D)`, `b_down (E, D)`. Buffer, with `router_balance="bias"`:
    `router.select_bias (E)`.

    Args:
        config: sizes and choices.
    Raises:
        ValueError: the configured backend is not available.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        # Functions, since a module can be neither copied nor pickled. `auto` looks at where x is.
        backend = _backend("torch" if config.backend == "auto" else config.backend)
        on_gpu = (_gpu_backend() if config.backend == "auto" else None) or backend
        self._functions = (backend.route, backend.expert_mlp)
        self._gpu_functions = (on_gpu.route, on_gpu.expert_mlp)
        e, d, f = config.num_experts, config.d_model, config.d_ff
        self.router = Router(config)
        self.w_up = nn.Parameter(torch.empty(e, d, 2 * f))
        self.b_up = nn.Parameter(torch.empty(e, 2 * f)) if config.expert_bias else None
        self.w_down = nn.Parameter(torch.empty(e, f, d))
        self.b_down = nn.Parameter(torch.empty(e, d)) if config.expert_bias else None
        if not self.w_up.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of the configured standard deviation, zero biases."""
        if self.router.select_bias is not None:
            self.router.select_bias.zero_()
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[2] in ("bias", "b_up", "b_down"):
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.init_std)

    def forward(self, x: Tensor, jitter_key: JitterKey | None = None) -> tuple[Tensor, RouterStats]:
        """Route every token to its experts.

        Args:
            x: `(…, D)`, floating point, of the parameters' dtype. Under `torch.autocast` of any: x and the experts'
                weights are cast to autocast's dtype, the router stays in fp32.
            jitter_key: in training, what the noise of `router_jitter` is drawn from; None: no noise.
        Returns:
            The layer's output, of x's shape and dtype (autocast's, under it), and the router's statistics.
        Raises:
            ValueError: x's last dimension is not D, or its dtype is not that of the weights.
        """
        config = self.config
        if x.shape[-1] != config.d_model:
            raise ValueError(f"x: expected a last dimension of d_model = {config.d_model}, got shape {tuple(x.shape)}")
        weights = (self.w_up, self.b_up, self.w_down, self.b_down)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # it does not see into the backends' operations
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            weights = tuple(w if w is None else w.to(dtype) for w in weights)
        if x.dtype != weights[0].dtype:
            raise ValueError(f"x: expected the dtype of the weights, {weights[0].dtype}, got {x.dtype}")
        rows = x.reshape(-1, config.d_model)
        route, expert_mlp = self._gpu_functions if rows.is_cuda else self._functions
        # In x's shape for the noise, which is drawn by sequence; the rows' own storage, which the experts keep anyway.
        logits = self.router(rows.view(x.shape), jitter_key)
        routed, stats = route(logits, config.top_k, config.gate, self.router.select_bias)
        # Expert parallelism would exchange rows here, and back before they are combined.
        out = expert_mlp(rows, *weights, *routed, ACTIVATIONS[config.activation], config.save, config.autotune)
        return out.view_as(x), stats
