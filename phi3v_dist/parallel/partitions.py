"""A ZeRO-3 engine ↔ named pieces of flat tensors: the one module that reaches inside DeepSpeed.

In: an engine between two optimizer steps. Out: for every parameter the elements this rank owns, of the fp32 master and
of each optimizer state, under the parameter's official name; and the way back, at any world size. Frozen weights are
only fingerprinted: they are still in the folder they came from.

Surprise: ZeRO-3 cuts every parameter by itself. Rank r of W owns elements [r*P, (r+1)*P) of the flattened tensor with
P = ceil(numel / W), so a late rank may own nothing; what fills its share up to P is uninitialised memory, which must
never be saved or hashed.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phi3v_dist import versions
from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.fingerprint import fingerprint, fingerprint_text

COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
HOW_IT_STEPS = ("foreach", "fused", "capturable", "differentiable")  # of a parameter group: the engine's own choice
LOSS_SCALE_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

CAST_BLOCK = 2**24  # elements compared at a time
WRAPPED = ".base_layer."  # where peft puts a module that got an adapter

# (tensor name, state, start, length) → those elements of the flattened tensor
ReadElements = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model, whole.

    role: "trained", "frozen" (not stored) or "buffer".
    dtypes: state → dtype as stored. "weight" is the master of a trained tensor; Adam adds "exp_avg" and "exp_avg_sq",
        which do not exist before the first step. Of a frozen tensor, "weight" is the type of computation.
    fingerprint: of a frozen tensor in that type, hexadecimal; see `fingerprint`.
    """

    shape: tuple[int, ...]
    role: str
    param_group: int | None
    dtypes: dict[str, str]
    fingerprint: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened tensor: a view per state, without copy and without gradient."""

    name: str
    start: int
    states: dict[str, Tensor]

    @property
    def length(self) -> int:
        return self.states["weight"].numel()


class Partitions:
    """This rank's share of what an engine holds. One without an optimizer has weights only; they can be saved."""

    def __init__(self, engine: Any):
        _require_supported(engine)
        self.engine = engine
        self.zero = engine.optimizer
        self.has_optimizer = hasattr(self.zero, "fp16_groups")
        # Membership in a sub-group decides what is trained: requires_grad may have been switched off since.
        self._place: dict[int, tuple[int, int]] = {}  # id of parameter → (sub-group, offset in its flat tensor)
        self._frozen: dict[str, str] | None = None  # fingerprints, once they were asked for
        for sub_group, params in enumerate(self.zero.fp16_groups if self.has_optimizer else ()):
            offset = 0
            for param in params:
                self._place[id(param)] = (sub_group, offset)
                offset += param.partition_numel()

    def require_between_steps(self) -> None:
        """Refuse inside an accumulation window: its gradients are in no checkpoint and would be lost."""
        if self.has_optimizer and (self.zero.micro_step_id > 0 or self.zero._epilogue_ran_this_backward):
            raise CheckpointError(
                f"cannot save after global step {self.engine.global_steps}: gradients of the next step are already "
                "accumulated and would be lost. Save right after the engine.step() that updated the weights."
            )

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor. The first call is collective when some are frozen."""
        specs = {}
        fingerprints = self._fingerprints()
        for name, param in self._named_parameters():
            shape = tuple(param.ds_shape)
            if id(param) in self._place:
                sub_group, _ = self._place[id(param)]
                dtypes = {state: _dtype_name(flat) for state, flat in self._flat_states(sub_group).items()}
                group = self.zero.sub_group_to_group_id[sub_group]
                specs[name] = TensorSpec(shape, "trained", group, dtypes)
            else:
                role = "frozen" if name in fingerprints else "trained"
                dtypes = {"weight": _dtype_name(param.ds_tensor)}
                specs[name] = TensorSpec(shape, role, None, dtypes, fingerprints.get(name))
        for name, buffer in self._buffers():
            specs[name] = TensorSpec(tuple(buffer.shape), "buffer", None, {"weight": _dtype_name(buffer)})
        return specs

    def _fingerprints(self) -> dict[str, str]:
        """Of every frozen tensor, the same on all ranks; read once, since nothing changes them. Without an optimizer
        nothing is known to be frozen."""
        if self._frozen is None:
            self._frozen = self._read_fingerprints() if self.has_optimizer else {}
        return self._frozen

    def _read_fingerprints(self) -> dict[str, str]:
        frozen = {name: param for name, param in self._named_parameters() if id(param) not in self._place}
        if not frozen:
            return {}
        sums = torch.stack([fingerprint(_own_elements(param), _owned(param)[0]) for param in frozen.values()])
        sums = sums.to(self.engine.device)  # offloaded weights are on the CPU, where NCCL does not sum
        dist.all_reduce(sums)
        return {name: fingerprint_text(total) for name, total in zip(frozen, sums, strict=True)}

    def aliases(self) -> dict[str, str]:
        """Second names of tied parameters → the name they are saved under."""
        first = {id(param): name for name, param in self._named_parameters()}
        every = self._named_parameters(remove_duplicate=False)
        return {name: first[id(param)] for name, param in every if name != first[id(param)]}

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns of all that is stored, an empty piece where it owns nothing; buffers are rank 0's.

        Of states on a disk, the pieces are views of copies, which live as long as any of them.
        """
        read: dict[int, dict[str, Tensor]] = {}  # sub-group → its flat tensors
        for name, param in self._named_parameters():
            start, length = _owned(param)
            if id(param) in self._place:
                sub_group, offset = self._place[id(param)]
                flats = read[sub_group] = read.get(sub_group) or self._read_states(sub_group)
                yield Piece(name, start, {state: flat.narrow(0, offset, length) for state, flat in flats.items()})
            elif not self.has_optimizer:
                yield Piece(name, start, {"weight": _own_elements(param)})
        for name, buffer in self._buffers():
            elements = buffer.detach().flatten()
            yield Piece(name, 0, {"weight": elements if self.engine.global_rank == 0 else elements[:0]})

    def settings(self) -> dict[str, Any]:
        """The engine's numbers, as JSON: counters, hyperparameters now in force, schedule, loss scale."""
        counters = {name: getattr(self.engine, name) for name in COUNTERS}
        if not self.has_optimizer:
            nothing: dict[str, Any] = {"param_groups": [], "optimizer_scalars": [], "schedule": None, "loss_scale": {}}
            return {"counters": counters} | nothing
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.zero.optimizer.param_groups]
        scalars: list[dict[str, Any]] = [{} for _ in groups]
        for sub_group in range(len(self.zero.fp16_groups)):
            scalars[self.zero.sub_group_to_group_id[sub_group]] = self._scalar_states(sub_group)
        scheduler, scaler = self.engine.lr_scheduler, self.zero.loss_scaler
        return {
            "counters": counters,
            "param_groups": groups,
            "optimizer_scalars": scalars,
            "schedule": None if scheduler is None else scheduler.state_dict(),
            "loss_scale": {name: getattr(scaler, name) for name in LOSS_SCALE_NUMBERS if hasattr(scaler, name)},
        }

    def differences(self, saved: dict[str, TensorSpec], settings: dict[str, Any]) -> list[str]:
        """Why a checkpoint cannot be loaded into this engine, one line for each tensor; empty if it can."""
        if not self.has_optimizer:
            return ["the engine has no optimizer, so there is nothing to continue: use `model.init_from`"]
        present, problems = self.specs(), []
        for name in sorted(saved.keys() | present.keys()):
            if name not in present:
                problems.append(f"{name}: in the checkpoint, not in the model")
            elif name not in saved:
                problems.append(f"{name}: in the model, not in the checkpoint")
            else:
                problems += _spec_differences(name, saved[name], present[name])
        num_saved, num_present = len(settings["param_groups"]), len(self.zero.optimizer.param_groups)
        if num_saved != num_present:
            problems.append(f"{num_saved} parameter groups in the checkpoint, {num_present} in the optimizer")
        if (settings["schedule"] is None) != (self.engine.lr_scheduler is None):
            problems.append("a learning-rate schedule is in only one of checkpoint and engine")
        return problems

    @torch.no_grad()
    def restore(self, specs: dict[str, TensorSpec], settings: dict[str, Any], read: ReadElements) -> None:
        """Set every weight, optimizer state and number. Collective. The order matters, in a live engine too."""
        zero = self.zero
        zero.checkpoint_event_prologue()  # drops gathered copies of the old weights
        zero.zero_grad()
        if zero.swap_optimizer:
            zero.optimizer_swapper.purge_state()  # forgets moments on the disk, else they would be read into new ones
        names = {id(param): name for name, param in self._named_parameters()}
        for sub_group, params in enumerate(zero.fp16_groups):  # others are frozen, and were found to be what they were
            with _in_memory(zero, sub_group, write=True):
                self._create_optimizer_states(sub_group, specs[names[id(params[0])]], settings["optimizer_scalars"])
                for param in params:
                    (start, length), (_, offset) = _owned(param), self._place[id(param)]
                    for state, flat in self._flat_states(sub_group).items():
                        elements = read(names[id(param)], state, start, length)
                        _fill(flat.narrow(0, offset, param.partition_numel()), elements)
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)  # master → the weights that compute
        for name, buffer in self._buffers():
            buffer.copy_(read(name, "weight", 0, buffer.numel()).view(buffer.shape))
        zero.checkpoint_event_epilogue()  # drops secondary (hpZ) copies, gathers persistent parameters again
        self._restore_settings(settings)

    def _restore_settings(self, settings: dict[str, Any]) -> None:
        for group, saved in zip(self.zero.optimizer.param_groups, settings["param_groups"], strict=True):
            numbers = {key: value for key, value in saved.items() if key not in HOW_IT_STEPS}
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in numbers.items()})
        if settings["schedule"] is not None:
            self.engine.lr_scheduler.load_state_dict(settings["schedule"])
        for name, value in settings["loss_scale"].items():
            setattr(self.zero.loss_scaler, name, value)
        for name, value in settings["counters"].items():
            setattr(self.engine, name, value)
        # Another number of accumulation steps (other world size, same global batch) must start at a window's border.
        accumulation_steps = self.engine.gradient_accumulation_steps()
        if self.engine.micro_steps % accumulation_steps:
            self.engine.micro_steps = self.engine.global_steps * accumulation_steps

    def _create_optimizer_states(self, sub_group: int, spec: TensorSpec, scalars: list[dict[str, Any]]) -> None:
        """A fresh optimizer has no states before its first step, so make them in the form they were saved in."""
        flat = self.zero.fp32_partitioned_groups_flat[sub_group]
        state: dict[str, Any] = {}
        for key, scalar in scalars[self.zero.sub_group_to_group_id[sub_group]].items():
            value, dtype = scalar["value"], scalar["tensor_dtype"]
            state[key] = value if dtype is None else torch.tensor(value, dtype=getattr(torch, dtype))
        for key, dtype in spec.dtypes.items():
            if key != "weight":
                state[key] = torch.zeros_like(flat, dtype=getattr(torch, dtype))
        self.zero.optimizer.state[flat] = state

    def _read_states(self, sub_group: int) -> dict[str, Tensor]:
        """`_flat_states`, of a sub-group on a disk as copies."""
        with _in_memory(self.zero, sub_group) as is_on_disk, torch.no_grad():
            flats = self._flat_states(sub_group)
            return {state: flat.clone() for state, flat in flats.items()} if is_on_disk else flats

    def _flat_states(self, sub_group: int) -> dict[str, Tensor]:
        """The flat tensors of a sub-group: its master and the optimizer states that have an element for each weight.

        While they are on a disk all are there, but empty.
        """
        master = self.zero.fp32_partitioned_groups_flat[sub_group]
        states = self.zero.optimizer.state.get(master, {})
        return {"weight": master.detach()} | {k: v for k, v in states.items() if _per_element(v, master)}

    def _scalar_states(self, sub_group: int) -> dict[str, Any]:
        """The rest of the optimizer's states, such as Adam's step: a tensor in torch's AdamW, an int in DeepSpeed's."""
        master = self.zero.fp32_partitioned_groups_flat[sub_group]
        scalars: dict[str, Any] = {}
        for key, value in self.zero.optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor) and value.numel() == 1:
                scalars[key] = {"value": value.item(), "tensor_dtype": _dtype_name(value)}
            elif isinstance(value, int | float):
                scalars[key] = {"value": value, "tensor_dtype": None}
            elif not _per_element(value, master):
                raise CheckpointError(
                    f"cannot save the optimizer state {key!r} of {type(self.zero.optimizer).__name__}: it is neither a "
                    "number nor one value for each weight. Use AdamW."
                )
        return scalars

    def _named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, Any]]:
        for name, param in self.engine.module.named_parameters(remove_duplicate=remove_duplicate):
            yield official_name(name), param

    def _buffers(self) -> list[tuple[str, Tensor]]:
        persistent = self.engine.module.state_dict(keep_vars=True).keys()
        return [(name, buffer) for name, buffer in self.engine.module.named_buffers() if name in persistent]


def _owned(param: Any) -> tuple[int, int]:
    """Start and length of this rank's share of a flattened parameter, without padding."""
    share = param.partition_numel()
    start = min(param.ds_zero_partition_rank * share, param.ds_numel)
    return start, min(share, param.ds_numel - start)


def _own_elements(param: Any) -> Tensor:
    """This rank's elements in the type of computation, without padding."""
    return param.ds_tensor.detach().flatten()[: _owned(param)[1]]


def is_partitioned(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id")


def gathered(parameters: list[nn.Parameter]):  # type: ignore[no-untyped-def]
    """The whole parameters on every rank, for the length of a `with`."""
    if not any(is_partitioned(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@torch.no_grad()
def set_partition(param: Any, whole: Tensor) -> None:
    """This rank's share of a freshly partitioned parameter, from the whole tensor. Other ranks do theirs."""
    assert param.ds_status.name == "NOT_AVAILABLE", f"{param.ds_shape} is gathered, so its copy would be stale"
    start, length = _owned(param)
    _fill(param.ds_tensor, whole.flatten()[start : start + length])
    param.ds_secondary_tensor = None  # hpZ made one of what was in memory before


@torch.no_grad()
def spoil_gradients(engine: Any) -> None:
    """Have all ranks' next boundary `engine.step()` change nothing.

    DeepSpeed leaves a step out when the norm of the gradients is not finite: no weight, moment or count of updates
    moves, and `engine.optimizer.overflow` says so. That way is tested, so a step that is to be left out for another
    reason takes it too. One tensor is enough for the norm. Call `clear_gradients` after the step.
    """
    _fill_a_gradient(engine, math.nan)


@torch.no_grad()
def clear_gradients(engine: Any) -> None:
    """After a step that was left out: a parameter without gradient in the next one keeps none of this one's."""
    _fill_a_gradient(engine, 0.0)  # of `spoil_gradients`, wherever DeepSpeed keeps it
    zero = engine.optimizer
    zero.grad_partitions_flat_buffer.zero_()
    for master in zero.fp32_partitioned_groups_flat:
        if master.grad is not None:  # with an offloaded optimizer
            master.grad.zero_()


def _fill_a_gradient(engine: Any, value: float) -> None:
    """Set this rank's part of the largest trained parameter's gradient."""
    from deepspeed.utils import safe_set_local_grad

    largest = max((p for p in engine.module.parameters() if p.requires_grad), key=lambda p: p.ds_numel)
    safe_set_local_grad(largest, torch.full_like(largest.ds_tensor, value, device=engine.device))


@torch.no_grad()
def replicated(engine: Any) -> dict[str, Tensor]:
    """What every rank must hold alike: parameters that stay gathered between steps, and buffers.

    After a skipped step no parameter is gathered, on any rank.
    """
    parameters = {official_name(name): param for name, param in engine.module.named_parameters()}
    gathered = {name: p.detach() for name, p in parameters.items() if p.ds_persist and p.ds_status.name == "AVAILABLE"}
    return gathered | {name: buffer.detach() for name, buffer in engine.module.named_buffers()}


@torch.no_grad()
def own_share(engine: Any, name: str) -> tuple[int, Tensor]:
    """Start and elements of a parameter that this rank owns, in the type of computation."""
    param = next(param for known, param in engine.module.named_parameters() if official_name(known) == name)
    return _owned(param)[0], _own_elements(param)


@torch.no_grad()
def cast_differences(engine: Any) -> list[str]:
    """Trained tensors of which this rank's computing copy is not the cast of its master, bit by bit.

    A bit of a master below the precision of the type of computation does not show here.
    """
    zero = engine.optimizer
    names = {id(param): official_name(name) for name, param in engine.module.named_parameters()}
    found = []
    for sub_group, params in enumerate(zero.fp16_groups):
        with _in_memory(zero, sub_group):
            master = zero.fp32_partitioned_groups_flat[sub_group]
            offset = 0
            for param in params:
                computing = _own_elements(param)
                if not _is_cast(master.narrow(0, offset, computing.numel()), computing):
                    found.append(names[id(param)])
                offset += param.partition_numel()
    return found


@contextmanager
def _in_memory(zero: Any, sub_group: int, write: bool = False) -> Iterator[bool]:
    """The states of a sub-group for the length of a `with`, read from a disk if that is where they are; the value says
    whether. write: and written there again."""
    is_on_disk = zero._swappable_optimizer_subgroup(sub_group)
    if is_on_disk:
        zero._optimizer_states_and_gradient_swap_in(sub_group)
    try:
        yield is_on_disk
    finally:
        if is_on_disk and write:
            zero._optimizer_states_and_gradient_swap_out(sub_group)
        elif is_on_disk:
            zero._release_swap_buffers(sub_group)


def _is_cast(master: Tensor, computing: Tensor) -> bool:
    """In pieces, since a sub-group may have a billion elements; on the master's device, which may be the CPU."""
    integers = {2: torch.int16, 4: torch.int32}[computing.element_size()]  # so that NaN equals itself
    for begin in range(0, master.numel(), CAST_BLOCK):
        wanted = master.detach()[begin : begin + CAST_BLOCK].to(computing.dtype)
        present = computing.detach()[begin : begin + CAST_BLOCK].to(master.device)
        if not torch.equal(wanted.view(integers), present.view(integers)):
            return False
    return True


def official_name(name: str) -> str:
    """A parameter's name without what peft adds; names of adapters themselves stay."""
    return name.replace(WRAPPED, ".")


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


def _fill(target: Tensor, elements: Tensor) -> None:
    target[: elements.numel()].copy_(elements)
    target[elements.numel() :].zero_()


def _spec_differences(name: str, there: TensorSpec, here: TensorSpec) -> list[str]:
    for what in ("shape", "role", "param_group"):
        if getattr(there, what) != getattr(here, what):
            return [f"{name}: {what} {getattr(there, what)} in the checkpoint, {getattr(here, what)} in the model"]
    if here.role == "frozen" and (there.fingerprint, there.dtypes) != (here.fingerprint, here.dtypes):
        return [
            f"{name}: frozen, and not the weights it was saved with ({there.dtypes['weight']} {there.fingerprint}, now "
            f"{here.dtypes['weight']} {here.fingerprint}): `model.path`, `model.init_from` or `model.dtype` changed"
        ]
    return []


def _per_element(value: Any, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == master.shape


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_supported(engine: Any) -> None:
    if wrong := versions.problems("deepspeed"):
        raise CheckpointError(wrong)
    if engine.zero_optimization_stage() != 3:
        stage = engine.zero_optimization_stage()
        raise CheckpointError(f"checkpoints hold ZeRO-3 partitions; this engine runs stage {stage}. Set stage 3.")
    zero = engine.optimizer
    if not hasattr(zero, "fp16_groups"):
        return  # without an optimizer none of what follows exists
    from deepspeed.runtime.swap_tensor.pipelined_optimizer_swapper import PipelinedOptimizerSwapper

    split_optimizer = zero.offload_optimizer and zero.partial_offload != 1
    unsupported = {
        "its optimizer state read from NVMe ahead (offload_optimizer.pipeline_…)": zero.swap_optimizer
        and isinstance(zero.optimizer_swapper, PipelinedOptimizerSwapper),
        "its parameters on NVMe (offload_param.device)": zero.params_in_nvme_and_cpu,
        "an optimizer offloaded in part (offload_optimizer.ratio)": split_optimizer,
        "ZenFlow": zero.zenflow,
    }
    problems = [f"cannot checkpoint an engine with {what}: switch it off" for what, used in unsupported.items() if used]
    if problems:
        raise CheckpointError(problems)
