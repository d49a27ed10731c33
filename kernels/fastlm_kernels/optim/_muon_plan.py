"""Muon's step by kernels: one launch for all momenta, Newton-Schulz per shape, one launch that applies the results.

    momentum   reads g and m, writes m and U = what is to be orthogonalised, straight into one batch per shape;
               clipping, guard and zeroing of gradients happen here
    O          newton_schulz(U), in bf16 on a GPU
    apply      p -= lr decay p + lr scale(shape) O; masters and stochastic rounding happen here

A parameter that is split counts as its row blocks, each with a row of its own in both tables. Under FSDP2 a process
holds some rows of each parameter: both launches work on the pieces of blocks that lie here, and between them U, in
the dtype that Newton-Schulz runs in, is gathered, since orthogonal are whole blocks: every process forms them all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._newton_schulz import NS_COEFFICIENTS, NS_EPS, newton_schulz
from ._plan import MASTER, SEED, STEP, Bundle, Form, Group, Member, Rule, Sent, capturing_graph
from ._sharded import cut_by_rows, is_sharded, like_shards_of, local, rows_here, whole

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
    """Rows [start, start + recipe.rows) of parameter number `param`, number `place` of its batch."""

    param: int
    start: int
    group: int  # of the plan's own groups: a group of the optimizer and a shape
    recipe: Recipe
    place: int


@dataclass(frozen=True)
class Piece:
    """The `rows` rows of a block that lie here: from row `here` of this process's part, row `offset` of the block."""

    block: Block
    here: int
    offset: int
    rows: int


def pieces_of(block: Block, first: int, count: int) -> list[Piece]:
    """The block's piece among the `count` rows from `first` on, or none."""
    begin, end = max(block.start, first), min(block.start + block.recipe.rows, first + count)
    return [Piece(block, begin - first, begin - block.start, end - begin)] if begin < end else []


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
        self.pieces = self._pieces()
        self.records = [
            self._state(optimizer.state[p], p, momentum_dtype or grad.dtype, self._count(i))
            for i, (p, grad) in enumerate(zip(params, grads, strict=True))
        ]
        self.addresses = self._addresses()
        own = self._groups(groups)
        self._make_updates()
        members = self._members()
        self.momentum = _bundles(_MOMENTUM, members[0], own)
        self.apply = _bundles(_APPLY, members[1], own)
        self.bundles = [bundle for bundle, _ in self.momentum]

    def _cut(self, groups: list[Group], splits: dict[Tensor, list[int]]) -> list[Block]:
        blocks: list[Block] = []
        places: Counter[Recipe] = Counter()
        for i, (p, number) in enumerate(zip(self.params, self.numbers, strict=True)):
            start = 0
            for rows in splits.get(p, [p.shape[0]]):
                key = (number, rows, p.shape[1])
                if key not in self.shapes:
                    self.shapes.append(key)
                recipe = recipe_of(groups[number], rows, p.shape[1])
                blocks.append(Block(i, start, self.shapes.index(key), recipe, places[recipe]))
                places[recipe] += 1
                start += rows
        return blocks

    def _pieces(self) -> list[Piece]:
        """What of the blocks lies here; of a parameter of which nothing does, an empty piece."""
        pieces: list[Piece] = []
        for i, p in enumerate(self.params):
            mine = [block for block in self.blocks if block.param == i]
            found = [piece for block in mine for piece in pieces_of(block, *rows_here(p))]
            pieces += found or [Piece(mine[0], 0, 0, 0)]
        return pieces

    def _count(self, param: int) -> int:
        return sum(piece.block.param == param for piece in self.pieces)

    def _state(self, state: dict[str, Any], p: Tensor, dtype: torch.dtype, pieces: int) -> dict[str, Tensor]:
        """The tensors of a parameter's state that the launches use, made where they are missing."""
        has_master = self.options.master_weights and p.dtype != torch.float32
        if capturing_graph(p.device) and ("momentum_buffer" not in state or (has_master and MASTER not in state)):
            raise RuntimeError("the optimizer's state is made in its first step: run one before capturing a graph")
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        if has_master:
            state.setdefault(MASTER, p.detach().to(torch.float32, copy=True))
        record = {}
        for key in ("momentum_buffer", MASTER) if has_master else ("momentum_buffer",):
            if not is_sharded(p):
                state[key] = state[key].contiguous()
            record[key] = state[key]
        if self.options.stochastic_rounding:
            count = state.get(STEP, torch.zeros((), device=p.device)).to(torch.float32)
            # One count a piece: each has its own row in the table, and advances its own.
            fits = count.dim() == 1 and count.numel() == pieces
            state[STEP] = count if fits else count.reshape(-1)[:1].expand(pieces).clone()
            record[STEP] = state[STEP]
        return record

    def _make_updates(self) -> None:
        """Room for U: one batch a recipe, and where parameters are cut the rows here, to be gathered into it."""
        device = self.params[0].device
        dtype = working_dtype(device)
        counts = Counter(block.recipe for block in self.blocks)
        self.updates = {
            recipe: torch.empty((count, recipe.rows, recipe.columns), dtype=dtype, device=device)
            for recipe, count in counts.items()
        }
        self.parts = [
            torch.empty(local(p).shape, dtype=dtype, device=device) if is_sharded(p) else None for p in self.params
        ]

    def _members(self) -> tuple[list[tuple[int, Form, Member]], list[tuple[int, Form, Member]]]:
        """Each piece's rows of the two tables, and what decides its launch."""
        momentum, apply = [], []
        seen: Counter[int] = Counter()
        for number, piece in enumerate(self.pieces):
            block, i = piece.block, piece.block.param
            record, p, part = self.records[i], local(self.params[i]).detach(), self.parts[i]
            rows = slice(piece.here, piece.here + piece.rows)
            m = local(record["momentum_buffer"])[rows]
            update = self.updates[block.recipe][block.place] if part is None else part[rows]
            nesterov = self.forms[self.numbers[i]][0]
            form = Form(nesterov, update.dtype, self.dtypes[i], (m.dtype, None, None), None, False)
            momentum.append((number, form, Member(block.group, number, (update, m, None, None, None, None), ())))
            master = local(record[MASTER])[rows] if MASTER in record else None
            step = record[STEP][seen[i]] if STEP in record else None
            seen[i] += 1
            master_dtype = None if master is None else master.dtype
            form = Form(False, p.dtype, update.dtype, (None, None, None), master_dtype, step is not None)
            member = Member(block.group, number, (p[rows], None, None, None, master, step), ())
            apply.append((number, form, member))
        return momentum, apply

    def _addresses(self) -> list[int]:
        found = [local(p).data_ptr() for p in self.params]
        return found + [local(t).data_ptr() for record in self.records for t in record.values()]

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
        for piece in self.pieces:
            grad = placed[piece.block.param]
            addresses.append(grad.data_ptr() + piece.here * piece.block.recipe.columns * grad.element_size())
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
        self._gather()
        results = {
            recipe: newton_schulz(batch, recipe.steps, recipe.coefficients, recipe.eps)
            for recipe, batch in self.updates.items()
        }
        addresses = []
        for piece in self.pieces:
            result = results[piece.block.recipe]
            at = piece.block.place * result.stride(0) + piece.offset * result.stride(1)
            addresses.append(result.data_ptr() + at * result.element_size())
        own = self._groups(groups)
        for bundle, chosen in self.apply:
            mine = bundle.send([addresses[i] for i in chosen], own)
            bundle.launch_update(mine, control, stochastic=options.stochastic_rounding)

    def _gather(self) -> None:
        """Whole blocks of U, where processes hold some rows each; every process must call it."""
        for i, (p, part) in enumerate(zip(self.params, self.parts, strict=True)):
            if part is None:
                continue
            gathered = whole(like_shards_of(p, part))
            for block in self.blocks:
                if block.param == i:
                    rows = gathered[block.start : block.start + block.recipe.rows]
                    self.updates[block.recipe][block.place].copy_(rows)


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
    return all(p.numel() > 0 and cut_by_rows(p) and local(p).is_contiguous() for p in params)
