"""What the preprocessor hands to the generator, and what the generator streams back."""

from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import numpy.typing as npt

from schemas.jobs import Progress, RenderedClip
from schemas.requests import GenerationParameters, Priority


@dataclass(frozen=True)
class TextItem:
    """One text to encode. solo: its bits must depend on the text alone, so it shares no forward."""

    text: str
    solo: bool


@dataclass(frozen=True)
class TextEmbedding:
    """The text encoder's rows for the real tokens of one text; padding is the engine's business.

    values: (num_tokens, text_dim); for bfloat16, which numpy lacks, the bits as int16.
    solo: encoded alone, so its bits depend on the text only and a reproducible request may use it.
    """

    values: npt.NDArray[np.generic]
    dtype: Literal["float32", "float16", "bfloat16"]
    solo: bool

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True)
class PreparedPrompt:
    """Both texts of a request, encoded. `negative` is None where guidance is off."""

    positive: TextEmbedding
    negative: TextEmbedding | None


@dataclass(frozen=True)
class Standing:
    """Whose turn a job's is among others, in durations: no two processes share a clock. See `serve_graph.scheduling`.

    waited_s: since its submission. overdue_in_s: until it goes before all that are not overdue; negative once it does.
    deadline_left_s: until the clip is of no use. fair_start: a batch item's place among those of other batches.
    """

    priority: Priority = "normal"
    waited_s: float = 0.0
    overdue_in_s: float = inf
    deadline_left_s: float = inf
    fair_start: float | None = None


@dataclass(frozen=True)
class RenderTask:
    """All that the generator needs for one attempt at one clip."""

    job_id: str
    request_id: str
    clip_key: str
    parameters: GenerationParameters
    standing: Standing = Standing()


@dataclass(frozen=True)
class Started:
    """The job left the engine's queue and holds a slot."""


RenderEvent = Started | Progress | RenderedClip
"""A stream of these ends with the `RenderedClip`, or with an exception of the error tree."""
