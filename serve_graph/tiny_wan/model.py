"""The stage `model`: diffusers' `WanTransformer3DModel`, small, taught by flow matching to follow captions.

Velocity prediction over the latents of the stage `vae`, timesteps as the scheduler gives them at inference. The order
of what is taught matters: motion is not learned when everything is taught at once. So first every shape and motion,
white on black, until the model minds a wrong word for either; then all colours, while a tenth stays white on black.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from schemas.handoff import PreparedPrompt, TextEmbedding
from schemas.official_profiles import WAN_TINY
from schemas.requests import GenerateRequest
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.decode import Decoding
from serve_graph.engine.denoise import Denoising, denoise_step
from serve_graph.engine.text_checkpoint import TextParts, load_text_parts
from serve_graph.tiny_wan.captions import held_out_caption, plain_caption, training_caption
from serve_graph.tiny_wan.measure import measure
from serve_graph.tiny_wan.run_folder import RunFolder
from serve_graph.tiny_wan.text import TEXT_DIM, roughen
from serve_graph.tiny_wan.vae import Z_DIM, encode, load_vae, to_tensor
from serve_graph.tiny_wan.world import (
    SHAPES,
    Frames,
    Scene,
    draw,
    held_out_scene,
    place,
    training_scene,
)

STEPS = 9_000
BATCH = 16
SEED = 3
LEARNING_RATE = 2e-3
EMA = 0.999
CAPTION_DROPOUT = 0.1
"""How often a caption is left out, so that guidance has something to compare with."""
FIRST_CLIPS, ALL_CLIPS = 2_000, 8_000
"""Clips whose latents are kept: white on black, and of all colours."""
TEXT_LENGTHS = ((32, 0.5), (48, 0.3), (128, 0.2))
"""Rows that a caption is padded to, and how often. 128 is what the profile uses."""
GATE = 0.15
"""How much a wrong word for the motion, and for the shape, must raise the loss before colours are taught."""
COLOUR_STEPS = 800
"""How long colours take to come in."""
KEPT_FIRST = 0.1
HIGH_NOISE = (0.85, 1.0)
"""Where motion and layout are decided; the penalties are measured there."""


def make_transformer() -> WanTransformer3DModel:
    """Random weights."""
    return WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=768,
        num_layers=4,
    )


def make_scheduler() -> UniPCMultistepScheduler:
    """Wan's own, as in its checkpoints; the profile's shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=WAN_TINY.defaults.flow_shift
    )


# --- the latents


@dataclass(frozen=True)
class LatentClips:
    """Normalised latents, (N, 16, 5, 8, 8) float16, and what each shows."""

    latents: torch.Tensor
    scenes: list[Scene]


def encode_clips(run: RunFolder, checkpoint: Path, first_stage: bool, count: int) -> LatentClips:
    """Draw clips and encode them once; kept in the run's folder, 250 to a file."""
    name, per_file = ("first" if first_stage else "all"), min(250, count)
    vae, parts, scenes = None, [], []
    run.folder.mkdir(parents=True, exist_ok=True)
    for number in range(math.ceil(count / per_file)):
        path = run.folder / f"latents-{name}-{number:03}.pt"
        rng = np.random.default_rng((SEED, 1 if first_stage else 2, number))
        drawn = [training_scene(rng, first_stage=first_stage) for _ in range(per_file)]
        if not path.exists():
            run.wait_while_paused()
            vae = vae or load_vae(checkpoint)
            scratch = path.with_suffix(".part")
            torch.save(_encode(vae, [draw(scene, place(scene, rng)) for scene in drawn]), scratch)
            scratch.replace(path)
        parts.append(torch.load(path, weights_only=True))
        scenes += drawn
    return LatentClips(torch.cat(parts)[:count], scenes[:count])


@torch.inference_mode()
def _encode(vae: AutoencoderKLWan, clips: list[Frames]) -> torch.Tensor:
    shape = (1, Z_DIM, 1, 1, 1)
    mean, std = torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)
    batches = [to_tensor(np.stack(clips[i : i + 10])) for i in range(0, len(clips), 10)]
    return torch.cat([((encode(vae, batch) - mean) / std).half() for batch in batches])


# --- training


def train_model(
    run: RunFolder,
    checkpoint: Path,
    steps: int = STEPS,
    batch: int = BATCH,
    num_clips: tuple[int, int] = (FIRST_CLIPS, ALL_CLIPS),
    num_sampled: int = 32,
) -> float:
    """Write `checkpoint`/transformer and /scheduler. Goes on where it was. Returns the mean of the last 50 losses.

    num_sampled: clips that are made and measured every 2,000 steps and at the end.
    """
    torch.manual_seed(SEED)
    text = FrozenText(load_text_parts(checkpoint / ".", torch.device("cpu"), "float32"))
    first_clips = encode_clips(run, checkpoint, True, num_clips[0])
    all_clips = encode_clips(run, checkpoint, False, num_clips[1])
    model = make_transformer()
    initialize(model)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.01)
    first, colours_since, losses = 0, -1, []
    state = run.load()
    if state is not None:
        first, colours_since = state["step"], state["colours_since"]
        model.load_state_dict(state["model"])
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
    for step in run.steps(first, steps):
        rng = np.random.default_rng((SEED, step))
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100, 2 * (1 - step / steps))
        share = 1.0 if colours_since < 0 else max(KEPT_FIRST, 1 - (step - colours_since) / COLOUR_STEPS)
        latents, scenes = _draw_batch(first_clips, all_clips, share, batch, rng)
        captions = ["" if rng.random() < CAPTION_DROPOUT else _caption(scene, rng) for scene in scenes]
        lengths, shares = zip(*TEXT_LENGTHS, strict=True)
        embeddings = text.pad(captions, int(rng.choice(lengths, p=shares)))
        loss = flow_loss(model, latents, embeddings, draw_sigmas(batch), torch.randn_like(latents))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _follow(average, model, min(EMA, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if step % 50 == 49:
            run.log(step=step, loss=float(np.mean(losses[-50:])), first_stage=share)
        if step % 200 == 199:
            penalties = wrong_word_penalties(model, text, first_clips if colours_since < 0 else all_clips)
            run.log(kind="penalty", step=step, **penalties)
            if colours_since < 0 and min(penalties["motion"], penalties["shape"]) > GATE:
                colours_since = step + 1
                run.log(kind="gate", step=step, passed="colours from here on")
        if step % 2_000 == 1_999 or step == steps - 1:
            save_model(model, average, checkpoint)
            if num_sampled:
                run.log(kind="adherence", step=step, **adherence(checkpoint, text, num_sampled))
        if run.should_save() or step == steps - 1:
            run.save(
                {
                    "step": step + 1,
                    "colours_since": colours_since,
                    "model": model.state_dict(),
                    "average": average,
                    "optimizer": optimizer.state_dict(),
                }
            )
    return float(np.mean(losses[-50:])) if losses else float("nan")


def _draw_batch(
    first: LatentClips, everything: LatentClips, share: float, batch: int, rng: np.random.Generator
) -> tuple[torch.Tensor, list[Scene]]:
    sources = [first if rng.random() < share else everything for _ in range(batch)]
    picks = [int(rng.integers(len(source.scenes))) for source in sources]
    latents = torch.stack([source.latents[i] for source, i in zip(sources, picks, strict=True)]).float()
    return latents, [source.scenes[i] for source, i in zip(sources, picks, strict=True)]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    chance = rng.random()
    if chance < 0.2:
        return plain_caption(scene)
    caption = training_caption(scene, rng)
    return roughen(caption, rng) if chance < 0.5 else caption


def draw_sigmas(batch: int) -> torch.Tensor:
    """(B,) noise levels: 40% high noise, where motion is decided, 30% uniform with shift 3, 30% logit-normal."""
    uniform = torch.rand(batch)
    high = HIGH_NOISE[0] + (HIGH_NOISE[1] - HIGH_NOISE[0]) * uniform
    shifted = 3 * uniform / (1 + 2 * uniform)
    kind = torch.rand(batch)
    sigmas = torch.where(kind < 0.4, high, torch.where(kind < 0.7, shifted, torch.randn(batch).sigmoid()))
    return sigmas.clamp(1e-3, 1)


def flow_loss(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    embeddings: torch.Tensor,
    sigmas: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The velocity's mean squared error. latents, noise: (B, 16, T, H, W); embeddings: (B, L, 128); sigmas: (B,)."""
    level = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = model(hidden_states=noisy, timestep=1000 * sigmas, encoder_hidden_states=embeddings, return_dict=False)[
        0
    ]
    return torch.nn.functional.mse_loss(velocity, noise - latents)


@torch.no_grad()
def _follow(average: dict[str, torch.Tensor], model: torch.nn.Module, decay: float) -> None:
    names, parameters = zip(*model.named_parameters(), strict=True)
    torch._foreach_lerp_([average[name] for name in names], list(parameters), 1 - decay)


@torch.no_grad()
def initialize(model: WanTransformer3DModel) -> None:
    """Start near what is known: the velocity is mostly the noise, and the noise is mostly the input.

    The patch embedding keeps lengths, the output is its transpose, the residual branches start small, gates at one.
    """
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    patch = Z_DIM * math.prod(model.config.patch_size)  # 64
    basis = torch.linalg.qr(torch.randn(inner, patch))[0]  # (inner, patch), orthonormal columns
    # the embedding's order is (channel, t, h, w), the output's (t, h, w, channel)
    model.patch_embedding.weight.copy_(basis.view_as(model.patch_embedding.weight))
    model.patch_embedding.bias.zero_()
    outward = basis.view(inner, Z_DIM, -1).transpose(1, 2).reshape(inner, patch)
    model.proj_out.weight.copy_(outward.T * (patch / inner) ** 0.5)
    model.proj_out.bias.zero_()
    model.scale_shift_table.zero_()
    model.condition_embedder.time_proj.weight.mul_(0.1)
    model.condition_embedder.time_proj.bias.zero_()
    for block in model.blocks:
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, [2, 5]] = 1.0  # the gates of attention and feed-forward
        for output in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            output.weight.mul_(0.09)
            output.bias.zero_()


def save_model(model: WanTransformer3DModel, average: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Write the averaged weights."""
    saved = make_transformer()
    saved.load_state_dict({**model.state_dict(), **average})
    saved.save_pretrained(checkpoint / "transformer")
    make_scheduler().save_pretrained(checkpoint / "scheduler")


class FrozenText:
    """The text stage's encoder: captions to rows, as the service encodes them."""

    def __init__(self, parts: TextParts) -> None:
        self._parts = parts

    @torch.no_grad()
    def rows(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """(num_tokens, 128) for each."""
        tokens = self._parts.tokenizer(list(captions), padding=True, return_tensors="pt")
        hidden = self._parts.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return [hidden[i, :length] for i, length in enumerate(tokens.attention_mask.sum(1).tolist())]

    def pad(self, captions: Sequence[str], length: int) -> torch.Tensor:
        """(B, length, 128), zeros behind; longer where a caption needs it."""
        rows = self.rows(captions)
        padded = torch.zeros(len(rows), max(length, *map(len, rows)), TEXT_DIM)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded


# --- looking at it


@torch.no_grad()
def wrong_word_penalties(
    model: WanTransformer3DModel, text: FrozenText, clips: LatentClips, count: int = 48
) -> dict[str, float]:
    """How much the loss rises, as a share, when the caption says the opposite motion, or another shape or colour."""
    model.eval()
    generator = torch.Generator().manual_seed(SEED)
    moving = [i for i, scene in enumerate(clips.scenes[: 4 * count]) if scene.motion != "still"][:count]
    latents = clips.latents[moving].float()
    noise = torch.randn(latents.shape, generator=generator)
    low, high = HIGH_NOISE
    sigmas = low + (high - low) * torch.rand(len(moving), generator=generator)

    def loss(change: str) -> float:
        captions = [plain_caption(_with_wrong(clips.scenes[i], change)) for i in moving]
        return flow_loss(model, latents, text.pad(captions, 32), sigmas, noise).item()

    right = loss("")
    wrong = {change: loss(change) / right - 1 for change in ("motion", "shape", "colour", "background")}
    model.train()
    return wrong


def _with_wrong(scene: Scene, attribute: str) -> Scene:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}
    if attribute == "motion":
        return Scene(scene.shape, scene.colour, scene.background, opposite[scene.motion])
    if attribute == "shape":
        return Scene(SHAPES[SHAPES.index(scene.shape) - 1], scene.colour, scene.background, scene.motion)
    other = next(c for c in ("green", "orange", "blue") if c not in (scene.colour, scene.background))
    if attribute == "colour":
        return Scene(scene.shape, other, scene.background, scene.motion)
    if attribute == "background":
        return Scene(scene.shape, scene.colour, other, scene.motion)
    return scene


def adherence(checkpoint: Path, text: FrozenText, num_clips: int) -> dict[str, float]:
    """How often each attribute comes out right, over held-out scenes, half of them in held-out templates."""
    rng = np.random.default_rng((SEED, 10**7))
    scenes = [held_out_scene(rng) for _ in range(num_clips)]
    prompts = [
        held_out_caption(scene, rng) if i % 2 else training_caption(scene, rng, complete=True)
        for i, scene in enumerate(scenes)
    ]
    readings = [measure(frames) for frames in sample(checkpoint, text, prompts)]
    right = {
        name: [getattr(r, name) == getattr(s, name) for r, s in zip(readings, scenes, strict=True)]
        for name in ("shape", "colour", "background", "motion")
    }
    rates = {name: float(np.mean(values)) for name, values in right.items()}
    return {**rates, "all": float(np.mean(np.all(list(right.values()), axis=0)))}


def sample(checkpoint: Path, text: FrozenText, prompts: Sequence[str], seed: int = 0) -> list[Frames]:
    """Clips with the profile's defaults, by the service's own step loop. Returns (17, 64, 64, 3) uint8 each."""
    parts = GeneratorParts(
        transformer=WanTransformer3DModel.from_pretrained(checkpoint / "transformer", disable_mmap=True)
        .eval()
        .requires_grad_(False),
        vae=load_vae(checkpoint),
        scheduler=make_scheduler(),
        device=torch.device("cpu"),
    )
    empty = _embedding(text.rows([""])[0])
    jobs = []
    for i, (prompt, rows) in enumerate(zip(prompts, text.rows(prompts), strict=True)):
        parameters = WAN_TINY.resolve(GenerateRequest(prompt=prompt or " ", seed=seed + i))
        prepared = PreparedPrompt(_embedding(rows), empty)
        jobs.append(Denoising(parts, parameters, prepared, WAN_TINY.max_sequence_length))
    while not jobs[0].is_done:
        denoise_step(parts.transformer, jobs)
    clips = []
    for job in jobs:
        decoding = Decoding(parts.vae, job.latents)
        chunks = []
        while not decoding.is_done:
            chunks.append(decoding.next_frames())
        clips.append(np.concatenate(chunks))
    return clips


def _embedding(rows: torch.Tensor) -> TextEmbedding:
    return TextEmbedding(values=rows.numpy(), dtype="float32", solo=False)
