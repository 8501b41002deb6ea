"""VAR: a transformer that predicts an image's tokens scale by scale, coarse to fine (Tian et al. 2024, arXiv 2404.02905).

- token 0 comes from the condition, every later token from the codes of all coarser scales ("teacher input")
- block-causal attention: a token sees its own scale and all coarser ones; all tokens of a scale are predicted at once
- adaptive LayerNorm: the condition gives gates, scales and shifts, by one Linear per block or one shared by all blocks
- queries and keys on the unit sphere with a learned temperature per head (attn_l2_norm); no bias on the keys
- learned absolute positions and one learned vector per scale; tanh-GELU FFN; stochastic depth
- an explicit KVCache; one cached call may process one scale or several

Precision: parameters are fp32, and the caller may run the network under bf16 autocast. Then the operands of the matrix products are
bf16; the residual stream, statistics, unit queries and keys, attention logits and softmax, and the results of the last Linear are fp32.

Legend: B samples, R rows, L tokens of all scales, l tokens of one call, E code channels, D width, H heads, d head width, K scales, V codes.
"""

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mclr.kernels.token_logp import token_logp, wide_linear
from mclr.models.blocks import Stream, running, trunk_dtype
from mclr.models.conditions import map_rows
from mclr.models.convert import SCALES, Published, Shapes
from mclr.models.dial import Dial
from mclr.models.options import VARConfig


class KVCache:
    """Keys and values of the first `length` tokens of some rows, for every block; for inference, under torch.no_grad().

    kv: [depth, 2, R, H, L, d], allocated once and written in place. VAR advances `length` when all blocks have written.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, block: int, k_RHld: Tensor, v_RHld: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [R, H, l, d] of a block; returns those of all its tokens so far, [R, H, L, d] each."""
        end = self.length + k_RHld.shape[2]
        k_RHLd, v_RHLd = self.kv[block, ..., :end, :]
        k_RHLd[:, :, self.length :] = k_RHld
        v_RHLd[:, :, self.length :] = v_RHld
        return k_RHLd, v_RHLd


class Attention(nn.Module):
    """Multi-head attention over tokens, [R, l, D] -> [R, l, D]; with attn_l2_norm queries and keys have unit length."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.heads, self.l2_norm = config.num_heads, config.attn_l2_norm
        D = config.embed_dim
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias = nn.Parameter(torch.empty(D))
        self.v_bias = nn.Parameter(torch.empty(D))
        if self.l2_norm:
            self.log_temperature = nn.Parameter(torch.empty(1, config.num_heads, 1, 1))
        self.project = nn.Linear(D, D)

    def forward(self, x_RlD: Tensor, mask_lL: Tensor | None, block: int, cache: KVCache | None) -> Tensor:
        qkv = self.qkv(x_RlD)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q_RHld, k_RHld, v_RHld = rearrange(qkv + bias.to(qkv.dtype), "R l (n H d) -> n R H l d", n=3, H=self.heads)
        if self.l2_norm:
            # The cap keeps the logits within +-100, the range in which half precision was trained.
            temperature = self.log_temperature.clamp(max=math.log(100)).exp()
            q_RHld = (F.normalize(q_RHld.float(), dim=-1) * temperature).to(qkv.dtype)
            k_RHld = F.normalize(k_RHld.float(), dim=-1).to(qkv.dtype)
        k, v = (k_RHld, v_RHld) if cache is None else cache.extend(block, k_RHld, v_RHld)
        factor = 1.0 if self.l2_norm else 0.25 / math.sqrt(q_RHld.shape[-1])
        x_RHld = F.scaled_dot_product_attention(q_RHld, k, v, attn_mask=mask_lL, scale=factor)
        return self.project(rearrange(x_RHld, "R H l d -> R l (H d)"))


class Block(nn.Module):
    """x += gate * attention(modulated norm(x)), then the same with the FFN; gates, scales and shifts from the condition."""

    def __init__(self, config: VARConfig, drop_path: float):
        super().__init__()
        self.config, self.drop_path = config, drop_path
        D, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
        # With shared_aln all blocks read one Linear's output and own only an offset to it.
        self.modulation = nn.Parameter(torch.empty(1, 1, 6, D)) if config.shared_aln else nn.Linear(D, 6 * D)
        self.attention = Attention(config)
        self.ffn = nn.Sequential(nn.Linear(D, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, D))

    def forward(self, stream: Stream, condition: Tensor, mask_lL: Tensor | None, block: int, cache: KVCache | None) -> Stream:
        """condition: SiLU of the embedded condition [R, D], or with shared_aln the shared modulation [R, 6, D]."""
        if self.config.shared_aln:
            modulation = condition + self.modulation[0]
        else:
            modulation = self.modulation(condition).unflatten(-1, (6, -1))
        gate_attn, gate_ffn, scale_attn, scale_ffn, shift_attn, shift_ffn = modulation.unbind(1)
        eps, dtype = self.config.norm_eps, trunk_dtype(stream.x)
        stream, h_RlD = stream.norm(scale_attn, shift_attn, eps, dtype)
        stream = stream._replace(y_RlD=self.attention(h_RlD, mask_lL, block, cache), gate_RD=self.kept(gate_attn))
        stream, h_RlD = stream.norm(scale_ffn, shift_ffn, eps, dtype)
        return stream._replace(y_RlD=self.ffn(h_RlD), gate_RD=self.kept(gate_ffn))

    def kept(self, gate_RD: Tensor) -> Tensor:
        """Stochastic depth: while training each row's gate is 0, or the larger by 1 / (1 - drop_path)."""
        if not (self.training and self.drop_path):
            return gate_RD
        return gate_RD * F.dropout(gate_RD.new_ones(len(gate_RD), 1), self.drop_path)


class Head(nn.Linear):
    """The last Linear: hidden states -> logits, or log-probabilities of given tokens, both fp32."""

    def forward(
        self,
        h_RlD: Tensor,
        tokens_Bl: Tensor | None = None,
        index_R: Tensor | None = None,
        guide_RlD: Tensor | None = None,
        mix_Rl: Tensor | None = None,
    ) -> Tensor:
        """Logits [R, l, V]; with tokens, held once per sample, and the sample of each row: log p of its tokens [R, l].

        guide, mix: under the logits z + mix (z - sg z_guide).
        """
        with torch.autocast(h_RlD.device.type, enabled=False):
            if tokens_Bl is None:
                return wide_linear(h_RlD.flatten(0, 1), self.weight, self.bias).unflatten(0, h_RlD.shape[:2])
            return token_logp(h_RlD, self.weight, self.bias, tokens_Bl, index_R, guide_RlD, mix_Rl)


class VAR(nn.Module):
    """(teacher inputs, condition) -> hidden states, from which the head predicts every token given all coarser scales.

    The null condition has index num_classes.
    """

    condition_layer, map_layer = "embed_condition.weight", staticmethod(map_rows)

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = config
        D, sides = config.embed_dim, config.patch_nums
        self.ends = list(accumulate(side**2 for side in sides))  # tokens up to and including each scale
        L = self.tokens = self.ends[-1]
        self.embed_code = nn.Linear(config.z_channels, D)
        self.embed_condition = nn.Embedding(config.num_classes + 1, D)
        self.embed_scale = nn.Embedding(len(sides), D)
        self.position = nn.Parameter(torch.empty(1, L, D))
        self.first_token = nn.Parameter(torch.empty(1, 1, D))
        if config.shared_aln:
            self.shared_modulation = nn.Linear(D, 6 * D)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = Head(D, config.vocab_size)
        scale_L = torch.tensor([k for k, side in enumerate(sides) for _ in range(side**2)])
        self.register_buffer("scale_L", scale_L, persistent=False)
        self.register_buffer("mask_LL", scale_L[:, None] >= scale_L[None, :], persistent=False)
        self.activation_checkpointing = False
        self.init_weights()
        if config.strength_max:
            self.dial = Dial(D)

    def forward(
        self,
        teacher_BlE: Tensor,
        c_R: Tensor,
        index_R: Tensor | None = None,
        strength_R: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Head]:
        """(h_RlD in the trunk's dtype, the head): head(h) are the logits of every token of this call, head(h, tokens, index_R) their log p.

        teacher_BlE: teacher inputs of the tokens of this call; token 0 has none, so the call that begins there brings one fewer
        than it has tokens ([B, L-1, E] for all scales, [B, 0, E] for the first alone). c_R: int64 in 0..num_classes. index_R: sample
        of each row; None where rows are samples. strength_R: of a network with a dial. cache: None, or the tokens before
        this call, which then begins at token cache.length and extends the cache. A call holds whole scales, one or several.
        """
        start = cache.length if cache else 0
        end = start + self.tokens_of(teacher_BlE, cache=cache)
        assert start in [0, *self.ends] and end in self.ends, f"tokens {start}..{end} are not whole scales of {self.ends}"
        condition_RD = self.embed_condition(c_R)
        if self.config.strength_max:
            condition_RD = condition_RD + self.dial(strength_R, c_R, self.config.num_classes)
        first_RD = condition_RD + self.first_token[0]
        place_lD = self.embed_scale(self.scale_L[start:end]) + self.position[0, start:end]
        x_BlD = self.embed_code(teacher_BlE)
        if start == 0 and index_R is not None:
            # row 0 of the place belongs to the token that each row brings itself
            stream = Stream(F.pad(x_BlD, (0, 0, 1, 0)) + place_lD, index_R, first_RD + place_lD[0])
        elif start == 0:
            stream = Stream(torch.cat((first_RD[:, None], x_BlD), dim=1) + place_lD)
        else:
            assert index_R is None, "rows of a cache are samples"
            stream = Stream(x_BlD + place_lD)

        # A single scale sees everything up to its own end, so it needs no mask (and attention can take its fastest path).
        one_scale = sum(start < scale_end <= end for scale_end in self.ends) == 1
        mask_lL = None if one_scale else self.mask_LL[start:end, :end]
        active_RD = F.silu(condition_RD)
        condition = self.shared_modulation(active_RD).unflatten(-1, (6, -1)) if self.config.shared_aln else active_RD
        run = running(self.activation_checkpointing)
        for i, block in enumerate(self.blocks):
            stream = run(block, stream, condition, mask_lL, i, cache)
        if cache:
            cache.length = end
        scale_RD, shift_RD = self.head_modulation(active_RD).chunk(2, dim=-1)
        _, h_RlD = stream.norm(scale_RD, shift_RD, self.config.norm_eps, trunk_dtype(stream.x))
        return h_RlD, self.head

    def tokens_of(self, *inputs: Any, cache: KVCache | None = None) -> int:
        return inputs[0].shape[1] + (cache is None or cache.length == 0)

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for `rows` rows; create it under the autocast setting of the calls that use it."""
        config, device = self.config, self.position.device
        shape = (config.depth, 2, rows, config.num_heads, self.ends[-1], config.embed_dim // config.num_heads)
        return KVCache(shape, device, trunk_dtype(self.position))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Published initialisation, from torch's global generator; D width, N depth.

        | parameter | value |
        | --- | --- |
        | every weight, embedding and position not named below | truncated normal, std = sqrt(1 / (3 D)) |
        | every bias | 0 |
        | output Linear of attention and FFN | the same, divided by sqrt(2 N) |
        | modulation of a block, gates | the same (shared_aln: offsets of std sqrt(1 / D)), times 1e-5: blocks begin as identity |
        | modulation of a block, scales and shifts | likewise, times 0.5 |
        | modulation of the head norm | the same, times 0.5 |
        | head | the same, times 0.02: the first loss is log V |
        | log_temperature | log 4 |
        """
        D, depth = self.config.embed_dim, self.config.depth
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("log_temperature"):
                nn.init.constant_(parameter, math.log(4))
            else:
                nn.init.trunc_normal_(parameter, std=math.sqrt(1 / D if name.endswith(".modulation") else 1 / (3 * D)))
        for block in self.blocks:
            block.attention.project.weight /= math.sqrt(2 * depth)
            block.ffn[2].weight /= math.sqrt(2 * depth)
            six = block.modulation[0, 0] if self.config.shared_aln else block.modulation.weight.view(6, D, D)
            six[:2] *= 1e-5
            six[2:] *= 0.5
        self.head_modulation.weight *= 0.5
        self.head.weight *= 0.02


def infer_var(shape: Shapes) -> VARConfig:
    _, L, D = shape["pos_1LC"]
    l2_norm = "blocks.0.attn.scale_mul_1H11" in shape
    return VARConfig(
        num_classes=shape["class_emb.weight"][0] - 1,
        depth=shape.count("blocks.#.attn.mat_qkv.weight", times=1),
        embed_dim=D,
        num_heads=shape["blocks.0.attn.scale_mul_1H11"][1] if l2_norm else D // 64,
        patch_nums=next((s for s in SCALES if sum(side**2 for side in s) == L), ()),
        vocab_size=shape["head.weight"][0],
        z_channels=shape["word_embed.weight"][1],
        mlp_ratio=shape["blocks.0.ffn.fc1.weight"][0] / D,
        shared_aln="shared_ada_lin.1.weight" in shape,
        attn_l2_norm=l2_norm,
    )


def var_constants(config: VARConfig) -> dict[str, Tensor]:
    """Scale of every token [1, L], additive attention mask [1, 1, L, L], and the keys' bias, zero."""
    scale_L = torch.tensor([k for k, side in enumerate(config.patch_nums) for _ in range(side**2)])
    mask_LL = torch.where(scale_L[:, None] >= scale_L, 0.0, -torch.inf)
    zeros = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(config.embed_dim) for i in range(config.depth)}
    return {"lvl_1L": scale_L[None], "attn_bias_for_masking": mask_LL[None, None], **zeros}


RENAMES = (
    (r"^embed_code", "word_embed"),
    (r"^embed_condition", "class_emb"),
    (r"^embed_scale", "lvl_embed"),
    (r"^position", "pos_1LC"),
    (r"^first_token", "pos_start"),
    (r"^head_modulation", "head_nm.ada_lin.1"),
    (r"^shared_modulation", "shared_ada_lin.1"),
    (r"\.modulation\.", ".ada_lin.1."),
    (r"\.modulation$", ".ada_gss"),
    (r"\.attention\.qkv", ".attn.mat_qkv"),
    (r"\.attention\.project", ".attn.proj"),
    (r"\.attention\.log_temperature", ".attn.scale_mul_1H11"),
    (r"\.attention\.", ".attn."),
    (r"\.ffn\.0", ".ffn.fc1"),
    (r"\.ffn\.2", ".ffn.fc2"),
)
IGNORED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")  # published constants that we derive: scale_L, mask_LL, zeros
PUBLISHED = Published("pos_1LC", infer_var, RENAMES, IGNORED, var_constants)
