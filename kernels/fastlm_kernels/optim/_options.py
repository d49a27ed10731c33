"""Our keywords of every optimizer, and which path a step takes.

kernels   `_plan.Plan`: one launch updates all parameters of a form, the options folded into it
torch     closure;  norm = sqrt(sum over all gradients of g^2)
          skip_nonfinite and norm not finite: torch's step is left out
          max_grad_norm: g *= min(1, max_grad_norm / (norm + 1e-6)), in place, as `clip_grad_norm_` does
          torch's own step, on fp32 copies under master_weights and stochastic_rounding
          zero_grads: gradients filled with 0, `p.grad` kept
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _runtime
from . import _eight_bits
from ._plan import KERNEL_DTYPES, MASTER, SEED, STEP, Control, Plan, Rule, capturing_graph, dense, make_member
from ._rounding import round_stochastically
from ._sharded import cut_alike, is_sharded, local, shard_group


@dataclass(frozen=True)
class StepOptions:
    """Our keywords, checked."""

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    master_weights: bool = False
    stochastic_rounding: bool = False
    zero_grads: bool = False
    state_bits: int = 32

    def __post_init__(self) -> None:
        limit = self.max_grad_norm
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 < limit < math.inf):
            raise ValueError(f"max_grad_norm: got {limit!r}; give a finite number above 0, or None for no clipping")
        if self.state_bits not in (8, 32):
            raise ValueError(f"state_bits: got {self.state_bits!r}; give 32, or 8 for AdamW and Adam")
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "stochastic_rounding: got True beside master_weights=True; leave one out, masters lose no update"
            )

    @property
    def needs_norm(self) -> bool:
        """Whether the step begins with a reduction over all gradients."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def wide(self) -> bool:
        """Whether 16-bit parameters are updated in fp32, with fp32 states, or with states of 8 bits."""
        return self.master_weights or self.draws

    @property
    def draws(self) -> bool:
        """Whether something is rounded at random."""
        return self.stochastic_rounding or self.state_bits == 8


def gradients(param_groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """Every gradient that is there, in the groups' order."""
    return [p.grad for group in param_groups for p in group["params"] if p.grad is not None]


def clip_in_place(grads: list[Tensor], norm: Tensor, max_grad_norm: float) -> None:
    """Scale all gradients by min(1, max_grad_norm / (norm + 1e-6)), with no host read."""
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))


def fill_with_zeros(grads: list[Tensor]) -> None:
    """Zero every gradient in place."""
    if grads:
        torch._foreach_zero_(grads)  # pyright: ignore[reportPrivateImportUsage]


class WithOptions:
    """Mixin before a `torch.optim` class: our keywords, and a step that takes the kernels where they can run.

    grad_norm      0-d tensor, the last step's norm before clipping; None where no option asks for it
    skipped_steps  0-d int64 tensor, how many steps `skip_nonfinite` has left out
    """

    rule: ClassVar[Rule | None] = None

    options: StepOptions
    grad_norm: Tensor | None
    skipped_steps: Tensor

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        zero_grads: bool = False,
        state_bits: int = 32,
        **kwargs: Any,
    ):
        options = StepOptions(
            max_grad_norm, skip_nonfinite, master_weights, stochastic_rounding, zero_grads, state_bits
        )
        if state_bits == 8 and (self.rule is None or self.rule.name != "adam"):
            name = type(self).__name__
            raise ValueError(f"state_bits: got 8 for {name}; AdamW and Adam have states of 8 bits, leave it at 32")
        self._install(options, torch.zeros((), dtype=torch.int64))
        super().__init__(*args, **kwargs)
        if options.wide:
            _widen(self)

    def _install(self, options: StepOptions, skipped_steps: Tensor) -> None:
        self.options, self.skipped_steps = options, skipped_steps
        self.grad_norm = None
        self._plan: tuple[Any, Control] | None = None
        self._captured: list[Any] = []  # what graphs read: never freed before the optimizer

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and groups alone when an optimizer is copied or pickled.
        return {**super().__getstate__(), "fastlm_options": (self.options, self.skipped_steps)}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        installed = state.pop("fastlm_options", None)
        if installed is not None:
            self._install(*installed)
        super().__setstate__(state)  # type: ignore[misc]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)  # type: ignore[misc]
        check_group(self, self.param_groups[-1])  # type: ignore[attr-defined]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler's question: may it leave scale and inf check to `step`, on the device?"""
        return self.__dict__.get("_torch_scales", False) or obstacle(self) is None

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_torch_scales"] = value

    @_runtime.with_kernel
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the closure's result, if one is given."""
        return opaque(take_step)(self, closure)

    step._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _step_fused(self) -> bool:
        return _step_fused(self)

    def _step_torch(self) -> None:
        _step_torch(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state keeps the dtype it was saved in (torch casts it to the parameter's)."""
        super().load_state_dict(state_dict)  # type: ignore[misc]
        finish_loading(self, state_dict)


def check_group(optimizer: Any, group: dict[str, Any]) -> None:
    """ValueError for what our keywords do not know: a parameter, or a class's own option beside them."""
    options: StepOptions = optimizer.options
    for p in group["params"] if options.stochastic_rounding else ():
        if p.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"stochastic_rounding: got a {p.dtype} parameter of shape {tuple(p.shape)}; give bfloat16 parameters "
                "(float32 ones lose nothing and stay as they are), or use master_weights"
            )
    if options.state_bits != 8:
        return
    for option in ("amsgrad", "differentiable"):
        if group.get(option):
            raise ValueError(f"{option}: got True beside state_bits=8; leave one out")
    for p in group["params"]:
        if is_sharded(p):
            raise ValueError(
                f"state_bits: got 8 for a sharded parameter of shape {tuple(p.shape)}; use state_bits=32 under FSDP2, "
                "which shares the states out already, or DDP"
            )


def opaque(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` hidden from Dynamo, which is not imported for it (most of a second) where nobody else has."""
    return fn if sys.modules.get("torch._dynamo") is None else _disabled(fn)


@functools.cache
def _disabled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return sys.modules["torch._dynamo"].disable(fn)


def finish_loading(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Copies of the saved states in place of torch's, which it has cast to the parameters' dtype; then their width."""
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for saved_id, p in zip(saved_ids, params, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and optimizer.state[p][key].dtype != value.dtype:
                optimizer.state[p][key] = value.detach().to(p.device, copy=True)
    for group in optimizer.param_groups:
        check_group(optimizer, group)
    fit_states(optimizer)


def fit_states(optimizer: Any) -> None:
    """Averages that came from elsewhere in the width that this optimizer keeps: for who writes `optimizer.state`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if _narrows(optimizer, group, p):
                _eight_bits.narrow(optimizer.state.get(p, {}), p)
            else:
                _eight_bits.widen(optimizer.state.get(p, {}), torch.float32 if optimizer.options.wide else p.dtype)


def _narrows(optimizer: Any, group: dict[str, Any], p: Tensor) -> bool:
    """Whether p's averages are kept in 8 bits."""
    return optimizer.options.state_bits == 8 and not group.get("use_muon") and _eight_bits.covers(p)


def _widen(optimizer: Any) -> None:
    """States that torch made with the optimizer (Adagrad's) in fp32, before their first use."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state[p].items() if p in optimizer.state else ():
                if key != "step" and value.dtype in (torch.float16, torch.bfloat16):
                    initial = optimizer.rule.initial(group)
                    optimizer.state[p][key] = torch.full_like(p, initial, dtype=torch.float32, requires_grad=False)


@torch.no_grad()
def take_step(optimizer: Any, closure: Callable[[], Any] | None) -> Any:
    """The closure, then one step by the kernels or by torch."""
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    first = first if first is None else local(first)
    fused = _runtime.choose(first, obstacle=obstacle(optimizer))
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if fused and first is not None:
        with _runtime.on_device(first):
            fused = optimizer._step_fused()
    if not fused:
        optimizer._step_torch()
    return loss


def obstacle(optimizer: Any) -> str | None:
    """Why the kernels do not cover this optimizer, whatever the gradients."""
    device: torch.device | None = None
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "differentiable=True"
        values = (group["lr"], group.get("weight_decay", 0.0), *group.get("betas", ()))
        if any(isinstance(v, Tensor) for v in values[2:]):
            return "betas are tensors"
        if any(isinstance(v, Tensor) and v.requires_grad for v in values):
            return "a hyperparameter requires a gradient"
        for p in group["params"]:
            if p.dtype not in KERNEL_DTYPES:
                return f"a {p.dtype} parameter"
            if device is not None and p.device != device:
                return f"parameters lie on {device} and {p.device}"
            device = p.device
    if device is None:
        return "no parameters"
    return None if not _runtime.HAS_TRITON else _runtime._device_obstacle(device)


def entries(groups: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The parameters that have a gradient, their gradients and their groups' numbers; in a captured graph, all."""
    params, grads, numbers, count = [], [], [], 0
    for number, group in enumerate(groups):
        count += len(group["params"])
        for p in group["params"]:
            grad = p.grad
            if grad is not None:
                params.append(p)
                grads.append(grad)
                numbers.append(number)
    if len(params) != count and capturing_graph(groups[0]["params"][0].device):
        raise RuntimeError("captured step(): a parameter has no gradient; fill every p.grad before, and keep it")
    return params, grads, numbers


def readable(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether the kernels can read and write these tensors."""
    plain = not any(_runtime._not_plain(t) or t.dtype not in KERNEL_DTYPES for t in (*params, *grads))
    return plain and all(dense(p) for p in params)


def strided(grads: list[Tensor]) -> bool:
    """Whether gradients, of dtypes and devices known already, are still plain memory."""
    return not any(grad.layout is not torch.strided or grad.is_neg() for grad in grads)


def scaling(optimizer: Any) -> tuple[Tensor | None, Tensor | None]:
    """What GradScaler has left on the optimizer: its scale and whether it found an inf."""
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)


def _step_fused(optimizer: Any) -> bool:
    """One step by the kernels; False, with nothing done, where a tensor is none that they read."""
    groups = optimizer.param_groups
    params, grads, numbers = entries(groups)
    if not params:
        return True
    parts = [local(grad) for grad in grads]
    known: tuple[Plan, Control] | None = optimizer._plan
    if known is None or not known[0].fits(params, parts, groups, optimizer.state):
        if not readable([local(p) for p in params], parts) or not cut_alike(params):
            return False
        plan = make_plan(optimizer, optimizer.rule, params, parts, numbers)
        known = optimizer._plan = plan, Control(plan.bundles, optimizer.options, shard_group(params[0]))
        optimizer.skipped_steps = optimizer.skipped_steps.to(params[0].device)
    elif not strided(parts):
        return False
    if capturing_graph(params[0].device):
        optimizer._captured.append(known)
    plan, control = known
    sent, placed = plan.send(parts, groups)
    values, optimizer.grad_norm = control.run(sent, scaling(optimizer), optimizer.skipped_steps)
    plan.update(sent, values, parts, placed)
    return True


def make_plan(optimizer: Any, rule: Rule, params: list[Tensor], grads: list[Tensor], numbers: list[int]) -> Plan:
    """A plan for these parameters of the optimizer; states that are missing are made."""
    options, groups = optimizer.options, optimizer.param_groups
    if options.draws:
        for group in groups:
            group.setdefault(SEED, 0)
    places = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
    members = []
    for p, number in zip(params, numbers, strict=True):
        state = optimizer.state.get(p, {})
        members.append(make_member(rule, number, places[id(p)], groups[number], p, state, options))
        if state:  # torch's SGD without momentum leaves no trace either
            optimizer.state[p] = state
    return Plan(rule, members, grads, groups, optimizer.state, options)


def _step_torch(optimizer: Any) -> None:
    """torch's own step, between what our keywords ask for."""
    grads = gradients(optimizer.param_groups)
    options: StepOptions = optimizer.options
    skip = unscale(optimizer, grads)
    if options.needs_norm and grads:
        optimizer.grad_norm = norm = torch.nn.utils.get_total_norm(grads)
        if options.skip_nonfinite and not bool(torch.isfinite(norm)):
            optimizer.skipped_steps += 1
            skip = True
        elif options.max_grad_norm is not None:
            clip_in_place(grads, norm, options.max_grad_norm)
    if not skip:
        with in_32_bits(optimizer), in_fp32(optimizer):
            _unhooked_step(optimizer)
    if options.zero_grads:
        fill_with_zeros(grads)


def _unhooked_step(optimizer: Any) -> None:
    """The step of the torch class that this one derives from, without hooks: ours has run them."""
    classes = type(optimizer).__mro__
    step = super(WithOptions, optimizer).step.__func__  # type: ignore[misc]
    assert WithOptions in classes
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def unscale(optimizer: Any, grads: list[Tensor]) -> bool:
    """GradScaler's part where torch's step does not take it: gradients unscaled in place; whether to skip the step."""
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is None and found_inf is None:
        return False
    if scale is not None:
        for grad in grads:
            grad.mul_(scale.double().reciprocal().to(grad.device, torch.float32))
        optimizer.grad_scale = None
    optimizer.found_inf = None
    return found_inf is not None and bool(found_inf)


@contextlib.contextmanager
def in_32_bits(optimizer: Any) -> Iterator[None]:
    """Averages kept in 8 bits are torch's own fp32 ones inside, and rounded after."""
    places = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    narrowed = [
        (i, group, p) for i, (group, p) in enumerate(places) if p.grad is not None and _narrows(optimizer, group, p)
    ]
    for _, _, p in narrowed:
        _eight_bits.widen(optimizer.state.get(p, {}))
    try:
        yield
    finally:
        for index, group, p in narrowed:
            state = optimizer.state.get(p, {})
            if state:
                step = torch.as_tensor(state["step"])
                _eight_bits.narrow(state, p, _eight_bits.noise_of(p, group.setdefault(SEED, 0), index, step))


@contextlib.contextmanager
def in_fp32(optimizer: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Under master_weights and stochastic_rounding: 16-bit parameters are fp32 copies inside, and rounded after.

    Gives the pairs (parameter, copy).
    """
    swapped: list[tuple[dict[str, Any], int, Tensor, Tensor]] = []
    for group in optimizer.param_groups if optimizer.options.wide else ():
        for i, p in enumerate(group["params"]):
            if p.grad is not None and p.dtype in (torch.float16, torch.bfloat16):
                swapped.append((group, i, p, _swap_in(optimizer, p)))
                group["params"][i] = swapped[-1][3]
    try:
        yield [(p, copy) for _, _, p, copy in swapped]
    finally:
        for group, i, p, _ in swapped:
            group["params"][i] = p
        for group, _, p, copy in swapped:
            _swap_out(optimizer, group, p, copy)


def _swap_in(optimizer: Any, p: Tensor) -> Tensor:
    state = optimizer.state.pop(p, {})
    copy = state.pop(MASTER, None)
    if copy is None:
        copy = p.detach().to(torch.float32, copy=True)
    copy.grad = p.grad.to(torch.float32)  # type: ignore[union-attr]
    if state:
        optimizer.state[copy] = state
    return copy


def _swap_out(optimizer: Any, group: dict[str, Any], p: Tensor, copy: Tensor) -> None:
    copy.grad = None
    state = optimizer.state[p] = optimizer.state.pop(copy, {})
    if optimizer.options.master_weights:
        state[MASTER] = copy
        p.copy_(copy)
        return
    if not optimizer.options.stochastic_rounding:
        p.copy_(copy)
        return
    places = [q for g in optimizer.param_groups for q in g["params"]]
    index = next(i for i, q in enumerate(places) if q is p)
    key = "step" if "step" in state else STEP
    if key == STEP:
        state[STEP] = state.get(STEP, torch.zeros((), device=p.device)) + 1
    # Muon's kernel keeps one count a block
    step = torch.as_tensor(state[key]).reshape(-1)[0]
    local(p).copy_(round_stochastically(local(copy), group.setdefault(SEED, 0), index, step))
