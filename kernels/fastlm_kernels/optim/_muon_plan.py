"""Muon's step by kernels: one launch for all momenta, Newton-Schulz per shape, one launch that applies the results.

    momentum   reads g and m, writes m and U = what is to be orthogonalised, straight into one batch per shape;
               clipping, guard and zeroing of gradients happen here
    O          newton_schulz(U), in bf16 on a GPU
    apply      p -= lr decay p + lr scale(shape) O; masters and stochastic rounding happen here

A parameter that is split counts as its row blocks, each with a row of its own in both tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._newton_schulz import NS_COEFFICIENTS, NS_EPS, newton_schulz
from ._plan import MASTER, SEED, STEP, Bundle, Form, Group, Member, Rule, Sent, capturing_graph

_MOMENTUM = Rule(
    "momentum",
    lambda group: ("momentum_buffer", None, None),
    lambda group: (group["momentum"], 1 - group["momentum"], 0.0, 1.0, 0.0, 0.0),
    step=lambda group: None,
    switch=lambda group: group["nesterov"],
)
_APPLY = Rule(
    "apply",
    lambda group: (None, None, None),
    lambda group: (0.0, 1.0, 0.0, 1.0, 0.0, group["scale"]),
    step=lambda group: None,
)


@dataclass(frozen=True)
class Recipe:
    """What decides a batch: the blocks' shape and how they are orthogonalised."""

    rows: int
    columns: int
    coefficients: tuple[float, float, float]
    steps: int
    eps: float


@dataclass(frozen=True)
class Block:
    """Rows [start, start + recipe.rows) of parameter number `param`."""

    param: int
    start: int
    group: int  # of the plan's own groups: a group of the optimizer and a shape
    recipe: Recipe


def recipe_of(group: Group, rows: int, columns: int) -> Recipe:
    """From a group of `torch.optim.Muon` or of `MuonWithAdamW`, whose "eps" is AdamW's."""
    if "ns_coefficients" in group:
        return Recipe(rows, columns, tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"])
    return Recipe(rows, columns, NS_COEFFICIENTS, group["ns_steps"], NS_EPS)


def scale_of(group: Group, rows: int, columns: int) -> float:
    """What the rate is multiplied by for a matrix of this shape."""
    how = group.get("adjust_lr_fn")
    if how == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5


def working_dtype(device: torch.device) -> torch.dtype:
    """What Newton-Schulz runs in: the interpreter multiplies 16-bit numbers wrongly."""
    return torch.bfloat16 if device.type != "cpu" else torch.float32


class MuonPlan:
    """The launches for these matrices; `fits` says whether they are still the same."""

    def __init__(
        self,
        optimizer: Any,
        params: list[Tensor],
        grads: list[Tensor],
        numbers: list[int],
        splits: dict[Tensor, list[int]],
        momentum_dtype: torch.dtype | None,
    ):
        """momentum_dtype: of states that are not there yet; None for the gradient's."""
        self.options, self.numbers = optimizer.options, numbers
        self.params = params
        groups = optimizer.param_groups
        self.forms = [_form(group) for group in groups]
        self.dtypes = [grad.dtype for grad in grads]
        self.shapes: list[tuple[int, int, int]] = []
        self.blocks = self._cut(groups, splits)
        self.counts = [sum(block.param == i for block in self.blocks) for i in range(len(params))]
        self.records = [
            self._state(optimizer.state[p], p, momentum_dtype or grad.dtype, count)
            for p, grad, count in zip(params, grads, self.counts, strict=True)
        ]
        self.addresses = self._addresses()
        own = self._groups(groups)
        members = self._members()
        self.momentum = _bundles(_MOMENTUM, members[0], own)
        self.apply = _bundles(_APPLY, members[1], own)
        self.bundles = [bundle for bundle, _ in self.momentum]

    def _cut(self, groups: list[Group], splits: dict[Tensor, list[int]]) -> list[Block]:
        blocks = []
        for i, (p, number) in enumerate(zip(self.params, self.numbers, strict=True)):
            start = 0
            for rows in splits.get(p, [p.shape[0]]):
                key = (number, rows, p.shape[1])
                if key not in self.shapes:
                    self.shapes.append(key)
                recipe = recipe_of(groups[number], rows, p.shape[1])
                blocks.append(Block(i, start, self.shapes.index(key), recipe))
                start += rows
        return blocks

    def _state(self, state: dict[str, Any], p: Tensor, dtype: torch.dtype, blocks: int) -> dict[str, Tensor]:
        """The tensors of a parameter's state that the launches use, made where they are missing."""
        has_master = self.options.master_weights and p.dtype != torch.float32
        if capturing_graph(p.device) and ("momentum_buffer" not in state or (has_master and MASTER not in state)):
            raise RuntimeError("the optimizer's state is made in its first step: run one before capturing a graph")
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
        record = {"momentum_buffer": state["momentum_buffer"]}
        if has_master:
            state.setdefault(MASTER, p.detach().to(torch.float32, copy=True))
            record[MASTER] = state[MASTER] = state[MASTER].contiguous()
        if self.options.stochastic_rounding:
            count = state.get(STEP, torch.zeros((), device=p.device)).to(torch.float32)
            # One count a block: each has its own row in the table, and advances its own.
            state[STEP] = count if count.numel() == blocks and count.dim() else count.expand(blocks).clone()
            record[STEP] = state[STEP]
        return record

    def _members(self) -> tuple[list[tuple[int, Form, Member]], list[tuple[int, Form, Member]]]:
        """Each block's rows of the two tables, and what decides its launch; its update has a place in a batch."""
        batches: dict[Recipe, int] = {}
        places = []
        for block in self.blocks:
            places.append(batches.get(block.recipe, 0))
            batches[block.recipe] = places[-1] + 1
        device = self.params[0].device
        dtype = working_dtype(device)
        self.updates = {
            recipe: torch.empty((count, recipe.rows, recipe.columns), dtype=dtype, device=device)
            for recipe, count in batches.items()
        }
        self.places = places
        momentum, apply, seen = [], [], [0] * len(self.params)
        for number, (block, place) in enumerate(zip(self.blocks, places, strict=True)):
            record, p = self.records[block.param], self.params[block.param].detach()
            rows = slice(block.start, block.start + block.recipe.rows)
            m = record["momentum_buffer"][rows]
            update = self.updates[block.recipe][place]
            nesterov = self.forms[self.numbers[block.param]][0]
            form = Form(nesterov, dtype, self.dtypes[block.param], (m.dtype, None, None), None, False)
            momentum.append((number, form, Member(block.group, number, (update, m, None, None, None, None), ())))
            master = record[MASTER][rows] if MASTER in record else None
            step = record[STEP][seen[block.param]] if STEP in record else None
            seen[block.param] += 1
            master_dtype = None if master is None else master.dtype
            form = Form(False, p.dtype, dtype, (None, None, None), master_dtype, step is not None)
            member = Member(block.group, number, (p[rows], None, None, None, master, step), ())
            apply.append((number, form, member))
        return momentum, apply

    def _addresses(self) -> list[int]:
        found = [p.data_ptr() for p in self.params]
        return found + [t.data_ptr() for record in self.records for t in record.values()]

    def fits(self, params: list[Tensor], grads: list[Tensor], groups: list[Group], states: Any) -> bool:
        """Whether the plan still describes these parameters, their states and their options."""
        if [id(p) for p in params] != [id(p) for p in self.params] or [_form(g) for g in groups] != self.forms:
            return False
        if [grad.dtype for grad in grads] != self.dtypes:
            return False
        for p, record in zip(self.params, self.records, strict=True):
            if any(states[p].get(key) is not tensor for key, tensor in record.items()):
                return False
        return self._addresses() == self.addresses

    def _groups(self, groups: list[Group]) -> list[Group]:
        """One group for each of the optimizer's and each shape: the scale is the shape's."""
        names = ("lr", "weight_decay", "momentum", "nesterov")
        return [
            {name: groups[n][name] for name in names}
            | {SEED: groups[n].get(SEED, 0), "scale": scale_of(groups[n], rows, columns)}
            for n, rows, columns in self.shapes
        ]

    def send(self, grads: list[Tensor], groups: list[Group]) -> tuple[list[Sent], list[Tensor]]:
        """What the momentum's bundles read, and the gradients as they lie there: contiguous."""
        placed = [grad.contiguous() for grad in grads]
        addresses = []
        for block in self.blocks:
            grad = placed[block.param]
            addresses.append(grad.data_ptr() + block.start * block.recipe.columns * grad.element_size())
        own = self._groups(groups)
        return [bundle.send([addresses[i] for i in chosen], own) for bundle, chosen in self.momentum], placed

    def update(
        self,
        sent: list[Sent],
        control: Tensor | None,
        grads: list[Tensor],
        placed: list[Tensor],
        groups: list[Group],
    ) -> None:
        """Momentum, Newton-Schulz, and the parameters."""
        options = self.options
        for bundle, mine in zip(self.bundles, sent, strict=True):
            bundle.launch_update(mine, control, zero=options.zero_grads)
        if options.zero_grads:
            for copy, grad in zip(placed, grads, strict=True):
                if copy is not grad:
                    grad.zero_()
        results = {
            recipe: newton_schulz(batch, recipe.steps, recipe.coefficients, recipe.eps)
            for recipe, batch in self.updates.items()
        }
        addresses = []
        for block, place in zip(self.blocks, self.places, strict=True):
            result = results[block.recipe]
            addresses.append(result.data_ptr() + place * result.stride(0) * result.element_size())
        own = self._groups(groups)
        for bundle, chosen in self.apply:
            mine = bundle.send([addresses[i] for i in chosen], own)
            bundle.launch_update(mine, control, stochastic=options.stochastic_rounding)


def _form(group: Group) -> tuple[Any, ...]:
    """What of a group's options decides the plan."""
    keys = ("nesterov", "ns_steps", "ns_coefficients", "eps", "adjust_lr_fn", SEED)
    return tuple(group.get(key) for key in keys)


def _bundles(rule: Rule, rows: list[tuple[int, Form, Member]], groups: list[Group]) -> list[tuple[Bundle, list[int]]]:
    by_form: dict[Form, list[tuple[int, Member]]] = {}
    for number, form, member in rows:
        by_form.setdefault(form, []).append((number, member))
    return [
        (Bundle(rule, form, [member for _, member in chosen], groups), [number for number, _ in chosen])
        for form, chosen in by_form.items()
    ]


def usable(params: list[Tensor]) -> bool:
    """Whether the rows of all matrices lie one after another, so that blocks of rows are pieces of memory."""
    return all(p.is_contiguous() and p.numel() > 0 for p in params)
