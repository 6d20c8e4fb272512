"""The training, from the scripts: a few steps of each stage lower its loss, and a run goes on where it was killed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve_graph.tiny_wan.curves import write_curves
from serve_graph.tiny_wan.model import BATCH, draw_sigmas, flow_loss, initialize, make_transformer, train_model
from serve_graph.tiny_wan.muon import orthogonalize
from serve_graph.tiny_wan.run_folder import RunFolder
from serve_graph.tiny_wan.text import make_tokenizer, roughen, train_text
from serve_graph.tiny_wan.vae import make_vae, quicken_norms_for_training, train_vae


def losses(folder: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_torch_thread: None) -> Path:
    """A short training: text, VAE, then the transformer on their outcome."""
    folder = tmp_path_factory.mktemp("run")
    train_text(RunFolder(folder, "text"), folder / "checkpoint", steps=101, batch=8)
    train_vae(RunFolder(folder, "vae"), folder / "checkpoint", steps=21, batch=1, num_measured=2)
    train_model(
        RunFolder(folder, "model"), folder / "checkpoint", steps=100, batch=2, num_clips=(10, 10), num_sampled=0
    )
    return folder


@pytest.mark.parametrize("stage", ["text", "vae", "model"])
def test_a_short_training_lowers_the_loss(trained: Path, stage: str) -> None:
    first, *_, last = losses(trained, stage)
    assert last < 0.9 * first


def test_the_outcome_has_the_latents_spread_in_its_configuration(trained: Path) -> None:
    config = json.loads((trained / "checkpoint" / "vae" / "config.json").read_text())
    assert len(set(config["latents_mean"])) == len(set(config["latents_std"])) == 16


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path: Path, one_torch_thread: None) -> None:
    def run(name: str, *stops: int) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        for steps in stops:
            train_text(RunFolder(folder, "text"), folder / "checkpoint", steps=steps, batch=2)
        weights: dict[str, torch.Tensor] = torch.load(folder / "text.state.pt", weights_only=True)["encoder"]
        return weights

    whole, resumed = run("whole", 3), run("resumed", 3, 3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_saved_state_is_replaced_whole_and_keeps_its_cpu_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "stage")
    assert run.load() is None
    run.save({"step": 1})
    run.save({"step": 2})
    again = RunFolder(tmp_path, "stage")
    state = again.load()
    assert state is not None
    assert state["step"] == 2
    assert again.used_cpu_s() >= state["cpu_s"]
    assert [path.name for path in tmp_path.iterdir()] == ["stage.state.pt"]


def test_a_log_s_repeated_step_counts_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "stage")
    for loss in (3.0, 2.0):
        run.log(step=7, loss=loss)
    assert [line["loss"] for line in run.read_log()] == [2.0]


def test_curves_are_a_picture(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 1 / (i + 1), "cpu_s": i} for i in range(10)]
    lines += [{"step": i, "kind": "check", "psnr": i} for i in range(3)]
    write_curves(lines, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (920, 200)


def test_tokenizer_splits_no_colour_and_knows_no_case() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.tokenize("A Red circle, over Navy-blue!") == [
        "▁a",
        "▁red",
        "▁circle",
        ",",
        "▁over",
        "▁navy",
        "▁blue",
        "!",
    ]
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_roughening_puts_no_word_in_that_says_something_else() -> None:
    rng = np.random.default_rng(0)
    telling = {"left", "right", "up", "down", "red", "blue", "square", "still", "large", "slow"}
    for _ in range(300):
        added = set(roughen("a green circle", rng).strip(".!,:) ").split()) - {"a", "green", "circle"}
        assert added.isdisjoint(telling)


def test_quickened_norms_keep_the_vae_s_function() -> None:
    torch.manual_seed(0)
    vae = make_vae().eval()
    clip = torch.randn(1, 3, 5, 16, 16)
    with torch.inference_mode():
        before = vae.encode(clip).latent_dist.mean
        quicken_norms_for_training(vae)
        torch.testing.assert_close(vae.encode(clip).latent_dist.mean, before, atol=1e-4, rtol=1e-4)


def test_orthogonalized_updates_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((8, 40), (40, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert 0.5 < values.min() <= values.max() < 1.3


def test_sigmas_favour_high_noise_and_stay_in_range() -> None:
    torch.manual_seed(0)
    sigmas = draw_sigmas(20_000)
    assert 0 < sigmas.min() <= sigmas.max() <= 1
    assert 0.5 < (sigmas > 0.85).float().mean() < 0.65


def test_the_transformer_begins_near_predicting_its_input() -> None:
    """At full noise the velocity is the noise less the mean clip: the start is already better than saying nothing."""
    torch.manual_seed(0)
    model = make_transformer()
    initialize(model)
    latents, noise = torch.zeros(BATCH, 16, 5, 8, 8), torch.randn(BATCH, 16, 5, 8, 8)
    with torch.inference_mode():
        loss = flow_loss(model, latents, torch.zeros(BATCH, 32, 128), torch.ones(BATCH), noise)
    assert loss < 0.5 * noise.square().mean()
