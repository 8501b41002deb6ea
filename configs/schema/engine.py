"""The engine section: how a run uses its machine."""

import os
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mclr.configs.schema.section import NotNegative, Section


class Engine(Section):
    kind: Literal["auto", "local", "deepspeed"] = "auto"
    zero: Annotated[int, Field(ge=0, le=3)] = 0  # stage
    offload: bool = False  # fp32 masters and moments of ZeRO 1 to 3 in host memory
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products; weights are fp32
    gradient_clipping: NotNegative = 0.0  # norm; 0: none
    activation_checkpointing: bool = False  # backward computes the activations of every block again
    compile: bool = False  # every block by torch.compile
    reference: Literal["auto", "whole", "sharded"] = "auto"  # reference network on every rank; auto: whole up to 2e9 parameters
    # seconds without a sign of life from a rank, after which the run ends and names it; below 180 on a local disk alone, since shared
    # folders show changes late
    timeout: Annotated[int, Field(gt=0, le=10**6)] = 1800
    # fused operations: auto, Triton where it won on this GPU (kernels/RESULTS.json); torch, never; triton, always
    kernels: Literal["auto", "torch", "triton"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> "Engine":
        if self.kind == "local" and self.zero:
            raise ValueError(f"zero={self.zero} needs kind=deepspeed")
        if self.offload and not self.zero:
            raise ValueError("offload=true needs zero=1, 2 or 3")
        return self

    def here(self) -> Literal["local", "deepspeed"]:
        """The engine of this process: `auto` is deepspeed under a launcher. Not resolved in the config, which outlives the process."""
        if self.kind == "auto":
            return "deepspeed" if os.environ.get("LOCAL_RANK") else "local"
        return self.kind
