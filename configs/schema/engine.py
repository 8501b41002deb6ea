"""The engine section: how a run uses its machine."""

import os
from typing import Literal

from mclr.configs.schema.section import NotNegative, Section, setting


class Engine(Section):
    """How a run uses its machine."""

    kind: Literal["auto", "local", "deepspeed"] = setting(
        "auto", "local: plain torch in one process; deepspeed: under a launcher; auto: deepspeed where there is a launcher"
    )
    zero: int = setting(0, "Stage of ZeRO. 0: nothing is sharded; 1: optimizer; 2: also gradients; 3: also weights", ge=0, le=3)
    offload: bool = setting(False, "ZeRO 1 to 3: keep the optimizer's fp32 weights and moments in host memory")
    precision: Literal["fp32", "bf16"] = setting("fp32", "Of matrix products, fp32 or the faster bf16; weights are always fp32")
    gradient_clipping: NotNegative = setting(0.0, "Largest norm of the gradient; 0: no clipping")
    activation_checkpointing: bool = setting(False, "Compute the activations of every block again in the backward pass")
    compile: bool = setting(False, "Compile every block with torch.compile")
    reference: Literal["auto", "whole", "sharded"] = setting(
        "auto", "cc_dpo, cca, ddo: the reference is whole on every rank, or sharded over ranks; auto: whole up to 2e9 parameters"
    )
    timeout: int = setting(1800, "Seconds without progress that end the run; below 180 only on a local disk", gt=0, le=10**6)
    kernels: Literal["auto", "torch", "triton"] = setting(
        "auto", "Triton kernels. auto: where they won on this GPU (kernels/RESULTS.json); torch: never; triton: always"
    )

    def here(self) -> Literal["local", "deepspeed"]:
        """The engine of this process: `auto` is deepspeed under a launcher. The config keeps `auto`, since other processes read it."""
        if self.kind == "auto":
            return "deepspeed" if os.environ.get("LOCAL_RANK") else "local"
        return self.kind
