"""Whether NetworkPolicies let one pod talk to another: what a network plugin decides, on labels alone.

https://kubernetes.io/docs/concepts/services-networking/network-policies/: a pod that no policy selects is open in
that direction; one that some select may do what any of them allows; and a connection needs both ends' leave.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class End:
    """A pod by its labels and namespace, or an address outside."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = "crab"
    address: str | None = None


def allows(
    policies: Sequence[Policy], source: End, target: End, port: int, protocol: str = "TCP"
) -> bool:
    """Whether a connection is let through."""
    return _lets(policies, "Egress", source, target, port, protocol) and _lets(
        policies, "Ingress", target, source, port, protocol
    )


def _lets(
    policies: Sequence[Policy],
    direction: Literal["Egress", "Ingress"],
    own: End,
    other: End,
    port: int,
    protocol: str,
) -> bool:
    if own.address is not None:
        return True
    of_it = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == own.namespace
        and direction in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], own.labels)
    ]
    if not of_it:
        return True
    key, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return any(
        _meets(rule.get(peers), other, own.namespace) and _port(rule.get("ports"), port, protocol)
        for spec in of_it
        for rule in spec.get(key, ())
    )


def _meets(peers: Sequence[Mapping[str, Any]] | None, other: End, namespace: str) -> bool:
    return peers is None or any(_is(peer, other, namespace) for peer in peers)


def _is(peer: Mapping[str, Any], other: End, namespace: str) -> bool:
    if "ipBlock" in peer:
        if other.address is None:
            return False  # pods are known by their labels here
        address = ipaddress.ip_address(other.address)
        block = peer["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(net) for net in block.get("except", ())
        )
    if other.address is not None:
        return False
    if "namespaceSelector" in peer:
        if not _selects(
            peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}
        ):
            return False
    elif other.namespace != namespace:
        return False
    return _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for name, value in selector.get("matchLabels", {}).items():
        if labels.get(name) != value:
            return False
    for one in selector.get("matchExpressions", ()):
        value, operator = labels.get(one["key"]), one["operator"]
        if operator not in ("Exists", "In"):
            raise NotImplementedError(operator)
        if value is None or (operator == "In" and value not in one["values"]):
            return False
    return True


def _port(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    return ports is None or any(
        one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports
    )
