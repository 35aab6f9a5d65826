"""Places of requests: the bound that `max_queue` states, over all requests and over those of one tenant."""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from keysift.engine.errors import ResourceExhausted

from .tenants import Tenant

RETRY_S = 1.0


class Places:
    """Count of the requests that are prepared, wait or run, each of which takes a place before any work."""

    def __init__(self) -> None:
        self.room = 0
        self._taken: Counter[str] = Counter()

    def take(self, tenant: Tenant) -> Place:
        """A place. Raises `ResourceExhausted` when there is none, in all or for the tenant."""
        if (taken := self.taken) >= self.room:
            raise ResourceExhausted(
                f"max_queue: {taken} requests are prepared, waiting or running, at most {self.room}", RETRY_S
            )
        if tenant.queue is not None and self._taken[tenant.name] >= tenant.queue:
            raise ResourceExhausted(
                f"queue: {self._taken[tenant.name]} requests of this token, at most {tenant.queue}", RETRY_S
            )
        self._taken[tenant.name] += 1
        return Place(self, tenant)

    @property
    def taken(self) -> int:
        return self._taken.total()

    def give_back(self, tenant: Tenant) -> None:
        self._taken[tenant.name] -= 1


class Place:
    """One place. As a context it is given back at the end, unless the request has become a stream by then."""

    def __init__(self, places: Places, tenant: Tenant) -> None:
        self.tenant = tenant
        self.kept = False
        self._places: Places | None = places

    def release(self) -> None:
        """Give the place back; a second time does nothing."""
        if self._places:
            self._places.give_back(self.tenant)
            self._places = None

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.kept:
            self.release()
