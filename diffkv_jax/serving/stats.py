"""Where an engine stands, in plain numbers."""

from typing import Any

import numpy as np

from diffkv_jax.serving.request import Request
from diffkv_jax.serving.scheduler import Scheduler


def stats(scheduler: Scheduler) -> dict[str, Any]:
    """Requests that came to the scheduler and have not finished, and the pool's pages. Nothing of
    it is asked of the device.
    """
    slots, total = scheduler.slots, scheduler.slots.fixed.spec.num_pages
    found = [_told(slots.requests[i], pages=int(slots.pages[i])) for i in slots.running]
    found += [_told(one.request, read=one.tokens, pages=one.pages) for one in scheduler.reading]
    found += [_told(request, parked=parked.num_pages) for request, parked in scheduler.parked]
    found += [_told(request, read=0) for request in scheduler.waiting]
    pool = {"pages": total, "free": slots.free, "held": total - slots.free}
    return {"requests": sorted(found, key=lambda one: one["number"]), "pool": pool}


def held_by_head(scheduler: Scheduler) -> list[list[float]] | None:
    """Pages of each layer and KV head, [L][K], as a mean over requests that decode; None: there are
    none. Waits for the device.
    """
    slots = scheduler.slots
    if not slots.running or slots.rows is None or slots.rows.tier_len is None:
        return None
    lengths, layout = np.asarray(slots.rows.tier_len)[:, slots.running], slots.fixed.spec.layout
    pages = sum(layout.pages_for(tier, lengths[..., tier]) for tier in range(layout.tiers))
    return np.round(np.mean(pages, axis=1), 2).tolist()


def _told(
    request: Request | None, *, read: int | None = None, pages: int = 0, parked: int = 0
) -> dict[str, Any]:
    assert request is not None
    return {
        "number": request.number,
        "state": request.state,
        "prompt": len(request.prompt),
        "read": len(request.prompt) if read is None else read,
        "generated": len(request.tokens),
        "most": request.max_new_tokens,
        "pages": pages,
        "parked_pages": parked,
        "parks": request.parks,
    }
