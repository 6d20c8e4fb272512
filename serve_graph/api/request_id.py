"""The request id: the client's own where it is well formed, else a new one."""

import re
import uuid

REQUEST_ID_HEADER = "X-Request-ID"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_of(sent: str | None) -> str:
    """`sent` where it is 1 to 128 letters, digits, dots, underscores and hyphens; else a new id."""
    return sent if sent is not None and _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
