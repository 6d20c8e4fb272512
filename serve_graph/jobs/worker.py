"""What the job service needs of the rest of the graph."""

from collections.abc import AsyncGenerator
from typing import Protocol

from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask
from schemas.health import GeneratorHealth
from schemas.requests import GenerationParameters


class Worker(Protocol):
    """The preprocessor and the generator, as the job service sees them."""

    async def check(self, parameters: GenerationParameters) -> None:
        """Raises PromptTooLong, for either text."""

    async def prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        """Encode both texts."""

    def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        """Render one clip; ends with the `RenderedClip`. Closing the iterator cancels the work."""

    async def health(self) -> GeneratorHealth:
        """Raises WanError when one of the two does not answer in time."""
