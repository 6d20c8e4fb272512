"""Train the tiny Wan: `python -m serve_graph.tiny_wan.train STAGE`. See TRAINING.md beside this file.

Each stage goes on where it was stopped. Everything lies in the run's folder; `export` copies what ships.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from serve_graph.tiny_wan.run_folder import RunFolder

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Option("--run", help="The run's folder.")]
FOLDER = Path("out/tiny-wan")
Pause = Annotated[Path | None, typer.Option(help="Wait while this file exists.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
STAGES = ("text", "vae", "model")
MAX_BYTES = 24_000_000


@app.callback()
def train() -> None:
    """Train the tiny Wan, stage by stage: text, vae, model; or all. Then eval and export."""


@app.command()
def text(run: Folder = FOLDER, pause_file: Pause = None, threads: Threads = 1) -> None:
    """Make the tokeniser and train the text encoder; fails when it misses its gate."""
    from serve_graph.tiny_wan.text import train_text

    torch.set_num_threads(threads)
    train_text(RunFolder(run, "text", pause_file), run / "checkpoint")
    curves(run)


@app.command()
def vae(run: Folder = FOLDER, pause_file: Pause = None, threads: Threads = 1) -> None:
    """Train the VAE; exit code 1 when it misses its gate."""
    from serve_graph.tiny_wan.vae import load_vae, passes_gate, train_vae

    torch.set_num_threads(threads)
    folder = RunFolder(run, "vae", pause_file)
    train_vae(folder, run / "checkpoint")
    curves(run)
    if not passes_gate(load_vae(run / "checkpoint"), folder):
        print("the VAE loses shapes: train it for longer (STEPS in vae.py) before the model")
        raise typer.Exit(1)


@app.command()
def model(run: Folder = FOLDER, pause_file: Pause = None, threads: Threads = 1) -> None:
    """Encode the clips and train the transformer. Needs the stages text and vae."""
    from serve_graph.tiny_wan.model import train_model

    torch.set_num_threads(threads)
    train_model(RunFolder(run, "model", pause_file), run / "checkpoint")
    curves(run)


@app.command("all")
def all_stages(run: Folder = FOLDER, pause_file: Pause = None, threads: Threads = 1) -> None:
    """Every stage in turn, then the evaluation."""
    text(run, pause_file, threads)
    vae(run, pause_file, threads)
    model(run, pause_file, threads)
    evaluate(run, threads)


@app.command("eval")
def evaluate(run: Folder = FOLDER, threads: Threads = 1, num_clips: int = 256) -> None:
    """How often the run's checkpoint follows held-out captions, without a service. See also `wan-serve eval`."""
    from serve_graph.engine.text_checkpoint import load_text_parts
    from serve_graph.tiny_wan.model import FrozenText, adherence

    torch.set_num_threads(threads)
    checkpoint = run / "checkpoint"
    encoder = FrozenText(load_text_parts(checkpoint, torch.device("cpu"), "float32"))
    print(json.dumps(adherence(checkpoint, encoder, num_clips)))


@app.command()
def curves(run: Folder = FOLDER) -> None:
    """Draw each stage's log as `{stage}.png`."""
    from serve_graph.tiny_wan.curves import write_curves

    for stage in STAGES:
        lines = RunFolder(run, stage).read_log()
        if lines:
            write_curves(lines, run / f"{stage}.png")


@app.command()
def export(target: Path, run: Folder = FOLDER) -> None:
    """Write the run's checkpoint to TARGET in diffusers' layout, as it ships."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    from serve_graph.tiny_wan.model import make_scheduler

    source = run / "checkpoint"
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(source / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(source / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(source / "vae"),
        scheduler=make_scheduler(),
        transformer=WanTransformer3DModel.from_pretrained(source / "transformer"),
    )
    for part in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer"):
        shutil.rmtree(target / part, ignore_errors=True)
    pipeline.save_pretrained(target)
    for path in target.rglob("*.json"):  # where a part was loaded from is nobody's business
        path.write_text(re.sub(r' *"_name_or_path": "[^"]*",\n', "", path.read_text()))
    files = [path for path in target.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes 0600, which no package can be read with by others
    size = sum(path.stat().st_size for path in files)
    print(f"{target}: {size / 1e6:.1f} MB")
    if size > MAX_BYTES:
        print(f"more than {MAX_BYTES / 1e6:g} MB: too large to ship")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
