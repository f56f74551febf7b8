"""What the job that this process belongs to costs, where `crab submit` has made its pods.

The price an hour of all of its pods stands in a variable of theirs: prices are the profile's, which pods do not have.
"""

from __future__ import annotations

import os
import time

HOUR_VARIABLE, CURRENCY_VARIABLE = "CRAB_COST_HOUR", "CRAB_CURRENCY"
_BEGAN = time.monotonic()


def cost_till_now(since: float = _BEGAN) -> dict[str, float]:
    """{"cost": money since a time of `time.monotonic`}, without the pods' start; empty where there is no price."""
    hour = os.environ.get(HOUR_VARIABLE)
    return {} if hour is None else {"cost": float(hour) * (time.monotonic() - since) / 3600}
