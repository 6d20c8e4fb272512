"""The stage `vae`: diffusers' `AutoencoderKLWan`, small, trained to keep the world's clips. Ends with a gate.

The loss is L1 + MSE, edges weighted up, since a shape is its edge; a touch of KL; and noise on the latents, so that the
decoder forgives what the transformer gets slightly wrong.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)

from serve_graph.tiny_wan.measure import measure
from serve_graph.tiny_wan.muon import Muon
from serve_graph.tiny_wan.run_folder import RunFolder
from serve_graph.tiny_wan.world import Frames, draw, held_out_scene, place, training_scene

STEPS = 1_800
BATCH = 8
SEED = 1
LEARNING_RATE = 2e-3
NUM_FRAMES = ((1, 0.3), (5, 0.4), (9, 0.3))
"""Frames of a training clip, and how often."""
EDGE_WEIGHT = 4.0
KL_WEIGHT = 1e-4
LEAST_LATENT_STD = 0.1
GATE = 0.98
"""The share of reconstructions whose shape must be readable, before a transformer may be trained on the latents."""
Z_DIM = 16


def make_vae() -> AutoencoderKLWan:
    """Wan's VAE in its standard form (8x8x4), with few channels; random weights."""
    return AutoencoderKLWan(
        base_dim=12,
        decoder_base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )


def train_vae(
    run: RunFolder, checkpoint: Path, steps: int = STEPS, batch: int = BATCH, num_measured: int = 128
) -> float:
    """Train to `steps`, go on where an earlier call stopped. Writes `checkpoint`/vae. Returns the last loss.

    num_measured: clips that give the latents' mean and spread.
    """
    torch.manual_seed(SEED)
    vae = make_vae()
    initialize(vae)
    quicken_norms_for_training(vae)
    optimizers = make_optimizers(vae)
    first, loss = 0, torch.tensor(float("nan"))
    state = run.load()
    if state is not None:
        first = state["step"]
        vae.load_state_dict(state["vae"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    rates = (LEARNING_RATE, LEARNING_RATE / 2)
    for step in run.steps(first, steps):
        rng = np.random.default_rng((SEED, step))
        torch.manual_seed(step)
        decay = min(1.0, 2 * (1 - step / steps))  # constant to half, then linear to zero
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * decay * min(1.0, (step + 1) / 50)
        with torch.autocast("cpu", torch.bfloat16):  # 1.5 times as quick; the weights stay float32
            loss, kl = vae_loss(vae, to_tensor(training_clips(rng, batch)))
        (loss + kl).backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            run.log(step=step, loss=loss.item(), kl=kl.item())
        if step % 200 == 199:
            psnr, readable = reconstruct(vae, num_clips=16)
            run.log(kind="check", step=step, psnr=psnr, shape=readable)
        if run.should_save() or step == steps - 1:
            run.save({"step": step + 1, "vae": vae.state_dict(), "optimizers": [o.state_dict() for o in optimizers]})
    save_vae(vae, checkpoint, num_measured)
    return loss.item()


def passes_gate(vae: AutoencoderKLWan, run: RunFolder, num_clips: int = 100) -> bool:
    """Whether the shape can be read from enough reconstructions of clips that it was not trained on."""
    psnr, readable = reconstruct(vae, num_clips)
    run.log(kind="gate", step=0, psnr=psnr, shape=readable)
    return readable >= GATE


def save_vae(vae: AutoencoderKLWan, checkpoint: Path, num_measured: int) -> None:
    """Write `checkpoint`/vae, with the latents' mean and spread in its configuration, as the pipeline wants them."""
    rng = np.random.default_rng((SEED, 10**6))
    with torch.inference_mode():
        clips = [draw_clip(rng, 17) for _ in range(num_measured)]
        latents = torch.cat([encode(vae, to_tensor(np.stack(clips[i : i + 8]))) for i in range(0, len(clips), 8)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    saved = make_vae()
    saved.load_state_dict(vae.state_dict())
    saved.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    saved.save_pretrained(checkpoint / "vae")


# --- the data


def training_clips(rng: np.random.Generator, batch: int) -> Frames:
    """(B, T, H, W, 3) uint8: windows of clips that training may see."""
    counts, shares = zip(*NUM_FRAMES, strict=True)
    num_frames = int(rng.choice(counts, p=shares))
    return np.stack([draw_clip(rng, num_frames) for _ in range(batch)])


def draw_clip(rng: np.random.Generator, num_frames: int) -> Frames:
    """A window of a 17-frame clip."""
    scene = training_scene(rng)
    start = int(rng.integers(17 - num_frames + 1))
    return draw(scene, place(scene, rng))[start : start + num_frames]


def to_tensor(clips: Frames) -> torch.Tensor:
    """(B, T, H, W, 3) uint8 to (B, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1).contiguous()


# --- the loss


def vae_loss(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """clips: (B, 3, T, H, W) in [-1, 1]. Returns the reconstruction loss and the weighted KL."""
    mean, log_variance = vae._encode(clips).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    std = (0.5 * log_variance).exp()
    latents = mean + std.clamp_min(LEAST_LATENT_STD) * torch.randn_like(mean)
    error = decode(vae, latents).float() - clips
    weight = 1 + EDGE_WEIGHT * edges(clips)
    reconstruction = (weight * (error.abs() + error.square())).mean()
    kl = 0.5 * (mean.square() + std.square() - 1 - log_variance).sum(1).mean()
    return reconstruction, KL_WEIGHT * kl


def edges(clips: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) to (B, 1, T, H, W): 0 on plain ground, 1 within two pixels of a strong edge."""
    frames = clips.transpose(1, 2).flatten(0, 1)  # (B T, 3, H, W)
    spread = F.max_pool2d(frames, 5, 1, 2) + F.max_pool2d(-frames, 5, 1, 2)
    strength = spread.amax(1, keepdim=True).clamp(0, 1)  # (B T, 1, H, W)
    return strength.reshape(clips.shape[0], clips.shape[2], 1, *strength.shape[2:]).transpose(1, 2)


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) to the posterior's mean, (B, 16, 1 + (T - 1) / 4, H / 8, W / 8), not normalised."""
    mean: torch.Tensor = vae._encode(clips).chunk(2, dim=1)[0]
    return mean


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """As `vae.decode`, but not clamped: a clamp has no gradient where it matters most, at black and white."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(chunks, dim=2)


@torch.inference_mode()
def reconstruct(vae: AutoencoderKLWan, num_clips: int) -> tuple[float, float]:
    """PSNR in decibels, and how often the shape is still readable, over whole clips of held-out scenes."""
    rng = np.random.default_rng((SEED, 10**7))
    errors, readable = [], 0
    for _ in range(num_clips):
        scene = held_out_scene(rng)
        clip = draw(scene, place(scene, rng))
        frames = to_frames(decode(vae, encode(vae, to_tensor(clip[None]))))[0]
        errors.append(float(np.square(frames.astype(np.float32) - clip).mean()))
        readable += measure(frames).shape == scene.shape
    return float(10 * np.log10(255**2 / np.mean(errors))), readable / num_clips


def to_frames(clips: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(B, 3, T, H, W) in [-1, 1] to (B, T, H, W, 3) uint8."""
    array: npt.NDArray[np.uint8] = (
        clips.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    )
    return array


# --- the start


@torch.no_grad()
def initialize(vae: AutoencoderKLWan) -> None:
    """Keep the variance through every layer, and start the residual branches near zero."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d | torch.nn.Conv2d):
            _preserve_variance(module)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.mul_(0.05)
        elif isinstance(module, WanAttentionBlock):
            module.proj.weight.mul_(0.05)
        elif isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight  # (C or 2C, C, 3, 1, 1)
            weight.mul_(0.5)
            weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
    quant = vae.quant_conv
    quant.weight.zero_()
    quant.weight[: vae.z_dim, : vae.z_dim, 0, 0, 0] = torch.eye(vae.z_dim)
    quant.bias[vae.z_dim :] = -4.0  # of the log variance


def _preserve_variance(conv: torch.nn.Conv2d | WanCausalConv3d) -> None:
    """Weights for inputs of mean square one; in time only the last tap, since a first frame has nothing before it."""
    spatial = conv.weight.shape[-2:].numel()
    std = (conv.weight.shape[1] * spatial) ** -0.5
    if conv.weight.ndim == 5 and conv.weight.shape[2] > 1:
        conv.weight.normal_(0, 0.1 * std)
        conv.weight[:, :, -1].normal_(0, std)
    else:
        conv.weight.normal_(0, std)
    if conv.bias is not None:
        conv.bias.zero_()


class TrainableNorm(torch.nn.Module):
    """`WanRMS_norm` for channel-first tensors, quick on the CPU forwards and backwards. Shares its parameter."""

    def __init__(self, norm: WanRMS_norm) -> None:
        super().__init__()
        self.gamma = norm.gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, …) to the same."""
        normed: torch.Tensor = x * (x.square().mean(1, keepdim=True) + 1e-12).rsqrt() * self.gamma
        return normed


def quicken_norms_for_training(vae: AutoencoderKLWan) -> None:
    """Replace the norms; the state's names stay the same. See `engine/channel_norm.py`, which has no gradient."""
    for parent in list(vae.modules()):
        for name, child in parent.named_children():
            if isinstance(child, WanRMS_norm) and child.channel_first:
                setattr(parent, name, TrainableNorm(child))


def make_optimizers(vae: AutoencoderKLWan) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions within, AdamW for the rest."""
    outer = {id(p) for conv in (vae.encoder.conv_in, vae.decoder.conv_out) for p in conv.parameters()}
    inner = [p for p in vae.parameters() if p.ndim >= 4 and min(p.shape[:2]) > 1 and id(p) not in outer]
    chosen = {id(p) for p in inner}
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    return [Muon(inner, LEARNING_RATE), torch.optim.AdamW(rest, LEARNING_RATE / 2, (0.9, 0.98), weight_decay=0.0)]


def load_vae(checkpoint: Path) -> AutoencoderKLWan:
    """`checkpoint`/vae, quick on the CPU, without gradients."""
    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", disable_mmap=True).eval().requires_grad_(False)
    quicken_norms_for_training(vae)
    return vae
