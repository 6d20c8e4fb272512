"""Latents to frames, one latent frame at a time, bit-equal to decoding them whole; in tiles where memory is short.

Wan's VAE is causal in time and keeps what it needs of earlier frames in a feature cache. Each decode owns its
cache, so decodes of several jobs can take turns. Source: diffusers autoencoder_kl_wan.py and pipeline_wan.py.
"""

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify


class Decoding:
    """The state of one job between its final latents and its last frame.

    latents: (1, C, T, H, W).
    may_tile: whether `start_smaller` may decode in tiles, whose frames differ a little from those of the whole.
    """

    @torch.inference_mode()
    def __init__(self, vae: AutoencoderKLWan, latents: torch.Tensor, *, may_tile: bool = False) -> None:
        self._vae = vae
        self._latents = denormalize(vae, latents)
        self._hidden = vae.post_quant_conv(self._latents)  # (1, C, T, H, W)
        self._ways = ["again", "tiles"] if may_tile and self._is_larger_than_a_tile() else ["again"]
        self._in_tiles = False
        self._num_given = 0
        self._begin()

    def _begin(self) -> None:
        convolutions = sum(isinstance(module, WanCausalConv3d) for module in self._vae.decoder.modules())
        self._features: list[torch.Tensor | str | None] = [None] * convolutions
        self._num_decoded = 0
        self.chunk = 0

    @property
    def num_chunks(self) -> int:
        return int(self._hidden.shape[2])

    @property
    def is_done(self) -> bool:
        return self.chunk == self.num_chunks

    def start_smaller(self) -> bool:
        """After running out of memory: begin anew, as before in what was freed, and the next time in tiles.

        Frames that `next_frames` has given are not given again. Returns False when nothing is left to try.
        """
        if not self._ways:
            return False
        self._in_tiles = self._ways.pop(0) == "tiles"
        self._begin()
        return True

    def next_frames(self) -> npt.NDArray[np.uint8]:
        """What comes next, (t, H, W, 3) uint8 RGB; t is 0 where a decode that began anew repeats what was given."""
        frames = to_uint8(self._decode_in_tiles() if self._in_tiles else self.next_chunk())
        fresh = frames[max(0, self._num_given - self._num_decoded) :]
        self._num_decoded += len(frames)
        self._num_given = max(self._num_given, self._num_decoded)
        return fresh

    def _is_larger_than_a_tile(self) -> bool:
        height, width = (n * self._vae.spatial_compression_ratio for n in self._latents.shape[3:])
        return bool(height > self._vae.tile_sample_min_height or width > self._vae.tile_sample_min_width)

    @torch.inference_mode()
    def _decode_in_tiles(self) -> torch.Tensor:
        """Every frame at once, (T, H, W, 3) in [0, 1]. One tile's features and activations are there at a time."""
        sample: torch.Tensor = self._vae.tiled_decode(self._latents, return_dict=False)[0]
        self.chunk = self.num_chunks
        return sample.mul(0.5).add(0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)

    @torch.inference_mode()
    def next_chunk(self) -> torch.Tensor:
        """Decode the next latent frame. Returns (t, H, W, 3) in [0, 1]; t is 1 for the first chunk, then 4.

        When it raises, the cache may be half written and the decode has to start over.
        """
        sample: torch.Tensor = self._vae.decoder(
            self._hidden[:, :, self.chunk : self.chunk + 1],
            feat_cache=self._features,
            feat_idx=[0],
            first_chunk=self.chunk == 0,
        )
        if self._vae.config.patch_size is not None:
            sample = unpatchify(sample, patch_size=self._vae.config.patch_size)
        self.chunk += 1
        frames = sample.clamp(-1.0, 1.0).mul(0.5).add(0.5).clamp(0, 1)  # (1, 3, t, H, W)
        return frames[0].permute(1, 2, 3, 0)


def denormalize(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation that the transformer was trained with."""
    latents = latents.to(vae.device, vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    return latents / inverse_std + mean


def to_uint8(frames: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(t, H, W, 3) in [0, 1] to uint8 RGB on the CPU, rounded as diffusers does for images."""
    array: npt.NDArray[np.uint8] = frames.float().mul(255).round().to(torch.uint8).cpu().contiguous().numpy()
    return array
