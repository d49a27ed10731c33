"""What one launch needs on the device, kept from step to step: addresses, sizes, chunks and hyperparameters.

A `Plan` is made for the parameters that have gradients. Each step compares every address with the last step's, on the
host; gradients' addresses, which `zero_grad(set_to_none=True)` changes nearly every time, and the groups' scalars lie
in one small buffer, sent again when one of them differs. A tensor that joins, leaves or moves makes a new plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _runtime, configs
from .._runtime import launch, tl
from . import _eight_bits
from ._rounding import seed_of
from ._sharded import is_sharded, local, sum_over
from ._update import ADDRESSES, FIELDS, SCALARS, control_kernel, norm_partial_kernel, update_kernel

MASTER = "fastlm/master"
SEED = "fastlm/seed"
STEP = "fastlm/step"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Group = dict[str, Any]
Sent = tuple[Tensor, Tensor]  # GRADS, SCALARS


@dataclass(frozen=True)
class Rule:
    """What a class's groups mean to the kernel.

    name      the kernel's RULE
    states    keys of the three states; None for one that the group's options leave out
    step      key of the step count in a parameter's state, None where nothing needs one
    switch    the kernel's SWITCH: decoupled decay, Nesterov
    scalars   b1, its complement, b2, its complement, eps and the extra one, in SCALARS' order
    initial   the value that a new state starts from
    """

    name: str
    states: Callable[[Group], tuple[str | None, str | None, str | None]]
    scalars: Callable[[Group], tuple[float, float, float, float, float, float]]
    step: Callable[[Group], str | None] = lambda group: "step"
    switch: Callable[[Group], bool] = lambda group: False
    initial: Callable[[Group], float] = lambda group: 0.0


@dataclass(frozen=True)
class Form:
    """What must be equal for tensors to share a launch: the kernel's constants."""

    switch: bool
    param: torch.dtype
    grad: torch.dtype
    states: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]
    master: torch.dtype | None
    step: bool


@dataclass(frozen=True)
class Member:
    """One parameter: its group's number and its tensors, those of ADDRESSES in that order (None: has none).

    kept  the same as the optimizer holds them: under FSDP2 `tensors` are this process's parts
    """

    group: int
    index: int
    tensors: tuple[Tensor | None, ...]
    keys: tuple[str | None, ...]
    kept: tuple[Tensor | None, ...] = ()

    @property
    def param(self) -> Tensor:
        """The parameter itself."""
        param = self.tensors[0]
        assert param is not None
        return param


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, each once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def laid_out_as(param: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory order of `param`; itself if it lies so."""
    if value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)


def capturing_graph(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and not _runtime.INTERPRETED and torch.cuda.is_current_stream_capturing()


class Upload:
    """Words on the device, sent again only when they differ, through pinned memory that is not overwritten too early.

    A captured graph repeats its copies: it gets buffers of its own, which nothing else writes, made before the capture,
    which allows no pinned memory to be allocated.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.words: list[int] = []
        self.tensor = self._empty(0)
        self._asynchronous = device.type == "cuda" and not _runtime.INTERPRETED
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._spare: tuple[Tensor, Tensor] | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=self.device)

    def _make_spare(self, count: int) -> tuple[Tensor, Tensor]:
        return self._empty(count), torch.empty(count, dtype=torch.int64, pin_memory=True)

    def reserve(self, count: int) -> Tensor:
        """The device buffer that `count` words will be sent to: words may hold addresses inside it."""
        if capturing_graph(self.device):
            if self._spare is None or self._spare[0].numel() != count:
                self._spare = self._make_spare(count)
            self._captured.append(self._spare)
            self._spare = None
            return self._captured[-1][0]
        if self.tensor.numel() != count:
            self.tensor, self.words = self._empty(count), []
        if self._asynchronous and (self._spare is None or self._spare[0].numel() != count):
            self._spare = self._make_spare(count)
        return self.tensor

    def send(self, words: list[int], buffer: Tensor) -> None:
        """Fill a reserved buffer."""
        if buffer is not self.tensor:
            pinned = self._captured[-1][1].copy_(torch.tensor(words, dtype=torch.int64))
            buffer.copy_(pinned, non_blocking=True)
        elif words != self.words:
            host = torch.tensor(words, dtype=torch.int64)
            if self._asynchronous:
                buffer.copy_(self._staged(host), non_blocking=True)
                self._staging[-1][1].record()
            else:
                buffer.copy_(host)
            self.words = words

    def _staged(self, host: Tensor) -> Tensor:
        """`host` in pinned memory whose last copy is over: two buffers, more only if the device falls behind."""
        if self._staging and self._staging[0][0].numel() == host.numel() and self._staging[0][1].query():
            self._staging.append(self._staging.pop(0))
        else:
            if len(self._staging) >= 2 and self._staging[0][0].numel() != host.numel():
                self._staging.clear()
            self._staging.append((torch.empty_like(host, pin_memory=True), torch.cuda.Event()))
        return self._staging[-1][0].copy_(host)


def _float_words(values: Iterable[float]) -> list[int]:
    """fp32 values, two to an int64, as they lie in memory."""
    return torch.tensor(tuple(values), dtype=torch.float32).view(torch.int64).tolist()


def _log(b: float) -> float:
    # b = 0 forgets everything: t ln b must be far below 0, and finite.
    return math.log(b) if b > 0 else -1e4


def _triton_dtype(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else getattr(tl, str(dtype).removeprefix("torch."))


class Bundle:
    """The tensors of one launch."""

    def __init__(self, rule: Rule, form: Form, members: list[Member], groups: list[Group]):
        self.rule, self.form, self.members = rule, form, members
        self.device = members[0].param.device
        self.groups = sorted({member.group for member in members})
        counts = [max(1, -(-m.param.numel() // configs.OPTIM_CHUNK)) for m in members]
        self.chunks = sum(counts)
        owners = torch.repeat_interleave(torch.arange(len(members), dtype=torch.int32), torch.tensor(counts))
        self.owners = _on_device(owners, self.device)
        self.table = _on_device(self._table(counts, groups), self.device)
        self.tickets = torch.zeros(len(members), dtype=torch.int32, device=self.device)
        self.upload = Upload(self.device)
        self.scalars: dict[int, tuple[Any, list[int]]] = {}
        self.keep: list[Tensor] = []

    def _table(self, counts: list[int], groups: list[Group]) -> Tensor:
        rows, first = [], 0
        for member, count in zip(self.members, counts, strict=True):
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in member.tensors]
            addresses += [0] * (len(ADDRESSES) - len(addresses))
            seed = seed_of(groups[member.group].get(SEED, 0), member.index)
            rows.append([*addresses, member.param.numel(), first, seed, self.groups.index(member.group)])
            first += count
        table = torch.tensor(rows, dtype=torch.int64)
        assert table.shape[1] == len(FIELDS)
        return table

    def send(self, grads: list[int], groups: list[Group]) -> Sent:
        """What the kernel reads of gradients at these addresses and of the groups' present hyperparameters."""
        count, width = len(grads) + 2 * len(self.groups), len(SCALARS)
        count += count % 2  # SCALARS starts on a 16-byte boundary
        buffer = self.upload.reserve(count + width // 2 * len(self.groups))
        self.keep.clear()
        addresses, rows = [], []
        for i, number in enumerate(self.groups):
            group = groups[number]
            own = buffer.data_ptr() + 8 * count + 4 * width * i
            for j, name in enumerate(("lr", "weight_decay")):
                addresses.append(self._address(group[name], own + 4 * (SCALARS.index("lr") + j)))
            rows += self._row(number, group)
        words = grads + addresses
        words += [0] * (count - len(words)) + rows
        self.upload.send(words, buffer)
        return buffer, buffer[count:].view(torch.float32)

    def _address(self, value: float | Tensor, otherwise: int) -> int:
        """Where the kernel finds a hyperparameter: a tensor of this device, or its slot in SCALARS."""
        if not isinstance(value, Tensor) or value.device != self.device:
            return otherwise
        if value.dtype != torch.float32:
            value = value.to(torch.float32)
        self.keep.append(value)
        return value.data_ptr()

    def _row(self, number: int, group: Group) -> list[int]:
        """The group's row of SCALARS."""
        lr, decay = (self._number(group[name]) for name in ("lr", "weight_decay"))
        scalars = (lr, decay, bool(group.get("maximize", False)), *self.rule.scalars(group))
        known = self.scalars.get(number)
        if known is None or known[0] != scalars:
            b1, c1, b2, c2, eps, extra = scalars[3:]
            sign = -1.0 if scalars[2] else 1.0
            row = (sign, b1, c1, b2, c2, _log(b1), _log(b2), eps, extra, lr, decay, 0.0)
            known = self.scalars[number] = (scalars, _float_words(row))
        return known[1]

    def _number(self, value: float | Tensor) -> float:
        """A hyperparameter's value where the host has it: a tensor of the device is read there."""
        return 0.0 if isinstance(value, Tensor) and value.device == self.device else float(value)

    def launch_norm(self, buffer: Tensor, partial: Tensor, offset: int) -> None:
        """Fill this bundle's part of the partial sums of squares."""
        config = configs.optim_config(_runtime.architecture(self.device), self.form.grad.itemsize)
        launch(
            norm_partial_kernel,
            (self.chunks,),
            (self.table, buffer, self.owners, partial, offset),
            num_warps=config.num_warps,
            GRAD=_triton_dtype(self.form.grad),
            FIELDS=len(FIELDS),
            CHUNK=config.chunk,
            BLOCK=config.block,
        )

    def launch_update(
        self, sent: Sent, control: Tensor | None, *, stochastic: bool = False, zero: bool = False
    ) -> None:
        """Update every tensor of the bundle."""
        buffer, scalars = sent
        form = self.form
        config, registers = self._config(every_option=control is not None and zero, stochastic=stochastic)
        launch(
            update_kernel,
            (self.chunks,),
            (
                *(self.table, buffer, scalars, self.owners, scalars if control is None else control),
                *(self.tickets, len(self.members)),
            ),
            num_warps=config.num_warps,
            max_registers=registers,
            RULE=self.rule.name,
            SWITCH=form.switch,
            PARAM=_triton_dtype(form.param),
            GRAD=_triton_dtype(form.grad),
            STATE0=_triton_dtype(form.states[0]),
            STATE1=_triton_dtype(form.states[1]),
            STATE2=_triton_dtype(form.states[2]),
            MASTER=_triton_dtype(form.master),
            STEP=form.step,
            CONTROLLED=control is not None,
            STOCHASTIC=stochastic and form.param == torch.bfloat16,
            ZERO_GRADS=zero,
            STATE_BLOCK=_eight_bits.BLOCK,
            FIELDS=len(FIELDS),
            SCALAR_FIELDS=len(SCALARS),
            CHUNK=config.chunk,
            BLOCK=config.block,
        )

    def _config(self, every_option: bool, stochastic: bool) -> tuple[configs.OptimConfig, int | None]:
        """The update's tiles, and the registers to ask for."""
        form = self.form
        dtypes = (form.param, form.grad, *form.states, form.master)
        # 8-bit states are worked on in fp32: tiles for 16 bits would take twice the registers, and spill.
        narrow = form.states[0] == torch.uint8
        sizes = [4 if narrow else dtype.itemsize for dtype in dtypes if dtype is not None]
        architecture = _runtime.architecture(self.device)
        registers = configs.registers_asked_for(architecture)
        if narrow:
            registers = configs.OPTIM_EIGHT_BITS_REGISTERS
        elif every_option and (stochastic or max(sizes) == 2):
            registers = configs.OPTIM_REGISTERS
        return configs.optim_config(architecture, *sizes), registers


def _on_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for."""
    if device.type == "cuda" and not _runtime.INTERPRETED:
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class Control:
    """What comes before the update: the gradients' norm and factor, and whether to leave the step out."""

    def __init__(self, bundles: list[Bundle], options: Any, group: Any = None):
        """group: the processes over which the parameters are cut, if they are."""
        self.group = group
        device = bundles[0].device
        self.bundles, self.options = bundles, options
        self.values = torch.empty(2, dtype=torch.float32, device=device)
        self.partial = torch.empty(sum(bundle.chunks for bundle in bundles), dtype=torch.float32, device=device)

    def run(self, sent: list[Sent], scaling: Any, skipped: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(CONTROL, norm), None where nothing asks for it. `scaling`: GradScaler's scale and found_inf, or None."""
        grad_scale, found_inf = scaling
        if not self.options.needs_norm:
            if grad_scale is None and found_inf is None:
                return None, None
            self._launch(self.partial, None, grad_scale, found_inf, skipped)
            return self.values, None
        offset = 0
        for bundle, (buffer, _) in zip(self.bundles, sent, strict=True):
            bundle.launch_norm(buffer, self.partial, offset)
            offset += bundle.chunks
        norm = torch.empty((), dtype=torch.float32, device=self.values.device)
        partial = self.partial if self.group is None else sum_over(self.group, self.partial)
        self._launch(partial, norm, grad_scale, found_inf, skipped)
        return self.values, norm

    def _launch(
        self,
        partial: Tensor,
        norm: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        skipped: Tensor,
    ) -> None:
        options, limit = self.options, self.options.max_grad_norm
        config = configs.optim_config(_runtime.architecture(self.values.device), self.partial.itemsize)
        launch(
            control_kernel,
            (1,),
            (
                partial,
                # A pointer that is not read stands for what is not there.
                partial if grad_scale is None else grad_scale,
                partial if found_inf is None else found_inf,
                self.values if norm is None else norm,
                *(self.values, skipped, partial.numel(), 0.0 if limit is None else float(limit)),
            ),
            num_warps=config.num_warps,
            HAS_NORM=norm is not None,
            CLIP=limit is not None,
            SKIP_NONFINITE=options.skip_nonfinite,
            HAS_SCALE=grad_scale is not None,
            HAS_FOUND=found_inf is not None,
            BLOCK=config.block,
        )


class Plan:
    """The launches that update these parameters, whose groups all follow one rule."""

    def __init__(
        self, rule: Rule, members: list[Member], grads: list[Tensor], groups: list[Group], states: Any, options: Any
    ):
        self.rule, self.options, self.members = rule, options, members
        self.ids = [id(member.kept[0]) for member in members]
        self.forms = group_forms(rule, groups)
        self.dtypes = [grad.dtype for grad in grads]
        self.strides = [member.param.stride() for member in members]
        self.tensors = [t for member in members for t in member.tensors if t is not None]
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.known = [states.get(member.kept[0], {}) for member in members]
        self.known_ids = [id(state) for state in states.values()]
        positions: dict[Form, list[int]] = {}
        for position, (member, grad) in enumerate(zip(members, grads, strict=True)):
            positions.setdefault(form_of(rule, member, grad, groups), []).append(position)
        self.parts = [
            (Bundle(rule, form, [members[i] for i in chosen], groups), chosen) for form, chosen in positions.items()
        ]
        self.bundles = [bundle for bundle, _ in self.parts]

    def fits(self, params: list[Tensor], grads: list[Tensor], groups: list[Group], states: Any) -> bool:
        """Whether the plan still describes these parameters, their states and their options."""
        if [id(p) for p in params] != self.ids or group_forms(self.rule, groups) != self.forms:
            return False
        if [grad.dtype for grad in grads] != self.dtypes:
            return False
        # Looking up a parameter hashes it, in Python: the states' own identities tell as much.
        if [id(state) for state in states.values()] != self.known_ids:
            return False
        for member, state in zip(self.members, self.known, strict=True):
            for key, tensor in zip(member.keys, member.kept, strict=True):
                if key is not None and state.get(key) is not tensor:
                    return False
        return [t.data_ptr() for t in self.tensors] == self.addresses

    def send(self, grads: list[Tensor], groups: list[Group]) -> tuple[list[Sent], list[Tensor]]:
        """What each bundle reads, and the gradients in their parameters' memory order: copies where it is another."""
        if any(g.stride() != s for g, s in zip(grads, self.strides, strict=True)):
            placed = [laid_out_as(m.param, g) for m, g in zip(self.members, grads, strict=True)]
        else:
            placed = grads
        addresses = [grad.data_ptr() for grad in placed]
        return [bundle.send([addresses[i] for i in chosen], groups) for bundle, chosen in self.parts], placed

    def update(self, sent: list[Sent], control: Tensor | None, grads: list[Tensor], placed: list[Tensor]) -> None:
        """Launch the updates; gradients are zeroed with them where that is asked for."""
        options = self.options
        for bundle, mine in zip(self.bundles, sent, strict=True):
            bundle.launch_update(mine, control, stochastic=options.stochastic_rounding, zero=options.zero_grads)
        if options.zero_grads and placed is not grads:
            for copy, grad in zip(placed, grads, strict=True):
                if copy is not grad:
                    grad.zero_()


def group_forms(rule: Rule, groups: list[Group]) -> list[Any]:
    """What of each group's options decides the launch and the states."""
    return [(rule.states(group), rule.switch(group), rule.step(group), group.get(SEED, 0)) for group in groups]


def form_of(rule: Rule, member: Member, grad: Tensor, groups: list[Group]) -> Form:
    """The member's form."""
    dtypes = [None if tensor is None else tensor.dtype for tensor in member.tensors]
    switch = rule.switch(groups[member.group])
    return Form(switch, member.param.dtype, grad.dtype, tuple(dtypes[1:4]), dtypes[4], dtypes[5] is not None)  # type: ignore[arg-type]


def make_member(
    rule: Rule, number: int, index: int, group: Group, param: Tensor, state: dict[str, Any], options: Any
) -> Member:
    """The parameter's tensors, those of its state that are not there yet made; torch's own keys, torch's own shapes.

    With wide options states are fp32 whatever the parameter's dtype; a 16-bit parameter may have an fp32 master.
    """
    keys, step = rule.states(group), rule.step(group)
    lows: tuple[str | None, ...] = (None, None)
    if step is None and options.stochastic_rounding:
        step = STEP
    if options.state_bits == 8 and _eight_bits.covers(param):
        keys, lows = (*_eight_bits.CODES, None), _eight_bits.LOWS
    else:
        _eight_bits.widen(state, torch.float32 if options.wide else param.dtype)
    missing = [key for key in keys if key is not None and state.get(key) is None]
    has_master = options.master_weights and param.dtype != torch.float32
    if (missing or (has_master and MASTER not in state)) and capturing_graph(param.device):
        raise RuntimeError("the optimizer's state is made in its first step: run one before capturing a graph")
    if step is not None:
        # Our own count of SGD's steps is missing from torch's states, whose first step is over.
        began = 0.0 if missing or step == "step" or not any(keys) else 1.0
        count = torch.as_tensor(state.get(step, began))
        state[step] = count.to(param.device, torch.float32)
    if any(lows):
        _eight_bits.prepare(state, param)
    else:
        for key in missing:
            dtype = torch.float32 if options.wide else param.dtype
            state[key] = torch.full_like(param, rule.initial(group), dtype=dtype, requires_grad=False)
    if has_master and MASTER not in state:
        state[MASTER] = param.detach().to(torch.float32, copy=True)
    named = (*keys, MASTER if has_master else None)
    for key in named:
        if key is not None and not is_sharded(param):
            state[key] = laid_out_as(param, state[key])
    named = (*named, step, *lows)
    kept = (param, *(None if key is None else state[key] for key in named))
    tensors = tuple(None if tensor is None else local(tensor) for tensor in kept)
    return Member(number, index, tensors, (None, *named), kept)
