"""DiT: a transformer that denoises latents patch by patch (Peebles & Xie 2023, arXiv 2212.09748); SiT and REPA's SiT are the same network.

- the image is cut into patches, one token each, with fixed positions (sines and cosines)
- adaptive LayerNorm: time and condition together give the shifts, scales and gates of every block
- full attention over all tokens; tanh-GELU FFN
What the time and the answer mean is the form of the network (mclr/forms.py): DiT answers noise, SiT (arXiv 2401.08740) and REPA (arXiv
2410.06940) a velocity.

What rows of one sample share is computed once: the tokens before the first block, and the features of time.
Precision as in models/var.py: parameters, residual stream and statistics are fp32, products are in the dtype of an enclosing autocast.

Legend: B samples, R rows, C H W image, L tokens, D width, p side of a patch.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mclr.models.blocks import Stream, running, trunk_dtype
from mclr.models.conditions import map_rows
from mclr.models.convert import Published, Shapes
from mclr.models.dial import FEATURES, Dial, features
from mclr.models.options import DiTConfig

NORM_EPS = 1e-6


class Block(nn.Module):
    """x += gate * attention(modulated norm(x)), then the same with the FFN."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
        self.heads = config.num_heads
        self.modulation = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.project = nn.Linear(D, D)
        self.ffn = nn.Sequential(nn.Linear(D, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, D))

    def forward(self, stream: Stream, active_RD: Tensor) -> Stream:
        """active: SiLU of the sum of time and condition, [R, D]."""
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = self.modulation(active_RD).chunk(6, dim=-1)
        dtype = trunk_dtype(stream.x)
        stream, h_RLD = stream.norm(scale_attn, shift_attn, NORM_EPS, dtype)
        q, k, v = rearrange(self.qkv(h_RLD), "R L (n H d) -> n R H L d", n=3, H=self.heads)
        y_RLD = self.project(rearrange(F.scaled_dot_product_attention(q, k, v), "R H L d -> R L (H d)"))
        stream, h_RLD = stream._replace(y_RlD=y_RLD, gate_RD=gate_attn).norm(scale_ffn, shift_ffn, NORM_EPS, dtype)
        return stream._replace(y_RlD=self.ffn(h_RLD), gate_RD=gate_ffn)


class DiT(nn.Module):
    """Noisy image, time and condition -> the answer, and what else the network says. The null condition has index num_classes."""

    condition_layer, map_layer = "embed_condition.weight", staticmethod(map_rows)

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        D, p, C = config.embed_dim, config.patch_size, config.img_channels
        self.embed_patch = nn.Conv2d(C, D, p, stride=p)
        self.embed_time = nn.Sequential(nn.Linear(FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        self.embed_condition = nn.Embedding(config.num_classes + 1, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, p * p * C * (1 + config.variance))
        self.register_buffer("position_LD", positions(config), persistent=False)
        # REPA's, for its own training alone: kept, so that they can be written back
        self.projectors = nn.ModuleList(Kept(D, config.projector_dim, size) for size in config.projector_sizes)
        # what the invariant contamination ratio looks at, where it does: the tokens after half of the blocks, [R, D, h, w]
        self.middle = nn.Identity()
        self.activation_checkpointing = False
        self.init_weights()
        if config.strength_max:
            self.dial = Dial(D)

    def forward(
        self,
        noisy_BCHW: Tensor,
        time_B: Tensor,
        c_R: Tensor,
        index_R: Tensor | None = None,
        strength_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(answer [R, C, H, W], the rest [R, C or 0, H, W]), in the trunk's dtype.

        c_R: int64 in 0..num_classes. index_R: sample of each row; None where rows are samples. strength_R: of a network with a
        dial. rest: of a network with `variance`.
        """
        p, side = self.config.patch_size, noisy_BCHW.shape[-1] // self.config.patch_size
        x_BLD = self.embed_patch(noisy_BCHW).flatten(2).transpose(1, 2) + self.position_LD
        time_BD = self.embed_time(features(time_B))
        if index_R is not None:
            time_RD, stream = time_BD[index_R], Stream(x_BLD, index_R, x_BLD[:, 0][index_R])
        else:
            time_RD, stream = time_BD, Stream(x_BLD)
        condition_RD = self.embed_condition(c_R)
        if self.config.strength_max:
            condition_RD = condition_RD + self.dial(strength_R, c_R, self.config.num_classes)
        active_RD = F.silu(time_RD + condition_RD)
        run = running(self.activation_checkpointing)
        for i, block in enumerate(self.blocks):
            stream = run(block, stream, active_RD)
            if i == len(self.blocks) // 2 and self.middle._forward_hooks:
                x_RLD, _, _, y_RLD, gate_RD = stream
                self.middle(rearrange(x_RLD + gate_RD[:, None] * y_RLD, "R (h w) D -> R D h w", h=side))
        shift_RD, scale_RD = self.head_modulation(active_RD).chunk(2, dim=-1)
        _, h_RLD = stream.norm(scale_RD, shift_RD, NORM_EPS, trunk_dtype(stream.x))
        whole = rearrange(self.head(h_RLD), "R (h w) (p q C) -> R C (h p) (w q)", h=side, p=p, q=p)
        answer, rest = whole.split([self.config.img_channels, whole.shape[1] - self.config.img_channels], dim=1)
        return answer, rest

    @torch.no_grad()
    def init_weights(self) -> None:
        """Published initialisation, from torch's global generator: every block begins as identity, and the first answer is 0.

        | parameter | value |
        | --- | --- |
        | every weight of a Linear, and of the patches, not named below | uniform (Xavier) |
        | condition, time | normal, std .02 |
        | modulations, head, every bias | 0 |
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "modulation" in name or name.startswith("head"):
                nn.init.zeros_(parameter)
            elif name.startswith(("embed_time", "embed_condition")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.view(len(parameter), -1))


class Kept(nn.Module):
    """A projector of REPA, Linear SiLU Linear SiLU Linear: its weights, which no forward uses and no optimizer changes."""

    def __init__(self, width: int, hidden: int, size: int):
        super().__init__()
        for name, (columns, rows) in {"0": (width, hidden), "2": (hidden, hidden), "4": (hidden, size)}.items():
            layer = nn.Module()
            layer.register_buffer("weight", torch.zeros(rows, columns))
            layer.register_buffer("bias", torch.zeros(rows))
            self.add_module(name, layer)


def positions(config: DiTConfig) -> Tensor:
    """The fixed positions of the patches, [L, D], fp32: column, then row; of each the sines, then the cosines."""
    side, quarter = config.img_resolution // config.patch_size, config.embed_dim // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = one.expand(side, side, -1), one[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()


def infer_dit(shape: Shapes) -> DiTConfig:
    """Heads are 72 or 64 wide. The form is not shown: DiT and SiT have the same entries."""
    D, channels, p, _ = shape["x_embedder.proj.weight"]
    outputs = shape["final_layer.linear.weight"][0] // (p * p)
    if outputs not in (channels, 2 * channels):
        raise LookupError(f"answers have {outputs} channels, neither {channels} nor {2 * channels}")
    tokens = shape["pos_embed"][1]
    sizes = [
        shape[f"projectors.{i}.4.weight"][0]
        for i in (shape.numbers("projectors.#.4.weight") if "projectors.0.4.weight" in shape else ())
    ]
    return DiTConfig(
        img_resolution=math.isqrt(tokens) * p,
        img_channels=channels,
        num_classes=shape["y_embedder.embedding_table.weight"][0] - 1,
        form="flow" if sizes else "",  # type: ignore[arg-type]
        patch_size=p,
        embed_dim=D,
        depth=shape.count("blocks.#.attn.qkv.weight", times=1),
        num_heads=D // 72 if D % 72 == 0 and D > 1024 else D // 64,
        mlp_ratio=shape["blocks.0.mlp.fc1.weight"][0] / D,
        variance=outputs > channels,
        projector_sizes=tuple(sizes),
        projector_dim=shape["projectors.0.0.weight"][0] if sizes else 2048,
    )


def dit_constants(config: DiTConfig) -> dict[str, Tensor]:
    return {"pos_embed": positions(config)[None]}


RENAMES = (
    (r"^embed_patch", "x_embedder.proj"),
    (r"^embed_time", "t_embedder.mlp"),
    (r"^embed_condition", "y_embedder.embedding_table"),
    (r"^head_modulation", "final_layer.adaLN_modulation.1"),
    (r"^head", "final_layer.linear"),
    (r"\.modulation", ".adaLN_modulation.1"),
    (r"\.qkv", ".attn.qkv"),
    (r"\.project\.", ".attn.proj."),
    (r"\.ffn\.0", ".mlp.fc1"),
    (r"\.ffn\.2", ".mlp.fc2"),
)
PUBLISHED = Published("x_embedder.proj.weight", infer_dit, RENAMES, ("pos_embed",), dit_constants)
