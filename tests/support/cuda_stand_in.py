"""The CPU stands in for a CUDA device: what runs on a GPU runs here, with real values.

Nothing of megatron_smlp/platform/cpu.py is active: `torch.cuda.is_available()` returns True, so our
code and Megatron's take the paths that they take on a GPU, with nothing replaced. Tensors are plain
CPU tensors, so that autograd, gloo and every operator work; which of them are "on the device" is
tracked separately, by storage. Two modes do that:

* `_Names` answers queries of a tensor (`.device`, `.is_cuda`, `.type()`), and turns
  `device="cuda"`, `.to("cuda")`, `.cuda()`, `.cpu()` into copies that change devices.
* `_Operators` sees every operator, including those of the backward pass and of collectives. It
  raises where CUDA would: tensors of two devices in one operator, a CPU tensor in an NCCL
  collective, the fused Adam's step count on the CPU. Outputs are on the device of the inputs.

`watch()` also counts the operators, host synchronisations and bytes of a stretch of code.

Not modeled: kernels (Apex, Transformer Engine), concurrent streams, device memory, NCCL itself.
torch.compile is switched off. Triton kernels run where they are interpreted
(support/interpreted.py, with `launched`), and are otherwise missing.

    PYTHONPATH=tests python -c "from support.cuda_stand_in import install; install(); ..."
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
import torch._dynamo  # maps torch's functions at import: before they are replaced
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HOPPER = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
)
"""An H100 as torch describes it."""
TYPES = {
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float64: "Double",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}
# Operators that copy between devices, or take indices from the CPU, as CUDA's do.
ACROSS = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}
ACROSS |= {"aten::_index_put_impl_", "aten::set_", "aten::_unsafe_index"}
# Operators that read sizes or values on the host before they can continue.
SYNCHRONISE = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::bincount",
    "aten::masked_select",
}
SYNCHRONISE |= {"aten::_linalg_check_errors", "aten::equal", "aten::_unique2", "aten::item"}
VIEWS = {"aten::detach", "aten::alias", "aten::_reshape_alias", "aten::_unsafe_view"}
VIEWS |= {"aten::lift_fresh"}
# Operators that allocate memory without reading or writing it.
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class _Residents:
    """The storages that are on the device."""

    def __init__(self) -> None:
        # A weak reference keeps the address from being reused.
        self.storages: dict[int, StorageWeakRef] = {}

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def place(self, tensor: torch.Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if device.type == "cuda":
            self.storages[storage._cdata] = StorageWeakRef(storage)
            if len(self.storages) % 4096 == 0:
                self._forget_the_dead()
        else:
            self.storages.pop(storage._cdata, None)

    def _forget_the_dead(self) -> None:
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}


@dataclass
class Tally:
    """Counts of what a stretch of code did on the device."""

    operators: collections.Counter[str] = field(default_factory=collections.Counter)
    """Calls of operators that launch kernels, by name, without views and collectives."""
    synchronisations: collections.Counter[str] = field(default_factory=collections.Counter)
    """Times that the host waited for the device, by `what at file:line`: to read a number, for a
    copy that is not `non_blocking`, for an event recorded since the last such wait."""
    bytes: int = 0
    """Bytes that the operators read and write: the sizes of their inputs and outputs."""


_residents = _Residents()
_tallies: list[Tally] = []
_waits = 0  # host waits so far: work requested before the last one is done
_asked: list[torch.device] = []  # the device that the current call names
_surroundings: list[torch.device] = []  # the device of what a call makes in C++ from sizes alone
_generator = torch.Generator()
_nccl: set[str] = set()  # names of NCCL groups


@contextlib.contextmanager
def watch() -> Iterator[Tally]:
    """Count what the code inside does on the device; may be nested."""
    tally = Tally()
    _tallies.append(tally)
    try:
        yield tally
    finally:
        _tallies.remove(tally)


@functools.cache
def install() -> None:
    """Give this process a CUDA device until it exits. Call it before Megatron is imported."""
    assert not torch.cuda.is_available(), "there is a real CUDA device"
    assert not hasattr(torch.cuda, "_smlp_cpu_platform"), "the CPU platform is active"
    _answer_for_the_device()
    _answer_for_the_groups()
    names = _Names()
    names.__enter__()
    _see_backward_passes(names)
    _Operators().__enter__()
    from megatron_smlp.flags import check_run

    check_run._check_compiler = lambda: None  # nothing is compiled here
    check_run._check_devices = lambda: None  # ranks share it


def _see_backward_passes(names: _Names) -> None:
    """Keep `names` active inside `backward()`, a torch function in which it would see nothing: the
    Python parts of the pass, such as Megatron's all-to-all, name devices too."""
    run = torch.autograd._engine_run_backward

    @functools.wraps(run)
    def seen(*args: Any, **kwargs: Any) -> Any:
        if names in torch.overrides._get_current_function_mode_stack():
            return run(*args, **kwargs)
        with names:
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = seen


def _site() -> str:
    """Return file:line of the innermost caller outside torch and this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path != __file__ and "contextlib" not in path:
            break
        frame = frame.f_back
    path = frame.f_code.co_filename.split("site-packages/")[-1].split("megatron_smlp/")[-1]
    return f"{path}:{frame.f_lineno}"


def _synchronised(what: str) -> None:
    global _waits
    _waits += 1
    for tally in _tallies:
        tally.synchronisations[f"{what} at {_site()}"] += 1


@contextlib.contextmanager
def _during(stack: list[torch.device], device: torch.device) -> Iterator[None]:
    """Push this device onto `_asked` or `_surroundings` for the duration of a call."""
    stack.append(device)
    try:
        yield
    finally:
        stack.pop()


def _named(device: Any) -> torch.device | None:
    """Resolve a device argument as real CUDA does: numbers are CUDA devices."""
    if device is None:
        return None
    kind = device.type if isinstance(device, torch.device) else str(device).split(":")[0]
    return CUDA if kind == "cuda" or kind.isdigit() else torch.device(device)


class _Names(TorchFunctionMode):
    """Intercepts torch's functions, and tensors' methods and attributes."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return func(*args, **kwargs)  # a subclass answers for itself
        special = _SPECIAL.get(func)
        if special is not None:
            return special(func, *args, **kwargs)
        if func in _FROM_DATA:
            _read_and_send(args[0], to=_named(kwargs.get("device")) or CPU)
        if kwargs.get("device") is not None:
            return _made_on(_named(kwargs["device"]), func, args, kwargs)
        with _during(_surroundings, CUDA if _any_on_device(args) else CPU):
            return func(*args, **kwargs)


def _made_on(device: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a call that has `device=`."""
    if device.type not in ("cuda", "cpu"):
        return func(*args, **kwargs)
    kwargs = {**kwargs, "device": CPU}
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    with _during(_asked, device):
        answer = func(*args, **kwargs)
        if isinstance(answer, torch.Tensor):  # torch.tensor([...]) makes it in C++
            _residents.place(answer, device)
        return answer


def _read_and_send(data: Any, *, to: torch.device) -> None:
    """Count the waits of `torch.tensor(data, device=to)`: for tensors of a list, and the copy."""
    tensors = [leaf for leaf in tree_leaves(data) if _has_storage(leaf)]
    for tensor in tensors if isinstance(data, list | tuple) else ():
        if _residents.has(tensor):
            _synchronised("a number in a list")
    if to.type == "cuda" and not any(_residents.has(tensor) for tensor in tensors):
        _synchronised("copy to the device")


def _any_on_device(args: Any) -> bool:
    """Return whether an argument, or an item of a leading list (`torch.cat`), is on the device."""
    args = (*args, *args[0]) if args and isinstance(args[0], list | tuple) else args
    return any(_has_storage(arg) and _residents.has(arg) for arg in args)


class _Operators(TorchDispatchMode):
    """Intercepts what is computed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)]
        name = func._schema.name
        if name.startswith("c10d::"):
            _check_collective(name, args, inputs)
            return func(*args, **kwargs)
        device = _common_device(name, inputs)
        if _asked:
            device = _asked[-1]
        elif not inputs:
            device = _surroundings_of_a_size()
        if name == "aten::copy_" and _is_across(inputs) and True not in args[2:]:
            _synchronised("copy between devices")
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        draws = device.type == "cuda" and torch.Tag.nondeterministic_seeded in func.tags
        with _drawing_on_the_device() if draws else contextlib.nullcontext():
            outputs = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(outputs) if _has_storage(leaf)]
        for tensor in made:
            if tensor.untyped_storage()._cdata not in known:
                _residents.place(tensor, device)
        if _tallies and device.type == "cuda":
            _count(func, name, args, inputs, made)
        return outputs


@contextlib.contextmanager
def _drawing_on_the_device() -> Iterator[None]:
    """Draw from the device's generator, and leave the CPU's untouched."""
    cpus = torch.default_generator.get_state()
    torch.default_generator.set_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(cpus)


def _surroundings_of_a_size() -> torch.device:
    """Return the device of what the current call or a backward pass makes in C++ from a size."""
    if _surroundings:
        return _surroundings[-1]
    return CUDA if torch._C._current_graph_task_id() != -1 else CPU


def _is_across(tensors: list[torch.Tensor]) -> bool:
    return len({_residents.has(tensor) for tensor in tensors}) > 1


def _has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _common_device(name: str, tensors: list[torch.Tensor]) -> torch.device:
    """Return the device on which the operator runs.

    Raises:
        RuntimeError: its tensors are on two devices, which CUDA's operators reject too. Most of
            them accept a 0-dimensional CPU tensor.
    """
    strict = name.startswith("aten::_fused_")
    on_device = [tensor for tensor in tensors if _residents.has(tensor)]
    if not on_device:
        return CPU
    strangers = [t for t in tensors if (strict or t.dim()) and not _residents.has(t)]
    if strangers and name not in ACROSS:
        shapes = [tuple(tensor.shape) for tensor in strangers]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! (in {name}; on the CPU: {shapes}; at {_site()})"
        )
    if name == "aten::copy_":
        return CUDA if _residents.has(tensors[0]) else CPU
    return CUDA


def _check_collective(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    group = next((g for a in args if (g := _as_group(a)) is not None), None)
    if group is None or group.group_name not in _nccl:
        return
    strangers = [tuple(t.shape) for t in tensors if t.numel() and not _residents.has(t)]
    # A barrier's own tensor is made inside the backend.
    if strangers and name != "c10d::barrier":
        raise RuntimeError(
            f"No backend type associated with device type cpu ({name} over NCCL; on the CPU: "
            f"{strangers}; at {_site()})"
        )


def _as_group(value: Any) -> Any:
    if isinstance(value, torch.ScriptObject):
        with contextlib.suppress(RuntimeError):
            return dist.ProcessGroup.unbox(value)
    return None


def _count(
    func: Any, name: str, args: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> None:
    if func.is_view or name in VIEWS | ALLOCATIONS:
        return
    if name in SYNCHRONISE or _has_a_mask(args):
        _synchronised(name.removeprefix("aten::"))
    moved = {id(t): t.numel() * t.element_size() for t in (*inputs, *outputs)}
    for tally in _tallies:
        tally.operators[name.removeprefix("aten::")] += 1
        tally.bytes += sum(moved.values())


def launched(name: str, args: Any) -> None:
    """Count a Triton kernel's launch, which no mode sees, when passed to `quick_interpreter`.

    Raises:
        RuntimeError: one of its tensors is on the CPU.
    """
    if not _get_current_dispatch_mode_stack():
        return
    tensors = {id(arg): arg for arg in args if isinstance(arg, torch.Tensor)}.values()
    with torch._C.DisableTorchFunction():
        if not all(_residents.has(tensor) for tensor in tensors):
            raise RuntimeError(f"Pointer argument cannot be accessed from Triton (cpu?) in {name}")
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for tally in _tallies:
        tally.operators[f"triton::{name}"] += 1
        tally.bytes += size


def _has_a_mask(args: Any) -> bool:
    """Return whether this is `x[mask]` or `x[mask] = y`: the host must ask for the size."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


# Queries of tensors, and copies between devices


def _device(_: Any, tensor: torch.Tensor) -> torch.device:
    return CUDA if _has_storage(tensor) and _residents.has(tensor) else tensor.device


def _is_cuda(_: Any, tensor: torch.Tensor) -> bool:
    return _device(None, tensor).type == "cuda"


def _is_cpu(_: Any, tensor: torch.Tensor) -> bool:
    return _device(None, tensor).type == "cpu"


def _get_device(_: Any, tensor: torch.Tensor) -> int:
    return 0 if _is_cuda(None, tensor) else -1


def _type(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return func(tensor, *args, **kwargs)
    plain: str = func(tensor)
    return plain.replace("torch.", "torch.cuda.", 1) if _is_cuda(None, tensor) else plain


def _to(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Handle all forms of `.to(...)`; copy where the device changes."""
    other = next((a for a in (*args, kwargs.get("other")) if isinstance(a, torch.Tensor)), None)
    if other is not None:
        args = (_device(None, other), other.dtype, *args[1:])
        kwargs.pop("other", None)
    device = kwargs.pop("device", None)
    if args and not isinstance(args[0], torch.dtype | bool):
        device, args = args[0], args[1:]
    target = _named(device)
    if target is not None and target.type not in ("cuda", "cpu"):
        return func(tensor, target, *args, **kwargs)
    return _moved(func, tensor, target, *args, **kwargs)


def _moved(
    func: Any, tensor: torch.Tensor, target: torch.device | None, *args: Any, **kwargs: Any
) -> Any:
    here = _device(None, tensor)
    names = ("dtype", "non_blocking", "copy") if args and args[0] is None else ()
    kwargs |= dict(zip(names[1:], args[1:], strict=False))
    args = () if names else args
    if target is None or target.type == here.type:
        return func(tensor, *args, **kwargs) if args or kwargs else tensor
    names = ("dtype", "non_blocking", "copy")
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs, "copy": True}
    if not kwargs.get("non_blocking"):
        _synchronised("copy to the device" if target.type == "cuda" else "to cpu")
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = tensor.dtype
    with _during(_asked, target):
        return torch.Tensor.to(tensor, **kwargs)


def _cuda(
    _: Any, tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> Any:
    return _moved(torch.Tensor.to, tensor, CUDA, non_blocking=non_blocking)


def _cpu(_: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _moved(torch.Tensor.to, tensor, CPU)


def _numpy(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if _is_cuda(None, tensor):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )
    return func(tensor, *args, **kwargs)


def _tolist(func: Any, tensor: torch.Tensor) -> Any:
    if _is_cuda(None, tensor):
        _synchronised("tolist")
    return func(tensor)


def _itself(_: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return tensor


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _one_hot(func: Any, tensor: torch.Tensor, num_classes: int = -1) -> Any:
    """Avoid the CPU's search for the largest value, made even if given the number of classes."""
    if num_classes == -1 or not _is_cuda(None, tensor):
        return func(tensor, num_classes)
    with _during(_surroundings, CUDA):
        hot = torch.zeros((*tensor.shape, num_classes), dtype=torch.int64)
        return hot.scatter_(-1, tensor[..., None], 1)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _device,
    torch.Tensor.is_cuda.__get__: _is_cuda,
    torch.Tensor.is_cpu.__get__: _is_cpu,
    torch.Tensor.get_device: _get_device,
    torch.Tensor.type: _type,
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.tolist: _tolist,
    torch.nn.functional.one_hot: _one_hot,
    torch.Tensor.pin_memory: _itself,
}


# Functions that make a tensor from host data.
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


# The device, its streams and random state


class Stream:
    """A stream whose work is done when a call returns, so that there is nothing to wait for."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    wait_stream = wait_event = _nothing

    def synchronize(self) -> None:
        _synchronised("stream")

    def is_capturing(self) -> bool:
        return False

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record()
        return event


class Event:
    """An event that the host waits for, unless it has already waited for something later."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded = -1

    wait = _nothing

    def record(self, *_: Any) -> None:
        self.recorded = _waits

    def synchronize(self) -> None:
        if self.recorded == _waits:
            _synchronised("event")

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True


def _constant(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


@contextlib.contextmanager
def _no_context(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _answer_for_the_device() -> None:
    stream = Stream()
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_name": HOPPER.name,
        "get_device_properties": HOPPER,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "current_stream": stream,
        "default_stream": stream,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (80 << 30, 80 << 30),
        "memory_stats": collections.defaultdict(int),
        "get_sync_debug_mode": 0,
        "is_current_stream_capturing": False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _constant(answer))
    for name in ("set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, _nothing)
    torch.cuda.synchronize = lambda *_: _synchronised("device")
    for name in ("set_stream", "set_sync_debug_mode", "_lazy_init", "init"):
        setattr(torch.cuda, name, _nothing)
    torch.cuda.Stream, torch.cuda.Event = Stream, Event  # type: ignore[misc,assignment]
    torch.accelerator.current_stream = _constant(stream)
    torch.accelerator.current_device_index = _constant(0)
    torch.cuda.stream = torch.cuda.device = _no_context  # type: ignore[assignment,misc]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _nothing)
    torch.cuda.nvtx.range = _no_context
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    torch.cuda.default_generators = (_generator,)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device="cuda": _generator.get_state()
        module.set_rng_state = lambda state, device="cuda": _generator.set_state(state)
        module.manual_seed = module.manual_seed_all = _generator.manual_seed
    for dtype, name in TYPES.items():
        setattr(torch.cuda, f"{name}Tensor", _TensorType(f"{name}Tensor", (), {"dtype": dtype}))


class _TensorType(type):
    """`torch.cuda.FloatTensor([1.0])` and `isinstance(tensor, torch.cuda.FloatTensor)`."""

    dtype: torch.dtype

    def __call__(cls, data: Any = ()) -> torch.Tensor:
        return torch.tensor(data, dtype=cls.dtype, device="cuda")

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype is cls.dtype and value.is_cuda


# Process groups: gloo under the name of NCCL


def _answer_for_the_groups() -> None:
    begin, make, barrier, backend = (
        dist.init_process_group,
        dist.new_group,
        dist.barrier,
        dist.get_backend,
    )

    @functools.wraps(begin)
    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        begin("gloo", *args, **kwargs)
        if "gloo" not in str(backend):
            _nccl.add(dist.group.WORLD.group_name)

    @functools.wraps(make)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pg_options", None)
        wanted = kwargs.pop("backend", None)
        group = make(*args, **kwargs, backend="gloo")
        is_nccl = wanted is None or "gloo" not in str(wanted)
        if is_nccl and isinstance(group, dist.ProcessGroup):
            _nccl.add(group.group_name)
        return group

    @functools.wraps(barrier)
    def plain_barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group, async_op)

    @functools.wraps(backend)
    def get_backend(group: Any = None) -> Any:
        group = group or dist.group.WORLD
        return "nccl" if group.group_name in _nccl else backend(group)

    def object_device(group: Any = None) -> str:
        return "cuda" if get_backend(group) == "nccl" else "cpu"

    _take_unlike_parts()
    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group = init_process_group, new_group
        module.barrier, module.get_backend = plain_barrier, get_backend
    dist.distributed_c10d._get_object_coll_device = object_device


def _take_unlike_parts() -> None:
    """Gather and scatter tensors of different sizes, as NCCL does; gloo refuses to."""
    gather, scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(gather)
    def all_gather(parts: Any, own: Any, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in parts}) == 1:
            return gather(parts, own, group, async_op)
        for rank, part in enumerate(parts):
            if rank == dist.get_rank(group):
                part.copy_(own)
            dist.broadcast(part, group=group, group_src=rank)
        return None

    @functools.wraps(scatter)
    def reduce_scatter(
        own: Any,
        parts: Any,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in parts}) == 1:
            return scatter(own, parts, op, group, async_op)
        for rank, part in enumerate(parts):
            total = part.clone()
            dist.reduce(total, op=op, group=group, group_dst=rank)
            if rank == dist.get_rank(group):
                own.copy_(total)
        return None

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
