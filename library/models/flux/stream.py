"""The blocks of FLUX.1 and Chroma: image and text in two streams that share their attention, then in one.

Modules are named as in the published single files, so that everybody's LoRA names fit. Inside attention the image
tokens come first and the text tokens after them, so that leaving out the end of a short caption is a view.
"Scaling Rectified Flow Transformers" (https://arxiv.org/abs/2403.03206) and the reference inference of FLUX.1
(https://github.com/black-forest-labs/flux).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionMode, KeyCounts, attention

EPS = 1e-6
"""Of every norm."""


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, joined in one attention.

    With `has_modulation` (FLUX.1) `img_mod` and `txt_mod` turn the conditioning vector into shifts, scales and gates;
    without (Chroma) they pass these on. Whoever calls the block calls them first: a block may be calculated a second
    time in backward, and their weights, a third of the block's, are not needed then.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, has_modulation: bool = True) -> None:
        super().__init__()
        self.mode = AttentionMode.SDPA
        self.img_mod = Modulation(width, 6) if has_modulation else nn.Identity()
        self.img_norm1 = LayerNorm(width)
        self.img_attn = JointAttention(width, num_heads)
        self.img_norm2 = LayerNorm(width)
        self.img_mlp = mlp(width, mlp_width)
        self.txt_mod = Modulation(width, 6) if has_modulation else nn.Identity()
        self.txt_norm1 = LayerNorm(width)
        self.txt_attn = JointAttention(width, num_heads)
        self.txt_norm2 = LayerNorm(width)
        self.txt_mlp = mlp(width, mlp_width)

    def forward(
        self, img: Tensor, txt: Tensor, for_img: Tensor, for_txt: Tensor, rope: Tensor, keys: KeyCounts | None
    ) -> tuple[Tensor, Tensor]:
        """Takes img [B, L, C] and txt [B, T, C], and gives both back.

        `for_img` and `for_txt` [B, 6, 1, C] are what `img_mod` and `txt_mod` answer; `rope` is [L + T, 1, D / 2, 2];
        `keys` None means that everything looks at everything.
        """
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = for_img.unbind(1)
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = for_txt.unbind(1)
        img_q, img_k, img_v = self.img_attn(shift_and_scale(self.img_norm1(img), img_shift, img_scale))
        txt_q, txt_k, txt_v = self.txt_attn(shift_and_scale(self.txt_norm1(txt), txt_shift, txt_scale))
        q, k, v = (torch.cat(pair, dim=1) for pair in ((img_q, txt_q), (img_k, txt_k), (img_v, txt_v)))
        out = attend(q, k, v, rope, keys, self.mode)
        img_out, txt_out = out.split([img.shape[1], txt.shape[1]], dim=1)
        img = torch.addcmul(img, img_gate, self.img_attn.proj(img_out))
        txt = torch.addcmul(txt, txt_gate, self.txt_attn.proj(txt_out))
        img = torch.addcmul(img, img_gate2, self.img_mlp(shift_and_scale(self.img_norm2(img), img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(shift_and_scale(self.txt_norm2(txt), txt_shift2, txt_scale2)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Image and text as one sequence; attention and feed-forward side by side.

    "Scaling Vision Transformers to 22 Billion Parameters", https://arxiv.org/abs/2302.05442; `modulation` is what
    `img_mod` is to `DoubleStreamBlock`.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, has_modulation: bool = True) -> None:
        super().__init__()
        self.mode = AttentionMode.SDPA
        self.num_heads = num_heads
        self.sizes = [3 * width, mlp_width]
        self.linear1 = nn.Linear(width, 3 * width + mlp_width)
        self.linear2 = nn.Linear(width + mlp_width, width)
        self.norm = QKNorm(width // num_heads)
        self.pre_norm = LayerNorm(width)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(width, 3) if has_modulation else nn.Identity()

    def forward(self, x: Tensor, modulated: Tensor, rope: Tensor, keys: KeyCounts | None) -> Tensor:
        """Takes x [B, L + T, C] and gives it back; `modulated` [B, 3, 1, C], `rope` and `keys` as above."""
        shift, scale, gate = modulated.unbind(1)
        qkv, hidden = self.linear1(shift_and_scale(self.pre_norm(x), shift, scale)).split(self.sizes, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.norm(q, k)
        out = attend(q, k, v, rope, keys, self.mode)
        return torch.addcmul(x, gate, self.linear2(torch.cat([out, self.mlp_act(hidden)], dim=-1)))


class LastLayer(nn.Module):
    """Tokens back to patches of latents; `has_modulation` as in `DoubleStreamBlock`."""

    def __init__(self, width: int, out_channels: int, has_modulation: bool = True) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, out_channels)
        # Published as SiLU and Linear; the vector comes here with SiLU applied.
        self.adaLN_modulation = (
            nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width), nn.Unflatten(-1, (2, 1, width)))
            if has_modulation
            else nn.Identity()
        )

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Takes x [B, L, C] and cond [B, C] or [B, 2, 1, C] -> [B, L, out_channels]."""
        shift, scale = self.adaLN_modulation(cond).unbind(1)
        out: Tensor = self.linear(shift_and_scale(self.norm_final(x), shift, scale))
        return out


class JointAttention(nn.Module):
    """One stream's share of an attention: its queries, keys and values, and the projection of its answers."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, C] -> queries and keys, normed, and values, [B, L, H, D] each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return *self.norm(q, k), v


class QKNorm(nn.Module):
    """A norm of its own for queries and for keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, H, D] each -> the same."""
        return self.query_norm(q), self.key_norm(k)


class RMSNorm(nn.Module):
    """Division by the root of the mean square, computed in float32, then a scale of each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return F.rms_norm(x, x.shape[-1:], self.scale.to(x.dtype), EPS)


class Modulation(nn.Module):
    """The conditioning vector [B, C], SiLU applied, -> `count` vectors [B, count, 1, C] for a block."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, cond: Tensor) -> Tensor:
        """-> [B, count, 1, C]"""
        out: Tensor = self.lin(cond).unflatten(-1, (self.count, 1, -1))
        return out


class LayerNorm(nn.LayerNorm):
    """Layer norm without weights, in the number format of what comes in.

    Mean and variance are taken in float32 inside the kernel. Autocast would give the whole answer in float32, which
    doubles the memory that this step and the next two move, and rounds it right after.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, eps=self.eps)


def mlp(width: int, mlp_width: int) -> nn.Sequential:
    """The feed-forward part of a double block."""
    return nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, width))


def shift_and_scale(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """X [B, L, C] scaled by 1 + scale and shifted, [B, 1, C] each."""
    return torch.addcmul(shift, x, 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, keys: KeyCounts | None, mode: AttentionMode) -> Tensor:
    """Attention of the joint sequence: q and k, normed, and v [B, L, H, D] -> [B, L, H * D]."""
    q, k = rotated(q, rope).to(v.dtype), rotated(k, rope).to(v.dtype)
    return attention(q.flatten(2), k.flatten(2), v.flatten(2), v.shape[2], mode, keys)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """X [B, L, H, D] -> float32, its pairs of neighbours turned by angles; `rope` [L, 1, D / 2, 2] has cos and sin.

    "RoFormer", https://arxiv.org/abs/2104.09864
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes one kernel of this, and none of complex numbers
        even, odd = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    # One multiplication of complex numbers: a third of the memory traffic of the four real ones.
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
    return torch.view_as_real(turned).flatten(-2)
