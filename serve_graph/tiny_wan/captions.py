"""Captions of scenes: many words, word orders and phrases for one thing. Pure; the caller's rng chooses.

`TRAINING_TEMPLATES` and `HELD_OUT_TEMPLATES` have no sentence in common: who captions for training can't get at the
second. Size and speed are said at most half of the time, a background now and then not at all.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from serve_graph.tiny_wan.world import Scene

SHAPE_WORDS = {
    "circle": "circle|circle|circle|disc|disk|ball|dot|orb|round shape|sphere|round thing|round object|marble|"
    "bubble|coin",
    "square": "square|square|square|box|block|cube|tile|square shape|square object|brick|square thing",
    "triangle": "triangle|triangle|triangle|triangular shape|wedge|pyramid|three-sided shape|cone|triangular object|"
    "triangular thing",
}
COLOUR_WORDS = {
    "red": "red|red|red|crimson|scarlet|ruby|bright red|cherry|dark red|deep red|blood red|ruby red",
    "green": "green|green|green|emerald|jade|bright green|grass green|dark green|forest green|deep green",
    "blue": "blue|blue|blue|navy|azure|cobalt|bright blue|sapphire|navy blue|deep blue|dark blue|royal blue|ocean blue",
    "yellow": "yellow|yellow|yellow|golden|lemon|bright yellow|gold|sunny yellow|canary yellow|lemon yellow",
    "orange": "orange|orange|orange|tangerine|amber|bright orange|pumpkin|deep orange",
    "purple": "purple|purple|purple|violet|lilac|plum|dark purple|lavender|deep purple",
    "white": "white|white|white|snowy|ivory|pure white|snow white|chalk white|plain white",
    "black": "black|black|black|ebony|jet black|pitch black|coal black|inky|deep black|midnight black",
}
SIZE_WORDS = {
    "small": "small|little|tiny|mini|miniature|smallish",
    "medium": "|medium|medium-sized|mid-sized",
    "large": "big|large|huge|giant|great|enormous|massive|oversized",
}
SPEED_WORDS = {
    "slow": "slowly|gently|unhurriedly|at a slow pace|lazily|calmly|very slowly",
    "medium": "|steadily|at a steady pace|smoothly",
    "fast": "quickly|fast|rapidly|swiftly|at high speed|in a hurry|very fast|speedily",
}
TOWARDS = {
    "left": "left|left|to the left|to the left|leftward|leftwards|toward the left|towards the left|to the left side|"
    "from right to left|from the right to the left|in the left direction|to the left edge|"
    "off to the left|left across the frame",
    "right": "right|right|to the right|to the right|rightward|rightwards|toward the right|towards the right|"
    "to the right side|from left to right|from the left to the right|in the right direction|"
    "to the right edge|off to the right|right across the frame",
    "up": "up|up|upward|upwards|to the top|toward the top|towards the top|from bottom to top|"
    "from the bottom to the top|up the screen|straight up|to the top edge|up across the frame|toward the top edge",
    "down": "down|down|downward|downwards|to the bottom|toward the bottom|towards the bottom|from top to bottom|"
    "from the top to the bottom|down the screen|straight down|to the bottom edge|down across the frame|"
    "toward the bottom edge",
}
MOVE = (
    "move|move|drift|slide|glide|travel|float|go|head|fly|roll|shift|pass|wander|sail|run|creep|proceed|"
    "push|zoom|make its way|journey|swim"
)
OWN_VERBS = {
    "up": "rise|rise|ascend|climb|go up|lift off|soar|float up",
    "down": "fall|fall|sink|descend|drop|go down|plunge|come down",
}
"""Verbs that say the direction themselves."""
STILL_FINITE = (
    "stays still|stands still|does not move|is not moving|stays in place|rests|sits still|is still|is motionless|"
    "remains in place|hovers in place|stays put|keeps still|doesn't move|is stationary|is at rest"
)
STILL_PARTICIPLE = (
    "standing still|not moving|staying in place|resting|sitting still|staying still|motionless|stationary|"
    "hovering in place|at rest|holding still|without moving|that does not move|remaining still|static"
)
BACKGROUND = (
    "on a {b} background|on a {b} background|over a {b} background|against a {b} background|on {b}|over a {b} backdrop|"
    "against a {b} backdrop|in front of a {b} background|in front of a {b} wall|with a {b} background|on a {b} canvas|"
    "across a {b} field|across a {b} screen|with {b} behind it|on a plain {b} ground|in a {b} scene|over {b}|"
    "against {b}|on a {b} surface|in front of {b}|on a {b} backdrop|with a {b} backdrop"
)
OPENING = (
    "a video of|a clip of|an animation of|a shot of|show|show me|a short video showing|make a clip of|i want to see|"
    "please show|a scene with|a minimalist animation of|picture|imagine|here is"
)
STYLE = (
    "simple|minimalist|flat colours|4k|high quality|cartoon style|plain style|seamless|no text|clean look|"
    "the camera does not move|static camera|smooth animation"
)

TRAINING_TEMPLATES = (
    "{a} {size} {c} {shape} {moves} {bg}",
    "{a} {size} {c} {shape} {moving} {bg}",
    "{c} {shape} {moving} {bg}",
    "{c} {size} {shape}, {moving}, {bg}",
    "{bg}, {a} {size} {c} {shape} {moves}",
    "{bg}, {a} {c} {shape} {moving}",
    "{opening} {a} {size} {c} {shape} {moving} {bg}",
    "{opening} {a} {size} {c} {shape} {bg} {moving}",
    "{opening} {a} {c} {shape} that {moves} {bg}",
    "{a} {shape} {moves} {bg}; the {shape} is {c}",
    "{a} {size} {shape} in {c} {moves} {bg}",
    "{moving}, {a} {c} {shape} {bg}",
    "{b} background, {size} {c} {shape}, {moving}",
    "{a} {size} {c} {shape} {bg} {moves}",
    "{a} {c} {shape} {bg}, {moving}",
    "{a} {c} {shape} {bg}. it {moves}",
    "the background is {b}. {a} {size} {c} {shape} {moves}",
    "the background is {b} and {a} {c} {shape} {moves}",
    "there is {a} {size} {c} {shape} {bg} and it {moves}",
    "there is {a} {c} {shape} that {moves} {bg}",
    "{c} {shape}, {b} background, {moving}",
    "{a} {size} {shape}, coloured {c}, {moves} {bg}",
    "watch {a} {c} {shape} as it {moves} {bg}",
    "{a} {c} {shape} {moves}, and behind it everything is {b}",
    "{a} {c} {shape} {moves}. the background is {b}",
    "the {shape} is {c} and {moves} {bg}",
    "{a} {size} {shape} which is {c} {moves} {bg}",
    "{shape}: {c}. background: {b}. motion: {moving}",
    "{size} {c} {shape} {bg} {moving}, {style}",
    "{a} {c} {shape} {moves} {bg}, {style}",
    "the {size} {shape} {moves} and its colour is {c}; the background is {b}",
    "the background has the colour {b}, the {shape} is {c} and {moves}",
    "{a} {shape} {moving} {bg}. the {shape} is {c}",
    "{a} {c} {shape} {moving}, background {b}",
    "{a} {size} {c} {shape} {moving}, {b} background",
    "{bg} you can see {a} {c} {shape} that {moves}",
    "it is {a} {c} {shape}. it {moves} {bg}",
    "{c} {size} {shape}. {b} background. {moving}",
    "behind {a} {c} {shape} that {moves} everything is {b}",
    "{a} {size} {shape}, {c} and bright, {moves} {bg}",
    "only {a} {c} {shape} {bg}, {moving}",
    "{a} {c} coloured {shape} {moves} {bg}",
    "{a} {c}-colored {shape} {moving} {bg}",
)
"""{moves}: a finite verb with its direction; {moving}: a participle; {bg}: a phrase with {b}, the background's word."""

HELD_OUT_TEMPLATES = (
    "we see {a} {size} {c} {shape}; it {moves} {bg}",
    "{bg} there is {a} {c} {shape}, {moving}",
    "everything is {b} except for {a} {size} {c} {shape} {moving}",
    "{moving} {bg}: {a} {c} {shape}",
    "{a} {shape} of {c} colour {moves} {bg}",
    "the {size} {shape} {moves}. it is {c}, the background {b}",
    "a {b} background and {a} {c} {shape} {moving}",
    "{opening} {bg} where {a} {c} {shape} {moves}",
)
_WITHOUT_BACKGROUND = (
    "{a} {size} {c} {shape} {moves}",
    "{a} {c} {shape} {moving}",
    "{opening} {a} {c} {shape} {moving}",
)
_WITHOUT_MOTION = ("{a} {size} {c} {shape} {bg}", "{c} {shape}, {b} background", "{opening} {a} {c} {shape} {bg}")
"""Of scenes that stand still: who names no motion wants none."""


def training_caption(scene: Scene, rng: np.random.Generator, *, complete: bool = False) -> str:
    """A caption in one of the training's templates. complete: it leaves neither background nor motion out."""
    chance = 0.5 if complete else rng.random()
    if scene.motion == "still" and chance < 0.15:
        return _fill(_WITHOUT_MOTION, scene, rng)
    return _fill(_WITHOUT_BACKGROUND if chance > 0.97 else TRAINING_TEMPLATES, scene, rng)


def held_out_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in a template that training never sees."""
    return _fill(HELD_OUT_TEMPLATES, scene, rng)


def plain_caption(scene: Scene) -> str:
    """The plainest: `a red circle moving left on a blue background`."""
    moving = "standing still" if scene.motion == "still" else f"moving {scene.motion}"
    return f"a {scene.colour} {scene.shape} {moving} on a {scene.background} background"


def all_words() -> set[str]:
    """Every word that a caption can have, held-out templates included: the tokeniser keeps each whole."""
    pools = [*SHAPE_WORDS.values(), *COLOUR_WORDS.values(), *SIZE_WORDS.values(), *SPEED_WORDS.values()]
    pools += [*TOWARDS.values(), STILL_FINITE, STILL_PARTICIPLE, BACKGROUND, OPENING, STYLE, "a|an|the|one|is"]
    pools += [*TRAINING_TEMPLATES, *HELD_OUT_TEMPLATES, *_WITHOUT_BACKGROUND, *_WITHOUT_MOTION]
    for verb in "|".join([MOVE, *OWN_VERBS.values()]).split("|"):
        pools += [_third_person(verb), _participle(verb)]
    return {word for pool in pools for word in re.findall(r"[a-z0-9']+", re.sub(r"{\w+}", " ", pool))}


def _fill(templates: Sequence[str], scene: Scene, rng: np.random.Generator) -> str:
    def one(words: str) -> str:
        options = words.split("|")
        return options[int(rng.integers(len(options)))]

    background = one(COLOUR_WORDS[scene.background])
    speed = one(SPEED_WORDS[scene.speed]) if scene.motion != "still" and rng.random() < 0.4 else ""
    verb, towards = _motion_words(scene.motion, one, rng)
    if scene.motion == "still":
        moves, moving = one(STILL_FINITE), one(STILL_PARTICIPLE)
    else:
        finite = f"is {_participle(verb)}" if rng.random() < 0.3 else _third_person(verb)
        late = [towards, speed] if rng.random() < 0.6 else [speed, towards]
        moves, moving = " ".join([finite, *late]), " ".join([_participle(verb), *late])
    text = templates[int(rng.integers(len(templates)))].format(
        a=one("a|a|a|the|one"),
        size=one(SIZE_WORDS[scene.size]) if rng.random() < 0.5 else "",
        c=one(COLOUR_WORDS[scene.colour]),
        shape=one(SHAPE_WORDS[scene.shape]),
        moves=moves,
        moving=moving,
        bg=one(BACKGROUND).format(b=background),
        b=background,
        opening=one(OPENING),
        style=one(STYLE),
    )
    text = re.sub(r"\s+", " ", text).replace(" ,", ",").replace(" .", ".").strip()
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _motion_words(motion: str, one: Callable[[str], str], rng: np.random.Generator) -> tuple[str, str]:
    """A verb in its infinitive, and where to (empty where the verb says it)."""
    if motion == "still":
        return "", ""
    if motion in OWN_VERBS and rng.random() < 0.3:
        return one(OWN_VERBS[motion]), ""
    return one(MOVE), one(TOWARDS[motion])


def _third_person(verb: str) -> str:
    first, _, rest = verb.partition(" ")
    ending = "es" if first.endswith(("s", "o", "sh", "ch")) else "s"
    first = first[:-1] + "ies" if first in ("fly",) else first + ending
    return f"{first} {rest}".strip()


def _participle(verb: str) -> str:
    first, _, rest = verb.partition(" ")
    if first in ("drop",):
        first += "p"
    first = first[:-1] if first.endswith("e") else first
    return f"{first}ing {rest}".strip()
