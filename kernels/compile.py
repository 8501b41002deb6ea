"""`python -m kernels.compile`: compile every kernel ahead of time, without a GPU, and read what it takes of one.

Registers and spills come from the ptxas that Triton carries, shared memory from Triton. A kernel above BOUNDS fails.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mclr.kernels.op import DTYPES, Launch, triton
from mclr.kernels.registry import OPS

ARCHITECTURES = (80, 90, 100)
# Bytes spilled per thread, and of shared memory per block: what an A100, an H100 and a B200 grant one block.
SPILLS = 0
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (`{self.prog} --help` shows the arguments)\n")


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes: registers per thread, bytes spilled per thread, bytes of shared memory per block."""

    registers: int
    spilled: int
    shared: int

    def ok(self, architecture: int) -> bool:
        return self.spilled <= SPILLS and self.shared <= SHARED[architecture]


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """(types by name, constants by place, what is known of the arguments by place), as Triton's own launcher would find them.

    Like it: None and the integer 1 become constants, and what is divisible by 16 is known to be.
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


def compile_launch(launch: Launch, architecture: int) -> Report:
    """Raises what Triton or ptxas raise."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    types, constants, known = signature(launch)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=known)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target (\w+)", ptx.read_text())
        assert target is not None
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", str(ptx), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    assert registers is not None, said
    return Report(int(registers[1]), max(map(int, spills), default=0), compiled.metadata.shared)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m kernels.compile", description=__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES), help="(default: all)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of the activations (default: all)")
    parser.add_argument("--only", choices=OPS, nargs="+", default=list(OPS), help="operations (default: all)")
    args = parser.parse_args(argv)
    if triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("triton is not installed" if triton is None else "TRITON_INTERPRET=1 replaces the compiler: unset it")
    failed, done = 0, set()
    print(
        "| op | kernel | constants | dtype | sm | warps | registers | spilled | shared |\n" + "| --- " * 5 + "| ---: " * 4 + "|"
    )
    for name in args.only:
        for dtype in args.dtype:
            for shape in OPS[name].shapes.values():
                for launch in OPS[name].launches(shape, DTYPES[dtype]):
                    constants = " ".join(f"{p.name}={launch.arguments[p.name]}" for p in launch.kernel.params if p.is_constexpr)
                    for architecture in args.arch:
                        # shapes share configurations
                        key = (launch.kernel.fn.__qualname__, str(signature(launch)), launch.warps, launch.stages, architecture)
                        if key in done:
                            continue
                        done.add(key)
                        report = compile_launch(launch, architecture)
                        failed += not report.ok(architecture)
                        row = [name, launch.kernel.fn.__name__, constants, dtype, architecture, launch.warps, report.registers]
                        row += [report.spilled, f"{report.shared}{'' if report.ok(architecture) else ' ABOVE THE BOUNDS'}"]
                        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"\n{len(done)} kernels compiled, {failed} above the bounds: {SPILLS} bytes spilled, shared memory {SHARED}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
