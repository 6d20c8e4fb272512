"""What `POST /generate?dry_run=true` answers: what a request would take, were it submitted now."""

from pydantic import BaseModel, ConfigDict, Field

from schemas.requests import GenerationParameters


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class EstimatedWork(_Part):
    """The work of one clip, whatever it runs on."""

    steps: int
    forwards: int = Field(description="Of the transformer, over all steps: two per guided step.")
    tokens: int = Field(description="Latent tokens of one forward.")
    teraflop: float | None = Field(
        description="10^12 floating-point operations of the forwards, the decode and the text encoder at its longest "
        "text; null for a model whose dimensions the service does not know."
    )


class DeviceEstimate(_Part):
    """The plan's arithmetic for the service's GPU: an estimate, not a measurement."""

    gpu: str
    memory_total_bytes: int
    peak_memory_bytes: int
    floor_s: float | None = Field(
        description="The operations of all forwards over the card's dense bfloat16 peak, in seconds: no run without a "
        "first-block cache beats it; null for a card whose peak the service does not know."
    )
    expected_s: float | None = Field(description="`floor_s` over `efficiency`.")
    efficiency: float = Field(description="The assumed share of the peak that a real run reaches.")


class Estimate(_Part):
    """The answer of a dry run. Nothing was recorded or begun, and no place in the queue is held."""

    request_id: str
    model: str
    parameters: GenerationParameters = Field(
        description="With every default filled in. A seed that was not given is drawn anew for each request."
    )
    work: EstimatedWork
    seconds: float | None = Field(
        description="Of the device, as the service has learnt from its own jobs; null until one was made, and where "
        "jobs run in other processes."
    )
    position: int | None = Field(description="Jobs that would go first; null where jobs run in other processes.")
    seconds_until_done: float | None = Field(description="Those of the jobs that go first included; null likewise.")
    device: DeviceEstimate | None = Field(description="Null without a GPU, and for a model of unknown dimensions.")
