"""Who a request comes from (RFC 6750 bearer tokens), and whether it may do what it asks for."""

import math
import time
from typing import Final

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.types import Scope

from schemas.errors import Forbidden, RateLimited, Unauthorized
from serve_graph.api_keys import NOBODY, ApiKeys, Principal, Role

OPEN_ROUTES: Final = frozenset(
    {
        *("/health/live", "/health/ready"),
        *("/docs", "/docs/oauth2-redirect", "/openapi.json", "/static-offline-docs"),
        "/outputs/{clip_id}/{name}",  # whoever has the signed URL has the clip
    }
)
MONITORING_ROUTES: Final = frozenset({"/health", "/metrics", "/models"})


class Authenticator:
    """Checks keys and their requests per minute. One process's: each ingress replica counts for itself.

    keys: None where nobody is asked for one.
    protect_monitoring: whether health's details and the metrics need a key too.
    """

    def __init__(self, keys: ApiKeys | None, *, protect_monitoring: bool) -> None:
        self._keys = keys
        self._open = OPEN_ROUTES if protect_monitoring else OPEN_ROUTES | {"/health", "/metrics"}
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def asks_on(self, route: str) -> bool:
        """Whether a route, named by its template, needs a key."""
        return self._keys is not None and route not in self._open

    def principal(self, scope: Scope, route: str | None) -> Principal:
        """Who asks. route: the template of the request's route, None where there is none.

        Raises Unauthorized, Forbidden, RateLimited.
        """
        if self._keys is None or route in self._open:
            return NOBODY
        principal = self._presented(self._keys, scope)
        if principal.role is Role.MONITOR and route is not None and route not in MONITORING_ROUTES:
            raise Forbidden
        self._count(principal)
        return principal

    @staticmethod
    def _presented(keys: ApiKeys, scope: Scope) -> Principal:
        given = Headers(scope=scope).getlist("authorization")
        if not given:
            raise Unauthorized
        scheme, _, key = given[0].partition(" ")
        known = keys.principal_of(key.strip())
        if len(given) != 1 or scheme.lower() != "bearer" or known is None:
            raise Unauthorized("this API key is not known here")
        return known

    def _count(self, principal: Principal) -> None:
        if principal.requests_per_minute is None:
            return
        limit = RateLimitItemPerMinute(principal.requests_per_minute)
        if not self._limiter.hit(limit, principal.name):
            free_at = self._limiter.get_window_stats(limit, principal.name).reset_time
            raise RateLimited(principal.requests_per_minute, max(1, math.ceil(free_at - time.time())))
