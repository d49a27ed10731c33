"""`torch.optim`'s classes with our keywords: same constructor, same results, same `state_dict`, both ways.

On a GPU one Triton launch updates every parameter of one dtype (`_update.py`); elsewhere, and where no kernel covers a
case (float64, complex or sparse, `differentiable`), the step is torch's. `foreach`, `fused` and `capturable` choose
between torch's own implementations and are accepted. Each class takes, keyword-only after torch's arguments:

    max_grad_norm         clip the global norm over all parameters to this before the update (None: off). The kernels
                          leave `p.grad` as it is, torch's path scales it in place
    skip_nonfinite        leave out the whole update, the step count included, when a gradient is inf or NaN. Decided on
                          the device by the kernels; torch's path reads one flag on the host
    master_weights        16-bit parameters are rounded copies of fp32 masters, which are made in the first step; states
                          are fp32. fp32 parameters are their own masters
    stochastic_rounding   bf16 parameters are rounded up or down at random so that small updates count on average;
                          states are fp32. Draws follow the group's "fastlm/seed" (0), the step and the element: runs
                          repeat bit for bit
    zero_grads            fill the gradients with 0 in the same pass; `p.grad` is kept
    state_bits=8          AdamW and Adam: both averages in a byte an element and one for each 128 (`_eight_bits.py`),
                          where a parameter has 4096 elements or more and is fp32, fp16 or bf16; smaller ones keep
                          theirs in fp32. ValueError beside amsgrad or differentiable, and under FSDP2

The options are not part of `state_dict`: they belong to the constructor. States of ours stand in it as "fastlm/...".
With state_bits=8 "fastlm/exp_avg", "fastlm/exp_avg_low" and their like of "exp_avg_sq" stand there instead of torch's.
Loading turns either kind into what this optimizer keeps: torch's states are rounded to the nearest code, codes become
fp32 in an optimizer with state_bits=32, whose `state_dict` torch's classes load.
In a CUDA graph lr and weight_decay follow their tensors, numbers stay as captured; every parameter needs a gradient.
"""

from __future__ import annotations

import torch

from ._muon_plan import MuonPlan, usable
from ._options import WithOptions, entries, readable, scaling, strided
from ._plan import STEP, Control, Group, Rule, capturing_graph
from ._sharded import cut_alike, local, shard_group


def _adam_states(group: Group) -> tuple[str, str, str | None]:
    return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group.get("amsgrad") else None


def _adam_scalars(group: Group) -> tuple[float, float, float, float, float, float]:
    b1, b2 = group["betas"]
    return b1, 1 - b1, b2, 1 - b2, group["eps"], 0.0


def _decoupled(group: Group) -> bool:
    # MuonWithAdamW's groups have no such key.
    return group.get("decoupled_weight_decay", True)


ADAM = Rule("adam", _adam_states, _adam_scalars, switch=_decoupled)
_SGD = Rule(
    "sgd",
    lambda group: ("momentum_buffer" if group["momentum"] != 0 else None, None, None),
    lambda group: (group["momentum"], 1 - group["dampening"], 0.0, 1.0, 0.0, 0.0),
    # With dampening the first step differs from the others; without, it is the same on a buffer of zeros.
    step=lambda group: STEP if group["momentum"] != 0 and group["dampening"] != 0 else None,
    switch=lambda group: group["nesterov"],
)
_ADAGRAD = Rule(
    "adagrad",
    lambda group: ("sum", None, None),
    lambda group: (0.0, 1.0, 0.0, 1.0, group["eps"], group["lr_decay"]),
    initial=lambda group: group["initial_accumulator_value"],
)
_ADADELTA = Rule(
    "adadelta",
    lambda group: ("square_avg", "acc_delta", None),
    lambda group: (group["rho"], 1 - group["rho"], 0.0, 1.0, group["eps"], 0.0),
)


def _rmsprop_states(group: Group) -> tuple[str, str | None, str | None]:
    return (
        "square_avg",
        "momentum_buffer" if group["momentum"] > 0 else None,
        "grad_avg" if group["centered"] else None,
    )


_RMSPROP = Rule(
    "rmsprop",
    _rmsprop_states,
    lambda group: (group["alpha"], 1 - group["alpha"], 0.0, 1.0, group["eps"], group["momentum"]),
)


class AdamW(WithOptions, torch.optim.AdamW):
    """`torch.optim.AdamW`: decoupled weight decay. Our keywords: see the module's text."""

    rule = ADAM


class Adam(WithOptions, torch.optim.Adam):
    """`torch.optim.Adam`: weight decay as L2, added to the gradient. Our keywords: see the module's text."""

    rule = ADAM


class SGD(WithOptions, torch.optim.SGD):
    """`torch.optim.SGD`: momentum, dampening, Nesterov. Our keywords: see the module's text."""

    rule = _SGD


class Adagrad(WithOptions, torch.optim.Adagrad):
    """`torch.optim.Adagrad`. Our keywords: see the module's text."""

    rule = _ADAGRAD


class Adadelta(WithOptions, torch.optim.Adadelta):
    """`torch.optim.Adadelta`. Our keywords: see the module's text."""

    rule = _ADADELTA


class RMSprop(WithOptions, torch.optim.RMSprop):
    """`torch.optim.RMSprop`: centred or not, with or without momentum. Our keywords: see the module's text."""

    rule = _RMSPROP


class Muon(WithOptions, torch.optim.Muon):
    """`torch.optim.Muon`: 2-d parameters only; `MuonWithAdamW` takes a whole model. Our keywords: see above."""

    def _step_fused(self) -> bool:
        params, grads, numbers = entries(self.param_groups)
        if not params:
            return True
        grads = [local(grad) for grad in grads]
        plan, control = self._plan or (None, None)
        if plan is None or control is None or not plan.fits(params, grads, self.param_groups, self.state):
            if not (readable([local(p) for p in params], grads) and cut_alike(params) and usable(params)):
                return False
            plan = MuonPlan(self, params, grads, numbers, {}, torch.float32 if self.options.wide else None)
            control = Control(plan.bundles, self.options, shard_group(params[0]))
            self._plan = plan, control
            self.skipped_steps = self.skipped_steps.to(params[0].device)
        elif not strided(grads):
            return False
        if capturing_graph(params[0].device):
            self._captured.append(self._plan)
        sent, placed = plan.send(grads, self.param_groups)
        values, self.grad_norm = control.run(sent, scaling(self), self.skipped_steps)
        plan.update(sent, values, grads, placed, self.param_groups)
        return True
