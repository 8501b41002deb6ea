"""What all operations share: reaching Triton, launching or recording a kernel, refusing bad input, checking against a definition.

A file holds a family of operations, for each of them: its formula, definition() in plain torch, Triton kernels forward and backward, the
public function, and an Op that the tests, the compile report and the bench read.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from mclr.kernels.choice import interpreting, using

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no builds for macOS and Windows: there every operation runs in torch
    triton = tl = None

Shape = dict[str, int]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# relative RMS error against fp64, of outputs; of gradients twice that
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of 2 that is not below n, within [least, most], which are powers of 2."""
    return min(max(1 << (n - 1).bit_length(), least), most)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: arguments by name, its compile-time constants among them."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are written down and not run: what they would have computed is left uninitialised."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any) -> None:
    """Run a kernel over a grid of programs, on the GPU of its first tensor. constants: its compile-time constants, by name.

    Raises ValueError where there is no GPU.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | constants, warps, stages))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type != "cuda" and not interpreting():
        refuse("kernels", f"triton needs a GPU, not {device}; use engine.kernels=auto")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # products and sums may become one operation, whatever Triton's default of the day is: numbers must not move with it
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def floats(triton: bool) -> tuple[torch.dtype, ...]:
    """What an operation takes: fp64, which is there for checks, in torch alone."""
    return FLOATS if triton else (*FLOATS, torch.float64)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def refuse(name: str, says: str) -> NoReturn:
    """Raises ValueError naming the argument. Called inside an `if`, so that no message is written where none is needed."""
    raise ValueError(f"{name}: {says}")


def refuse_unlike(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
    """Raises ValueError where a tensor is empty, of another shape or device than the first one's, or a float of a dtype not listed.

    tensors: by the names of the arguments. shapes: what each must have.
    """
    device = next(iter(tensors.values())).device
    for name, t in tensors.items():
        if tuple(t.shape) != shapes[name]:
            refuse(name, f"shape {tuple(t.shape)}, not {shapes[name]}")
        if t.numel() == 0:
            refuse(name, f"shape {tuple(t.shape)} holds nothing")
        if t.device != device:
            refuse(name, f"on {t.device}, not on {device} as {next(iter(tensors))}")
        if t.is_floating_point() and t.dtype not in dtypes:
            refuse(name, f"dtype {t.dtype}, not one of {', '.join(map(str, dtypes))}")


def refuse_index(name: str, index: Tensor, limit: int) -> None:
    """Raises ValueError unless index is int64 in [0, limit).

    What lies on a GPU is checked there, before whatever is launched next, and fails as indexing out of range does in torch: looking at
    it here would have the host wait, at every call. So it is in what torch.compile makes.
    """
    if index.dtype != torch.int64:
        refuse(name, f"dtype {index.dtype}, not torch.int64")
    if index.is_meta:
        return
    if index.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(((index >= 0) & (index < limit)).all(), f"{name}: outside 0..{limit - 1}")
        return
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= limit:
        refuse(name, f"holds {low if low < 0 else high}, outside 0..{limit - 1}")


@dataclass(frozen=True)
class Cost:
    """What one call must at least do: bytes that it reads and writes, floating-point operations of its matrix products."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class Op:
    """An operation as tests, compile report and bench see it.

    run: the public function; definition: the same in plain torch, as mathematics; both take what `draw` gives, by name, and return a
    tensor, or a tuple or list of them. draw: sizes, dtype of the activations, generator -> inputs on the CPU; a tensor that requires
    gradient is compared by its gradient. shapes: sizes of full-sized networks, by name; tiny: those of the tests. narrow: sizes that
    leave the compiled kernels as they are, set small where these are only compiled.
    """

    name: str
    run: Callable[..., Any]
    definition: Callable[..., Any]
    draw: Callable[[Shape, torch.dtype, torch.Generator], dict[str, Any]]
    shapes: dict[str, Shape]
    tiny: dict[str, Shape]
    cost: Callable[[Shape, torch.dtype], Cost]
    narrow: Shape = field(default_factory=dict)

    def launches(self, shape: Shape, dtype: torch.dtype) -> list[Launch]:
        """The kernel launches of one forward and backward, which are not run."""
        inputs = self.draw(shape | self.narrow, dtype, torch.Generator().manual_seed(0))
        with recording() as launches, using("triton"):
            outputs = as_tuple(self.run(**inputs))
            if leaves(inputs):
                torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        return launches


@dataclass(frozen=True)
class Error:
    """How far one output or gradient is from the definition in fp64. relative: RMS of the difference over that of the definition."""

    name: str
    relative: float
    largest: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.allowed  # false for NaN


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def moved(inputs: dict[str, Any], convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same inputs, each tensor converted; new leaves that require gradient where the old ones did."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(each) for each in value]
        if not isinstance(value, Tensor):
            return value
        return convert(value.detach()).requires_grad_(value.requires_grad)

    return {name: one(value) for name, value in inputs.items()}


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that require gradient, by name; those of a list are numbered."""
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        flat |= {f"{name}[{i}]": each for i, each in enumerate(value)} if isinstance(value, list) else {name: value}
    return {name: t for name, t in flat.items() if isinstance(t, Tensor) and t.requires_grad}


def results(function: Callable[..., Any], inputs: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Outputs, and gradients of all leaves under random upstream gradients, by name; in fp64 on the CPU."""
    outputs = as_tuple(function(**inputs))
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    wanted = leaves(inputs)
    if wanted:
        grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
        found |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {name: t.double().cpu() for name, t in found.items()}


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty gives inside is NaN, so that an element read before it was written, or never written, shows."""
    memory: Any = torch.utils.deterministic
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        memory.fill_uninitialized_memory = fill


def compare(op: Op, inputs: dict[str, Any], dtype: torch.dtype, kernels: str = "triton") -> list[Error]:
    """Errors of every output and gradient of op.run on these inputs, by `kernels`, against its definition on the same numbers in fp64.

    dtype: whose tolerances hold.
    """
    wide = moved(inputs, lambda t: t.cpu().double() if t.is_floating_point() else t.cpu())
    expected = results(op.definition, wide)
    with using(kernels), poisoned():
        found = results(op.run, inputs)
    errors = []
    for name, true in expected.items():
        difference = found[name] - true
        scale = true.square().mean().sqrt()
        relative = (difference.square().mean().sqrt() / scale).item() if scale > 0 else float(difference.abs().max() > 0)
        allowed = TOLERANCE[dtype] * (1 if name.startswith("output") else 2)
        errors.append(Error(name, relative, difference.abs().max().item(), allowed))
    return errors


def check(op: Op, device: torch.device | str, dtype: torch.dtype, shape: Shape, kernels: str = "triton") -> list[Error]:
    """As compare, on random inputs of these sizes: what the tests run in the interpreter and the bench before it times anything."""
    inputs = moved(op.draw(shape, dtype, torch.Generator().manual_seed(0)), lambda t: t.to(device))
    return compare(op, inputs, dtype, kernels)
