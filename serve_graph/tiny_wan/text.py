"""The stage `text`: the tokeniser, and diffusers' kind of text encoder (UMT5), small, taught what captions say.

The tokeniser isn't trained: whole words for what captions and people say, pieces and characters for the rest, so that
no colour is ever split. The encoder learns to tell the attributes of a caption; after that it stays as it is, and the
transformer reads its rows.
"""

import string
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from serve_graph.tiny_wan.captions import all_words, held_out_caption, training_caption
from serve_graph.tiny_wan.run_folder import RunFolder
from serve_graph.tiny_wan.world import COLOURS, MOTIONS, SHAPES, SIZES, SPEEDS, Scene, held_out_scene, training_scene

STEPS = 3_000
BATCH = 64
SEED = 2
LEARNING_RATE = 1e-3
TEXT_DIM = 128
GATE = 0.97
"""The share of held-out captions of which all four attributes should be read right; below it, the stage says so."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "size": tuple(SIZES),
    "speed": tuple(SPEEDS),
}
"""What the encoder is taught to tell; size and speed only where a caption says them, so those stay guesses."""

COMMON_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by but "
    "not what all were we when your can said there use an each which she do how their if will up other about out "
    "many then them these so some her would make like him into time has look two more write go see number no way "
    "could people my than first water been call who now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good "
    "sentence man think say great where help through much before line right too mean old any same tell boy follow "
    "came want show also around form three small set put end does another well large must big even such because "
    "turn here why ask went men read need land different home us move try kind hand picture again change off play "
    "spell air away animal house point page letter mother answer found study still learn should world high every "
    "near add between own below country plant last school father keep tree never start city earth eye light "
    "thought head under story saw left few while along might close something seem next hard open example begin "
    "life always those both paper together got group often run until side feet car mile night walk white sea "
    "began grow took river four carry state once book hear stop without second later miss idea enough eat face "
    "watch far really almost let above girl sometimes mountain cut young talk soon list song being leave family "
    "it's red blue green yellow orange purple black brown grey gray pink cyan magenta dark light bright pale deep "
    "vivid colour color coloured colored colours colors background backdrop foreground scene video clip film "
    "movie animation gif footage shot camera frame screen canvas wall sky field surface sheet plain solid flat "
    "simple empty clean smooth seamless minimal geometric geometry figure object item shape circular round square "
    "triangular triangle circle disc disk ball dot orb sphere box block cube tile wedge pyramid cone star ring "
    "heart line oval moves moving moved motion movement motionless slow slowly fast quick quickly rapid steady "
    "steadily gentle gently upward upwards downward downwards leftward leftwards rightward rightwards horizontal "
    "vertical horizontally vertically across toward towards against behind front side edge top bottom middle "
    "center centre corner direction while remains remaining stays staying static fixed frozen parked sits sitting "
    "rests resting stands standing somewhere nothing everything whole entire please display displays showing "
    "shows depict depicts featuring features cat dog bird fish horse woman child train boat flower street ocean "
    "cloud sun moon rain snow fire "
)
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_PIECES = ("es", "ed", "ing", "er", "ish", "ly", "ward", "wards", "'s")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokeniser over a fixed list of words. Lower-cases, so that `Red` is `red`, and ends with `</s>`."""
    vocab = [(_PAD, 0.0), (_END, 0.0), (_UNKNOWN, 0.0)]
    vocab += [("▁" + word, -2.0) for word in _words()]
    vocab += [(piece, -4.0) for piece in _PIECES]
    vocab += [("▁", -6.0), *((c, -8.0) for c in string.ascii_lowercase + string.digits + string.punctuation)]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[-/\"()\s–—]+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, model_max_length=512
    )


def _words() -> list[str]:
    """Every word of the captions and the common ones, each once, in a fixed order."""
    return sorted(all_words() | set(COMMON_WORDS.split()))


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Random weights; but two heads of each layer look at their neighbours, before and after.

    Which colour is the shape's and which the background's hangs on its neighbours. With biases that start near zero it
    was not found out in 1,650 steps; with these it takes 200.
    """
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
        )
    )
    with torch.no_grad():
        for block in encoder.encoder.block:
            bias = block.layer[0].SelfAttention.relative_attention_bias.weight  # (32 buckets, heads)
            for head, first in ((0, 0), (1, 16)):  # buckets 1 to 7: so many words before; 17 to 23: after
                bias[first + 1 : first + 4, head] = torch.tensor([4.0, 3.0, 2.0])
    return encoder


class Reader(torch.nn.Module):
    """Reads each attribute from the encoder's rows: one query looks at them, one layer names what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(len(ATTRIBUTES), TEXT_DIM) / TEXT_DIM**0.5)
        self.names = torch.nn.ModuleList(torch.nn.Linear(TEXT_DIM, len(values)) for values in ATTRIBUTES.values())

    def forward(self, rows: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """rows: (B, L, TEXT_DIM); mask: (B, L). Returns (B, values) for each attribute."""
        scores = (rows @ self.queries.T).masked_fill(~mask.bool()[..., None], -torch.inf)  # (B, L, attributes)
        seen = scores.softmax(1).transpose(1, 2) @ rows  # (B, attributes, TEXT_DIM)
        return [name(seen[:, i]) for i, name in enumerate(self.names)]


def train_text(run: RunFolder, checkpoint: Path, steps: int = STEPS, batch: int = BATCH) -> float:
    """Write `checkpoint`/tokenizer and /text_encoder. Goes on where it was. Returns the last loss."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    encoder, reader = make_text_encoder(len(tokenizer)), Reader()
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, (0.9, 0.98), weight_decay=0.01)
    first, loss = 0, torch.tensor(float("nan"))
    state = run.load()
    if state is not None:
        first = state["step"]
        encoder.load_state_dict(state["encoder"])
        reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
    for step in run.steps(first, steps):
        rng = np.random.default_rng((SEED, step))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100, 2 * (1 - step / steps))
        scenes = [training_scene(rng) for _ in range(batch)]
        captions = [roughen(training_caption(scene, rng), rng) for scene in scenes]
        loss = _loss(reader(*_rows(tokenizer, encoder, captions)), scenes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            run.log(step=step, loss=loss.item())
        if run.should_save() or step == steps - 1:
            saved = {
                "encoder": encoder.state_dict(),
                "reader": reader.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            run.save({"step": step + 1, **saved})
    right = read_rate(tokenizer, encoder, reader)
    run.log(kind="gate", step=steps, held_out=right)
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    encoder.save_pretrained(checkpoint / "text_encoder")
    if right < GATE and steps == STEPS:
        print(f"the text encoder reads {right:.3f} of the held-out captions right, and {GATE} are hoped for")
    return loss.item()


def roughen(caption: str, rng: np.random.Generator) -> str:
    """Make a caption more like a person's: some words more, an article less, a capital, a full stop."""
    words = caption.split()
    if rng.random() < 0.25:
        words = [word for word in words if word not in ("a", "an", "the", "is") or rng.random() < 0.5]
    if rng.random() < 0.25:
        noise = COMMON_WORDS.split()
        for _ in range(rng.integers(1, 4)):
            word = noise[rng.integers(len(noise))]
            if word not in _TELLING:
                words.insert(int(rng.integers(len(words) + 1)), word)
    text = " ".join(words)
    if rng.random() < 0.3:
        text += rng.choice([".", "!", " please", ",", " :)"])
    return text


_TELLING_WORDS = (
    "up down left right still stop top bottom leftward leftwards rightward rightwards upward upwards downward "
    "downwards red blue green yellow orange purple black white triangle circle square disc disk ball dot orb "
    "sphere box block cube tile wedge pyramid cone round circular triangular ring star heart oval pink brown cyan "
    "magenta grey gray motionless remains remaining stays staying static fixed frozen parked sits sitting rests "
    "resting stands standing slow slowly fast quick quickly rapid small little large big great "
)
_TELLING = frozenset(_TELLING_WORDS.split())
"""Common words that say something about a scene: never put in where they'd be wrong."""


def _rows(
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state, tokens.attention_mask


def _loss(named: list[torch.Tensor], scenes: list[Scene]) -> torch.Tensor:
    """Cross-entropy, summed over the attributes."""
    losses = [
        F.cross_entropy(scores, torch.tensor([values.index(getattr(scene, attribute)) for scene in scenes]))
        for scores, (attribute, values) in zip(named, ATTRIBUTES.items(), strict=True)
    ]
    return torch.stack(losses).sum()


@torch.inference_mode()
def read_rate(tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, reader: Reader, count: int = 512) -> float:
    """How often shape, colours and motion are all read right, over held-out scenes in held-out templates."""
    rng = np.random.default_rng((SEED, 10**7))
    scenes = [held_out_scene(rng) for _ in range(count)]
    named = reader(*_rows(tokenizer, encoder, [held_out_caption(scene, rng) for scene in scenes]))
    right = torch.ones(count, dtype=torch.bool)
    for scores, (attribute, values) in list(zip(named, ATTRIBUTES.items(), strict=True))[:4]:
        truth = torch.tensor([values.index(getattr(scene, attribute)) for scene in scenes])
        right &= scores.argmax(1) == truth
    return right.float().mean().item()
