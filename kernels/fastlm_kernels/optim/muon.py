"""Muon for matrices, AdamW for everything else, as one optimizer over all of a model's parameters.

Muon, for a matrix W (r, c) with gradient G, momentum mu, rate lr, decay wd:

    M = M + (1 - mu) (G - M)                         momentum, a running mean, kept in fp32
    U = G + mu (M - G)  with Nesterov,  else M
    O = newton_schulz(U)                             about U's nearest semi-orthogonal matrix
    W = (1 - lr wd) W - lr sqrt(max(1, r / c)) O

On the kernels' path all momenta are one launch, and so are all results' applications (`_muon_plan.py`); matrices of one
shape go through Newton-Schulz (`_newton_schulz.py`) as one batch. AdamW is `torch.optim.AdamW`'s update: through the
launch of `_update.py`, or torch's fused operator.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _runtime
from ._muon_plan import MuonPlan, scale_of, usable
from ._newton_schulz import newton_schulz
from ._options import (
    StepOptions,
    check_group,
    clip_in_place,
    entries,
    fill_with_zeros,
    finish_loading,
    gradients,
    in_32_bits,
    in_fp32,
    make_plan,
    opaque,
    readable,
    scaling,
    strided,
    take_step,
    unscale,
)
from ._plan import Control, Plan, capturing_graph, laid_out_as
from ._sharded import cut_alike, like_shards_of, local, shard_group, sharded_as, whole
from .torch_optim import ADAM

# Under these decorated methods torch imports its compiler, most of a second, on the first call.
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
_state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
_zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

Split = int | Sequence[int]


def _block_rows(param: Tensor, split: Split) -> list[int]:
    """Rows of each block that `split` (a number of equal blocks, or their sizes) cuts `param` into."""
    rows = param.shape[0] if param.dim() == 2 else 0
    sizes = [rows // split] * split if isinstance(split, int) and split > 0 else split
    if isinstance(sizes, int) or not sizes or min(sizes) < 1 or sum(sizes) != rows:
        raise ValueError(
            f"split: got {split!r} for a parameter of shape {tuple(param.shape)}; give a number of equal blocks of "
            "rows, or block sizes that add up to the rows of a matrix"
        )
    return list(sizes)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on matrices, AdamW on the rest.

    params       groups (dicts), each with `use_muon`: True or False, and its own hyperparameters; a group, or a plain
                 list of parameters, without `use_muon` is cut in two: 2-d parameters and the rest. Embeddings and
                 heads are 2-d too, and belong under AdamW: name them in a group of their own.
    lr           learning rate of Muon groups;  adamw_lr that of AdamW groups that bring no `lr`. Float or 0-d tensor
    momentum, nesterov, ns_steps       Muon's;      betas, eps       AdamW's
    weight_decay decoupled, in both: p *= 1 - lr * weight_decay
    split        {parameter: number of equal row blocks, or their sizes}: blocks of a merged matrix (Q, K and V) are
                 orthogonalised and scaled apart
    max_grad_norm, skip_nonfinite, zero_grads, ...     as for the other optimizers; nothing is read on the host, on
                 either path

    Muon's state: "momentum_buffer", fp32 (float64 for float64) whatever the parameter's dtype. AdamW's: "step",
    "exp_avg", "exp_avg_sq", as in `torch.optim.AdamW(fused=True)`. Loading keeps the dtypes saved.
    grad_norm: 0-d tensor, the last step's global norm before clipping (None without max_grad_norm and
    skip_nonfinite); skipped_steps: 0-d int64 tensor. ValueError for a Muon parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.02,
        adamw_lr: float | Tensor = 0.003,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        split: Mapping[Tensor, Split] | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        zero_grads: bool = False,
        state_bits: int = 32,
    ):
        self.options = StepOptions(
            max_grad_norm, skip_nonfinite, master_weights, stochastic_rounding, zero_grads, state_bits
        )
        self.grad_norm: Tensor | None = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64)
        self._plans: tuple[Plan | None, MuonPlan | None, Control] | None = None
        self._captured: list[Any] = []  # what graphs read: never freed before the optimizer
        self._adamw_lr = adamw_lr
        self._blocks = {param: _block_rows(param, blocks) for param, blocks in (split or {}).items()}
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, defaults | {"betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._check_split()

    def _check_split(self) -> None:
        """ValueError for a parameter in `split` that is no Muon group's."""
        matrices = {p for group in self.param_groups if group["use_muon"] for p in group["params"]}
        for param in self._blocks.keys() - matrices:
            raise ValueError(
                f"split: got a parameter of shape {tuple(param.shape)} that no Muon group holds; leave it out, or put "
                "it in a group with use_muon=True"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one without `use_muon` becomes two, its matrices and the rest."""
        if "use_muon" not in param_group:
            members = param_group["params"]
            members = [members] if isinstance(members, Tensor) else list(members)
            for use_muon in (True, False):
                part = [m for m in members if (_tensor(m).dim() == 2) == use_muon]
                if part:
                    self.add_param_group({**param_group, "params": part, "use_muon": use_muon})
            return
        if not param_group["use_muon"]:
            param_group.setdefault("lr", self._adamw_lr)
            param_group.setdefault("fused", True)  # torch's sign for: "step" lives on the parameter's device
        _add_param_group(self, param_group)
        _check_group(self.param_groups[-1])
        check_group(self, self.param_groups[-1])

    # GradScaler may leave its scale and its finding to `step`.
    _step_supports_amp_scaling = True

    @_runtime.with_kernel
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the closure's result, if one is given."""
        return opaque(take_step)(self, closure)

    def _step_fused(self) -> bool:
        groups = self.param_groups
        kinds: dict[bool, tuple[list[Tensor], list[Tensor], list[int]]] = {True: ([], [], []), False: ([], [], [])}
        for p, grad, number in zip(*entries(groups), strict=True):
            for column, value in zip(kinds[groups[number]["use_muon"]], (p, local(grad), number), strict=True):
                column.append(value)  # type: ignore[arg-type]
        (matrices, updates, _), (rest, grads, _) = kinds[True], kinds[False]
        if not matrices and not rest:
            return True
        plans = self._plans
        if plans is None or not self._fits(plans, kinds):
            params = matrices + rest
            plain = readable([local(p) for p in params], updates + grads)
            if not (plain and cut_alike(params) and usable(matrices)):
                return False
            plans = self._plans = self._make_plans(kinds)
        elif not strided(updates + grads):
            return False
        if capturing_graph((matrices + rest)[0].device):
            self._captured.append(plans)
        adamw, muon, control = plans
        sent, placed = adamw.send(grads, groups) if adamw else ([], [])
        muon_sent, muon_placed = muon.send(updates, groups) if muon else ([], [])
        values, self.grad_norm = control.run(sent + muon_sent, scaling(self), self.skipped_steps)
        if adamw:
            adamw.update(sent, values, grads, placed)
        if muon:
            muon.update(muon_sent, values, updates, muon_placed, groups)
        return True

    def _fits(self, plans: tuple[Plan | None, MuonPlan | None, Control], kinds: Any) -> bool:
        for plan, (params, grads, _) in zip(plans[:2], (kinds[False], kinds[True]), strict=True):
            if (plan is None) != (not params):
                return False
            if plan is not None and not plan.fits(params, grads, self.param_groups, self.state):
                return False
        return True

    def _make_plans(self, kinds: Any) -> tuple[Plan | None, MuonPlan | None, Control]:
        (matrices, updates, numbers), (rest, grads, rest_numbers) = kinds[True], kinds[False]
        adamw = make_plan(self, ADAM, rest, grads, rest_numbers) if rest else None
        muon = None
        if matrices:
            muon = MuonPlan(self, matrices, updates, numbers, self._blocks, torch.float32)
        bundles = (adamw.bundles if adamw else []) + (muon.bundles if muon else [])
        self.skipped_steps = self.skipped_steps.to(bundles[0].device)
        return adamw, muon, Control(bundles, self.options, shard_group((matrices + rest)[0]))

    def _step_torch(self) -> None:
        grads = gradients(self.param_groups)
        skip = unscale(self, grads)
        found = self._clip_and_find(grads) if self.options.needs_norm and grads else None
        if not skip:
            with in_32_bits(self), in_fp32(self) as copies:
                blocks = self._blocks | {wide: self._blocks[p] for p, wide in copies if p in self._blocks}
                for group in self.param_groups:
                    params = [p for p in group["params"] if p.grad is not None]
                    if any(p.grad.is_sparse for p in params):
                        raise RuntimeError("MuonWithAdamW does not support sparse gradients")
                    if group["use_muon"]:
                        self._muon(group, params, found, blocks)
                    else:
                        self._adamw(group, params, found)
        if self.options.zero_grads:
            fill_with_zeros(grads)

    def _clip_and_find(self, grads: list[Tensor]) -> Tensor | None:
        """Clip if asked; 1.0 where the update has to be skipped and 0.0 where not, on the device, if asked."""
        self.grad_norm = norm = whole(torch.nn.utils.get_total_norm(grads))
        found = None
        if self.options.skip_nonfinite:
            found = (~norm.isfinite()).float()
            self.skipped_steps = self.skipped_steps.to(found.device) + found.long()
        if self.options.max_grad_norm is not None:
            clip_in_place([local(grad) for grad in grads], norm, self.options.max_grad_norm)
        return found

    def _muon(
        self, group: dict[str, Any], params: list[Tensor], found: Tensor | None, splits: dict[Tensor, list[int]]
    ) -> None:
        """Momentum, then orthogonalised updates, all blocks of one shape at once."""
        results = {p: self._momentum(group, p, found) for p in params}
        by_shape: dict[Any, list[Tensor]] = defaultdict(list)
        for p in params:
            # Under FSDP2 a process holds some rows; orthogonal are whole blocks, so every process forms them all.
            results[p] = whole(results[p]).clone()
            for block in results[p].split(splits.get(p, [p.shape[0]])):
                by_shape[(block.shape, block.device, block.dtype)].append(block)
        keep = 1.0 if found is None else 1.0 - found
        for (shape, device, dtype), blocks in by_shape.items():
            working = torch.bfloat16 if device.type == "cuda" and dtype != torch.float64 else dtype
            ortho = newton_schulz(torch.stack(blocks).to(working), group["ns_steps"]).to(dtype)
            ortho.mul_(-group["lr"] * scale_of(group, *shape) * keep)
            for block, update in zip(blocks, ortho, strict=True):
                block.copy_(update)
        for p in params:
            local(p).mul_(1 - group["lr"] * group["weight_decay"] * keep).add_(local(sharded_as(p, results[p])))

    def _momentum(self, group: dict[str, Any], p: Tensor, found: Tensor | None) -> Tensor:
        """Update p's momentum in place (not where `found`) and return what is to be orthogonalised."""
        assert p.grad is not None
        state = self.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=wide)
        buffer, grad = local(state["momentum_buffer"]), local(p.grad).to(wide)
        if found is None:
            buffer.lerp_(grad, 1 - group["momentum"])
        else:
            # inf and NaN would survive a factor of 0.
            grad = grad.nan_to_num(0.0, 0.0, 0.0)
            buffer.lerp_(grad, ((1 - group["momentum"]) * (1 - found)).to(wide))
        return like_shards_of(p, grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)

    def _adamw(self, group: dict[str, Any], params: list[Tensor], found: Tensor | None) -> None:
        """torch.optim.AdamW's fused update, one call per device and dtype."""
        by_kind: dict[Any, list[Tensor]] = defaultdict(list)
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            by_kind[(p.device, p.dtype)].append(p)
        for (device, _), members in by_kind.items():
            states = [self.state[p] for p in members]
            steps = [state["step"] for state in states]
            skip = None if found is None else found.to(device)
            torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [local(p) for p in members],
                [laid_out_as(local(p), local(p.grad)) for p in members],  # type: ignore[arg-type]
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
            if skip is not None:
                torch._foreach_sub_(steps, [skip] * len(steps))  # pyright: ignore[reportPrivateImportUsage]

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and groups alone when an optimizer is copied or pickled.
        ours = ("options", "grad_norm", "skipped_steps", "_adamw_lr", "_blocks")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plans, self._captured = None, []
        super().__setstate__(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient, or fill it with 0."""
        _zero_grad(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`."""
        return _state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state is a copy and keeps its dtype (torch casts it to the parameter's)."""
        _load_state_dict(self, copy.deepcopy(state_dict))
        finish_loading(self, state_dict)


def _tensor(member: Any) -> Tensor:
    """The parameter in an entry of a group: (name, parameter) or the parameter."""
    return member[1] if isinstance(member, tuple) else member


def _check_group(group: dict[str, Any]) -> None:
    """ValueError for a hyperparameter or a parameter that the update could not use."""
    beta1, beta2 = group["betas"]
    limits = {
        "lr": (group["lr"], group["lr"] >= 0),
        "momentum": (group["momentum"], 0 <= group["momentum"] < 1),
        "betas": (group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        "eps": (group["eps"], group["eps"] >= 0),
        "weight_decay": (group["weight_decay"], group["weight_decay"] >= 0),
        "ns_steps": (group["ns_steps"], 0 < group["ns_steps"] < 100),
    }
    for name, (value, good) in limits.items():
        if not good:
            raise ValueError(
                f"{name}: got {value!r}; rates, eps and decay are 0 or above, momentum and betas lie in [0, 1), "
                "ns_steps in 1..99"
            )
    for p in group["params"]:
        if group["use_muon"] and p.dim() != 2:
            raise ValueError(
                f"use_muon: got a parameter of shape {tuple(p.shape)}; Muon takes matrices, put it in a group with "
                "use_muon=False"
            )
        if not p.is_floating_point():
            raise ValueError(f"params: got a {p.dtype} parameter; give real floating-point parameters")
