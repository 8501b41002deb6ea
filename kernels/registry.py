"""The list of operations: tests, compile report and bench read it."""

from kernels import denoising_value

OPS = {op.name: op for op in (denoising_value.OP,)}
