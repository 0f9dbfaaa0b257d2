"""GET and DELETE /cache: what the tenant who asks has in the latent cache, and no one else's.

Forgetting all takes along the prefixes of texts that the language model has in memory, but for those of live requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.middleware import tenant_of
from service.api.state import Service, service_of
from service.errors import ConflictError, InputError, invalid

router = APIRouter()


@router.get("/cache", summary="What is cached of this tenant's pictures, and what that has saved")
async def stats(client: Request) -> Response:
    tenant = _tenant(client, ["tenant"])
    latents = service_of(client).runtime.latents
    if latents is None:
        return JSONResponse({"enabled": False, "tenant": tenant})
    return JSONResponse({"enabled": True, "tenant": tenant} | await asyncio.to_thread(latents.stats, tenant))


@router.delete("/cache", summary="Forget what this tenant's requests left, of one prompt or of all")
async def purge(client: Request) -> Response:
    tenant = _tenant(client, ["prompt", "tenant"])
    prompt = client.query_params.get("prompt")
    service = service_of(client)
    if prompt is not None and not prompt.strip():
        raise invalid("prompt", prompt, "the prompt to forget; leave it out to forget them all")
    if prompt is None and _is_shared(service):
        raise ConflictError("the cache is shared by all tenants; name the ?prompt= to forget", code="shared_cache")
    latents = service.runtime.latents
    purged = 0 if latents is None else await asyncio.to_thread(latents.purge, tenant, prompt)
    facts = {"tenant": tenant, "purged": purged}
    writer = service.runtime.writer
    if writer is not None and prompt is None:
        facts["prefix_pages"] = await writer.forget(service.runtime.namespace(tenant))
    return JSONResponse(facts)


def _tenant(client: Request, known: Sequence[str]) -> str:
    """Whose cache it is about. A parameter that is not known would be a purge of more than was meant.

    Raises:
        InputError: an unknown parameter, one that is given twice, or a tenant other than the key's.
    """
    names = [name for name, _ in client.query_params.multi_items()]
    for name in names:
        if name not in known:
            shown = name if len(name) <= 80 else name[:80] + "..."
            message = f"{shown}: unknown parameter; the parameters are {', '.join(known)}"
            raise InputError(message, param=shown, code="unknown_field")
        if names.count(name) > 1:
            raise invalid(name, client.query_params.getlist(name), "given once")
    tenant = tenant_of(client)
    if client.query_params.get("tenant", tenant) != tenant:
        raise invalid("tenant", client.query_params["tenant"], f"{tenant}, whose key was sent")
    return tenant


def _is_shared(service: Service) -> bool:
    return service.settings.cache.shared and len(service.settings.server.keys) > 1
