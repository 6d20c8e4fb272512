"""The arithmetic of Wan 2.1's parts: parameters, FLOP and bytes of activations, from their dimensions alone. Pure.

FLOP are two per multiply-add of matrix products, convolutions and attention, as torch's FLOP counter has them; norms,
activations and rotations are not counted (well below 1%). Bytes of activations are what the tensors hold that are
alive at once when diffusers' modules run eagerly under `inference_mode`, one clip at a time, with an attention kernel
that never holds its scores (flash or memory-efficient; torch's `math` would need tokens² of them). Not in it: what a
kernel takes as workspace, what the allocator rounds up and fragments, CUDA's own; `serve_graph.plan` allows for these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Final, NamedTuple

from schemas.model_profile import TEMPORAL_STRIDE
from schemas.official_profiles import WAN_1_3B, WAN_14B, WAN_14B_FEW_STEP, WAN_TINY

SPATIAL_STRIDE: Final = 8
PATCH: Final = (1, 2, 2)
"""Latent frames, rows and columns of one token."""

ELEMENT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}


def num_latent_frames(num_frames: int) -> int:
    """num_frames: 4k+1."""
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def num_tokens(width: int, height: int, num_frames: int) -> int:
    """Latent tokens of one clip: what one forward of the transformer attends to."""
    side = SPATIAL_STRIDE * PATCH[1]
    return num_latent_frames(num_frames) * (height // side) * (width // side)


@dataclass(frozen=True)
class Transformer:
    """A `WanTransformer3DModel`. Source of the defaults: Wan 2.1's `transformer/config.json`, diffusers' own."""

    num_attention_heads: int
    ffn_dim: int
    num_layers: int
    attention_head_dim: int = 128
    in_channels: int = 16
    text_dim: int = 4_096
    freq_dim: int = 256

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def _patch_values(self) -> int:
        return self.in_channels * prod(PATCH)

    @property
    def num_parameters(self) -> int:
        d = self.dim
        embedders = (
            _linear(self._patch_values, d)
            + (_linear(self.freq_dim, d) + _linear(d, d) + _linear(d, 6 * d))  # of the time
            + (_linear(self.text_dim, d) + _linear(d, d))  # of the text
        )
        attention = 4 * _linear(d, d) + 2 * d  # q, k, v, out; the norms of q and k
        block = 2 * attention + 2 * d + _linear(d, self.ffn_dim) + _linear(self.ffn_dim, d) + 6 * d
        return embedders + self.num_layers * block + 2 * d + _linear(d, self._patch_values)

    @property
    def num_float32_parameters(self) -> int:
        """Those that stay float32 whatever the dtype. Source: diffusers' `_keep_in_fp32_modules`."""
        d = self.dim
        return _linear(self.freq_dim, d) + _linear(d, d) + self.num_layers * (2 * d + 6 * d) + 2 * d

    def weight_bytes(self, dtype: str) -> int:
        """dtype: a key of `ELEMENT_BYTES`."""
        kept = self.num_float32_parameters
        return (self.num_parameters - kept) * ELEMENT_BYTES[dtype] + kept * ELEMENT_BYTES["float32"]

    def forward_flop(self, tokens: int, text_length: int) -> int:
        """Of one forward of one clip. text_length: rows of text, padding included."""
        d = self.dim
        once = self.freq_dim * d + d * d + 6 * d * d  # per clip
        per_text_row = self.text_dim * d + d * d + self.num_layers * 2 * d * d  # the last: keys and values
        block = 4 * d * d + 2 * d * d + 2 * d * self.ffn_dim + 2 * (tokens + text_length) * d
        per_token = 2 * self._patch_values * d + self.num_layers * block
        return 2 * (once + text_length * per_text_row + tokens * per_token)

    def activation_bytes(self, tokens: int, text_length: int, dtype: str) -> int:
        """The most that is alive inside one forward of one clip.

        Either at the feed-forward's activation (both sides of it, and four tensors of the residual stream: the block's
        input, the sum, its norm, the last attention's output), or at the sum after it, which is in float32.
        """
        size, d = ELEMENT_BYTES[dtype], self.dim
        in_float32 = 3 * 4 if size < 4 else 2 * 4  # both addends, where they are copies, and the product
        residual = tokens * d * (5 * size + in_float32)
        feed_forward = tokens * size * (4 * d + 2 * self.ffn_dim)
        rotation = 2 * tokens * self.attention_head_dim * 4
        return max(residual, feed_forward) + rotation + text_length * d * size


@dataclass(frozen=True)
class TextEncoder:
    """The encoder of a UMT5. Source of the defaults: google/umt5-xxl's `config.json`."""

    vocab_size: int = 256_384
    d_model: int = 4_096
    d_kv: int = 64
    num_heads: int = 64
    d_ff: int = 10_240
    num_layers: int = 24
    relative_attention_num_buckets: int = 32

    @property
    def _layer_matrices(self) -> int:
        """q, k, v, out; the gated feed-forward's three."""
        return 4 * self.d_model * self.num_heads * self.d_kv + 3 * self.d_model * self.d_ff

    @property
    def num_parameters(self) -> int:
        norms_and_bias = 2 * self.d_model + self.relative_attention_num_buckets * self.num_heads
        layers = self.num_layers * (self._layer_matrices + norms_and_bias)
        return self.vocab_size * self.d_model + layers + self.d_model

    def weight_bytes(self, dtype: str) -> int:
        """dtype: a key of `ELEMENT_BYTES`; in float16 transformers keeps the feed-forward's outputs in float32."""
        kept = self.num_layers * self.d_model * self.d_ff if dtype == "float16" else 0
        return (self.num_parameters - kept) * ELEMENT_BYTES[dtype] + kept * ELEMENT_BYTES["float32"]

    def flop(self, num_text_tokens: int) -> int:
        """Of encoding one text."""
        scores = 2 * num_text_tokens * self.num_heads * self.d_kv
        return 2 * num_text_tokens * self.num_layers * (self._layer_matrices + scores)


class _Convolution(NamedTuple):
    """One of the VAE's. divisor: of the clip's width and height. frames: of its output, per latent frame.

    normed: whether a norm over its input comes before it. cached: whether it keeps two frames of its input for the
    next latent frame. skips_first: whether it does not run on the first latent frame, of which one frame comes.
    """

    c_in: int
    c_out: int
    taps: int
    divisor: int = 1
    frames: int = 1
    normed: bool = False
    cached: bool = False
    skips_first: bool = False

    @property
    def num_parameters(self) -> int:
        return self.taps * self.c_in * self.c_out + self.c_out + (self.c_in if self.normed else 0)

    def flop(self, pixels: int, *, first: bool) -> int:
        """Of one latent frame of a clip of so many pixels."""
        frames = self.frames if not first else 0 if self.skips_first else 1
        return 2 * self.taps * self.c_in * self.c_out * frames * pixels // self.divisor**2


@dataclass(frozen=True)
class Vae:
    """An `AutoencoderKLWan`. Source of the defaults: Wan 2.1's `vae/config.json`, diffusers' own."""

    base_dim: int = 96
    decoder_base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    @property
    def num_parameters(self) -> int:
        """Encoder and decoder: both are loaded."""
        joints = _linear(2 * self.z_dim, 2 * self.z_dim) + _linear(self.z_dim, self.z_dim)
        return joints + sum(conv.num_parameters for conv in (*self._encoder(), *self._decoder()))

    def weight_bytes(self, dtype: str) -> int:
        """dtype: a key of `ELEMENT_BYTES`."""
        return self.num_parameters * ELEMENT_BYTES[dtype]

    def decode_flop(self, width: int, height: int, num_frames: int) -> int:
        """Of one clip's decode, latent frame by latent frame."""
        pixels, latent_frames = width * height, num_latent_frames(num_frames)
        positions = pixels // SPATIAL_STRIDE**2
        convolutions = list(self._decoder())
        first = sum(conv.flop(pixels, first=True) for conv in convolutions)
        rest = sum(conv.flop(pixels, first=False) for conv in convolutions)
        attention = 4 * positions**2 * self.decoder_base_dim * self.dim_mult[-1]
        joint = 2 * self.z_dim**2 * positions
        return first + (latent_frames - 1) * rest + latent_frames * (attention + joint)

    def feature_bytes(self, width: int, height: int, dtype: str) -> int:
        """What an open decode keeps of its last frames."""
        kept = sum(2 * conv.c_in * width * height // conv.divisor**2 for conv in self._decoder() if conv.cached)
        return kept * ELEMENT_BYTES[dtype]

    def activation_bytes(self, width: int, height: int, dtype: str) -> int:
        """The most that is alive inside one chunk of a decode, the features included. The frame count is no matter.

        In float32 that is at the last blocks' padding: their input, two copies in the residual block, the frames with
        those kept, once more padded, and the new features, 6.5 chunks of frames at full size. In half precision the
        norm computes in float32, and 7 are alive.
        """
        size = ELEMENT_BYTES[dtype]
        chunk = self.decoder_base_dim * self.dim_mult[0] * TEMPORAL_STRIDE * width * height * size
        return self.feature_bytes(width, height, dtype) + (13 * chunk // 2 if size == 4 else 7 * chunk)

    def _decoder(self) -> Iterator[_Convolution]:
        dims = [self.decoder_base_dim * mult for mult in (self.dim_mult[-1], *reversed(self.dim_mult))]
        up, divisor, frames = self.temporal_downsample[::-1], 2 ** len(self.temporal_downsample), 1
        yield _Convolution(self.z_dim, dims[0], 27, divisor, cached=True)
        yield from _middle(dims[0], divisor)
        for i, (c_in, c_out) in enumerate(pairwise(dims)):
            c_in = c_in if i == 0 else c_in // 2
            for j in range(self.num_res_blocks + 1):
                yield from _residual(c_in if j == 0 else c_out, c_out, divisor, frames)
            if i == len(up):
                continue
            if up[i]:
                yield _Convolution(c_out, 2 * c_out, 3, divisor, frames, cached=True, skips_first=True)
                frames *= 2
            divisor //= 2
            yield _Convolution(c_out, c_out // 2, 9, divisor, frames)
        yield _Convolution(dims[-1], 3, 27, divisor, frames, normed=True, cached=True)

    def _encoder(self) -> Iterator[_Convolution]:
        """For its parameters: the service never encodes, so sizes are left out."""
        dims = [self.base_dim * mult for mult in (1, *self.dim_mult)]
        yield _Convolution(3, dims[0], 27)
        for i, (c_in, c_out) in enumerate(pairwise(dims)):
            for j in range(self.num_res_blocks):
                yield from _residual(c_in if j == 0 else c_out, c_out)
            if i < len(self.temporal_downsample):
                yield _Convolution(c_out, c_out, 9)
                if self.temporal_downsample[i]:
                    yield _Convolution(c_out, c_out, 3)
        yield from _middle(dims[-1])
        yield _Convolution(dims[-1], 2 * self.z_dim, 27, normed=True)


@dataclass(frozen=True)
class Architecture:
    """The dimensions of one profile's parts."""

    transformer: Transformer
    vae: Vae = Vae()
    text_encoder: TextEncoder = TextEncoder()


_LARGE: Final = Architecture(Transformer(num_attention_heads=40, ffn_dim=13_824, num_layers=40))

ARCHITECTURES: Final = {
    WAN_1_3B.name: Architecture(Transformer(num_attention_heads=12, ffn_dim=8_960, num_layers=30)),
    **dict.fromkeys((WAN_14B.name, WAN_14B_FEW_STEP.name), _LARGE),
    WAN_TINY.name: Architecture(
        Transformer(num_attention_heads=6, ffn_dim=768, num_layers=4, attention_head_dim=32, text_dim=128, freq_dim=64),
        Vae(base_dim=12, decoder_base_dim=16, num_res_blocks=1),
        TextEncoder(vocab_size=689, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=3),
    ),
}
"""By the profile's name. Source: the `config.json` files of the profiles' checkpoints."""


def _linear(c_in: int, c_out: int) -> int:
    return c_in * c_out + c_out


def _middle(dim: int, divisor: int = 1) -> Iterator[_Convolution]:
    yield from _residual(dim, dim, divisor)
    yield _Convolution(dim, 3 * dim, 1, divisor, normed=True)  # q, k and v of the attention
    yield _Convolution(dim, dim, 1, divisor)
    yield from _residual(dim, dim, divisor)


def _residual(c_in: int, c_out: int, divisor: int = 1, frames: int = 1) -> Iterator[_Convolution]:
    if c_in != c_out:
        yield _Convolution(c_in, c_out, 1, divisor, frames)
    yield _Convolution(c_in, c_out, 27, divisor, frames, normed=True, cached=True)
    yield _Convolution(c_out, c_out, 27, divisor, frames, normed=True, cached=True)
