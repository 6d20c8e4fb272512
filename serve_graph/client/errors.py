"""What can go wrong between a client and the service. Knows no HTTP library.

    ClientError
    ├── ApiProblem          the service refused, or the job failed: its problem document
    ├── ServiceUnreachable  nobody answered, or the connection broke
    ├── UnexpectedAnswer    something answered that is not this version of the service
    └── ClipDamaged         the downloaded bytes are not the clip's

No message holds a signed URL's query or an API key.
"""

from schemas.errors import Problem


class ClientError(Exception):
    """The root; its message is one line for a person."""


class ApiProblem(ClientError):
    """A problem document. What did not come with one has the type `about:blank`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)

    @property
    def problem(self) -> Problem:
        return self.args[0]  # type: ignore[no-any-return]  # set by __init__ above

    def __str__(self) -> str:
        return self.problem.detail


class ServiceUnreachable(ClientError):
    """No answer. server: scheme, host and port. reason: what the transport said."""

    def __init__(self, server: str, reason: str) -> None:
        super().__init__(server, reason)

    @property
    def server(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.args[0]} does not answer ({self.args[1]})"


class UnexpectedAnswer(ClientError):
    """An answer that doesn't follow the schemas."""

    def __init__(self, server: str, what: str) -> None:
        super().__init__(server, what)

    def __str__(self) -> str:
        return f"{self.args[0]} answered {self.args[1]}: it is no wan-serve, or one of another version"


class ClipDamaged(ClientError):
    """The store's bytes don't have the size or the SHA-256 that the job recorded."""

    def __init__(self, clip_id: str) -> None:
        super().__init__(clip_id)

    def __str__(self) -> str:
        return f"the store's bytes of {self.args[0]} are not those that were rendered"
