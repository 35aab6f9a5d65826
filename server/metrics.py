"""Prometheus metrics of the server: calls and tokens by tenant, and requests in preparation."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from keysift.engine.request import Finish

from .tenants import Tenant

REQUESTS = Counter("keysift_tenant_requests_total", "Requests that were accepted", ("tenant",))
PROMPT_TOKENS = Counter("keysift_tenant_prompt_tokens_total", "Prompt tokens of finished requests", ("tenant",))
GENERATION_TOKENS = Counter(
    "keysift_tenant_generation_tokens_total", "Generated tokens of finished requests", ("tenant",)
)
REFUSALS = Counter(
    "keysift_tenant_refusals_total", "Calls that ended with an error, by its gRPC status", ("tenant", "status")
)
PREPARING = Gauge("keysift_num_requests_preparing", "Requests that are parsed, tokenised and checked, or wait for it")


def observe_finish(tenant: Tenant, finish: Finish) -> None:
    """Count the tokens of a finished request."""
    PROMPT_TOKENS.labels(tenant.label).inc(finish.usage.prompt_tokens)
    GENERATION_TOKENS.labels(tenant.label).inc(finish.usage.completion_tokens)
