"""`python -m kernels.compile`: compiles every kernel without a GPU, and prints the resources that it needs.

Registers and spills come from the ptxas that Triton brings, shared memory from Triton. The exit status is 1 if a kernel spills
registers or needs more shared memory than the GPU has.
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mclr.kernels.choice import interpreting
from mclr.kernels.op import DTYPES, Launch, triton
from mclr.kernels.registry import OPS
from mclr.kernels.timing import Parser, table

# GPU architecture -> bytes of shared memory that one block may use (A100, H100, B200)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {dtype: f"*{name}" for name, dtype in DTYPES.items()} | {torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """(types by name, constants by place, attributes by place) of the arguments, as Triton's own launcher finds them.

    None and the integer 1 become constants. Integers and addresses that are divisible by 16 get an attribute that says so.
    """
    types, constants, known = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, Tensor):
            types[parameter.name] = TYPES[value.dtype]
            # torch aligns every allocation
            known[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                known[(place,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32"
    return types, constants, known


def compile_launch(launch: Launch, architecture: int) -> tuple[int, int, int]:
    """Compile one kernel: (registers and spilled bytes per thread, bytes of shared memory per block). Raises Triton's and ptxas' errors."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    types, constants, known = signature(launch)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=known)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        name = f"--gpu-name={sm_arch_from_capability(architecture)}"
        command = [get_ptxas(architecture).path, "-v", name, str(ptx), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,), spills = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    return int(registers), max(map(int, spills), default=0), compiled.metadata.shared


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m kernels.compile", description=__doc__)
    parser.add_argument("--arch", type=int, choices=SHARED, nargs="+", default=list(SHARED), help="(default: all)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of the activations (default: all)")
    args = parser.parse_args(argv)
    if triton is None or interpreting():
        parser.error("triton is not installed" if triton is None else "TRITON_INTERPRET=1 replaces the compiler: unset it")
    head = ["op", "kernel", "constants", "dtype", "sm", "warps", "registers", "spilled", "shared"]
    print(table(head, [], left=5), flush=True)
    failed, done = 0, set()
    for op, dtype in product(OPS.values(), args.dtype):
        launches = [launch for shape in op.shapes.values() for launch in op.launches(shape, DTYPES[dtype])]
        for launch, architecture in product(launches, args.arch):
            # several shapes give the same kernel
            key = (launch.kernel.fn.__qualname__, str(signature(launch)), launch.warps, architecture)
            if key in done:
                continue
            done.add(key)
            registers, spilled, shared = compile_launch(launch, architecture)
            ok = spilled == 0 and shared <= SHARED[architecture]
            failed += not ok
            constants = " ".join(f"{p.name}={launch.arguments[p.name]}" for p in launch.kernel.params if p.is_constexpr)
            row = [op.name, launch.kernel.fn.__name__, constants, dtype, architecture, launch.warps, registers, spilled]
            print("| " + " | ".join(map(str, row)) + f" | {shared}{'' if ok else ' ABOVE THE BOUNDS'} |", flush=True)
    print(f"\n{len(done)} kernels compiled, {failed} above the bounds: no byte spilled, shared memory {SHARED}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
