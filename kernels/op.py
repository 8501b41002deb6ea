"""What all operations share: access to Triton, launching or recording kernels, refusing bad arguments, checks against a definition.

The file of an operation holds its formula, its definition in plain torch, the Triton kernels of forward and backward, the public
function, and an Op. Tests, compile report and bench read the Op.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mclr.kernels.choice import interpreting, using

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no builds; every operation runs in torch there
    triton = tl = None

Shape = dict[str, int]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = tuple(DTYPES.values())
# allowed relative RMS error of outputs against fp64; twice that for gradients
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of 2 that is at least n, clipped to [least, most] (powers of 2)."""
    return min(max(1 << (n - 1).bit_length(), least), most)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments by name, compile-time constants included."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches inside and do not run them; their results stay uninitialised."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Run a kernel over a grid of programs, on the GPU of its first tensor. constants: compile-time constants, by name.

    Raises ValueError if the tensor is not on a GPU.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | constants, warps))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type != "cuda" and not interpreting():
        refuse("kernels", f"triton needs a GPU, not {device}; use engine.kernels=auto")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # allow fused products and sums explicitly: results then do not change with Triton's default
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


def floats(triton: bool) -> tuple[torch.dtype, ...]:
    """The dtypes that an operation accepts; torch also takes fp64, for checks."""
    return FLOATS if triton else (*FLOATS, torch.float64)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics of x: fp32, or fp64 if x is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def result_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a result that is asked for in `dtype`: fp64 if x is, since checks need it."""
    return x.dtype if x.dtype == torch.float64 else dtype


def refuse(name: str, says: str) -> NoReturn:
    """Raises ValueError that names the argument. Call it inside an `if`: then a message is formatted only when it is needed."""
    raise ValueError(f"{name}: {says}")


# arguments that hold int64 numbers, in all operations
INDICES = ("index", "tokens")


def fit(dtypes: Sequence[torch.dtype], **arguments: tuple[Tensor | None, Sequence[Any]]) -> dict[Any, int]:
    """Sizes by letter. An argument comes with a letter per dimension, as x=(x_RLD, "RLD"); None is left out.

    Raises ValueError that names an argument if it is empty, if its sizes or its device differ from those of the arguments before it, or
    if its dtype is not one of `dtypes`. refuse_index checks the dtype of INDICES.
    """
    sizes: dict[Any, int] = {}
    given = {name: (t, letters) for name, (t, letters) in arguments.items() if t is not None}
    first, device = next((name, t.device) for name, (t, _) in given.items())
    for name, (t, letters) in given.items():
        if t.ndim != len(letters):
            refuse(name, f"{t.ndim} dimensions, not {len(letters)}")
        shape = tuple(sizes.setdefault(letter, size) for letter, size in zip(letters, t.shape, strict=True))
        if tuple(t.shape) != shape:
            refuse(name, f"shape {tuple(t.shape)}, not {shape}")
        if t.numel() == 0:
            refuse(name, f"shape {tuple(t.shape)} holds nothing")
        if t.device != device:
            refuse(name, f"on {t.device}, not on {device} as {first}")
        if name not in INDICES and t.dtype not in dtypes:
            refuse(name, f"dtype {t.dtype}, not one of {', '.join(map(str, dtypes))}")
    return sizes


def refuse_index(name: str, index: Tensor, limit: int) -> None:
    """Raises ValueError unless index is int64 in [0, limit).

    The GPU checks values on a GPU, and fails as torch's own indexing does: if the host read them, it would wait at every call. Compiled
    code does the same.
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
class Op:
    """An operation as tests, compile report and bench see it.

    run: the public function. definition: the formula in plain torch. Both take the results of `draw` by name and return a tensor, or a
    tuple or list of tensors; None among them is left out. draw: (sizes, dtype of the activations, generator) -> inputs on the CPU; checks
    compare the gradients of inputs that require gradient. shapes: sizes of full-sized networks, by name. tiny: sizes of the tests.
    narrow: small values of the sizes that compiled kernels do not depend on. rereads: whether the backward pass needs the inputs.
    """

    name: str
    run: Callable[..., Any]
    definition: Callable[..., Any]
    draw: Callable[[Shape, torch.dtype, torch.Generator], dict[str, Any]]
    shapes: dict[str, Shape]
    tiny: dict[str, Shape]
    narrow: Shape
    rereads: bool = True

    def launches(self, shape: Shape, dtype: torch.dtype) -> list[Launch]:
        """Record the kernel launches of one forward and backward."""
        inputs = self.draw(shape | self.narrow, dtype, torch.Generator().manual_seed(0))
        with recording() as launches, using("triton"):
            outputs = as_tuple(self.run(**inputs))
            if leaves(inputs):
                torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        return launches


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(out for out in outputs if out is not None)


def moved(inputs: dict[str, Any], convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same inputs, with every tensor converted to a new leaf that requires gradient if the old one did."""
    return tree_map_only(Tensor, lambda t: convert(t.detach()).requires_grad_(t.requires_grad), inputs)


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that require gradient, by name; the entries of a list get numbers."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        found |= {f"{name}[{i}]": each for i, each in enumerate(value)} if isinstance(value, list) else {name: value}
    return {name: t for name, t in found.items() if isinstance(t, Tensor) and t.requires_grad}


def results(function: Callable[..., Any], inputs: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Outputs, and gradients of all leaves for random upstream gradients: by name, in fp64, on the CPU."""
    outputs, wanted = as_tuple(function(**inputs)), leaves(inputs)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream) if wanted else ()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {name: t.double().cpu() for name, t in found.items()}


def compare(op: Op, inputs: dict[str, Any], dtype: torch.dtype, kernels: str = "triton") -> list[str]:
    """Compare op.run in the mode `kernels` with the definition in fp64: a line for every output and gradient that is wrong.

    dtype: selects the tolerance. Errors are relative: RMS of the difference over RMS of the definition.
    """
    expected = results(op.definition, moved(inputs, lambda t: t.cpu().double() if t.is_floating_point() else t.cpu()))
    before = torch.get_deterministic_debug_mode()
    # this mode fills new memory with NaN: memory that is read before it is written then shows
    torch.set_deterministic_debug_mode("warn")
    try:
        with using(kernels):
            found = results(op.run, inputs)
    finally:
        torch.set_deterministic_debug_mode(before)
    wrong = []
    for name, true in expected.items():
        off, scale = (found[name] - true).square().mean().sqrt().item(), true.square().mean().sqrt().item()
        allowed = TOLERANCE[dtype] * (1 if name.startswith("output") else 2)
        # in this form NaN is wrong
        if not off <= allowed * scale:
            wrong.append(f"{name} is {off / scale if scale else off:.2g} off, allowed {allowed:.2g}")
    return wrong
