"""Pod Security Standards, level *restricted*, for Linux pods: what of a pod breaks it.

https://kubernetes.io/docs/concepts/security/pod-security-standards/ (baseline and restricted, as of Kubernetes 1.34).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}
_SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_syncookies"),
    *("net.ipv4.ping_group_range", "net.ipv4.ip_unprivileged_port_start"),
}
_SECCOMP = {"RuntimeDefault", "Localhost"}


def violations(spec: dict[str, Any]) -> list[str]:
    """Fields of a pod's spec that the standard does not allow."""
    return [*_of_pod(spec), *_of_containers(spec)]


def _of_pod(spec: dict[str, Any]) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield name
    for volume in spec.get("volumes", ()):
        if strange := set(volume) - {"name"} - _VOLUMES:
            yield f"volumes.{volume['name']}: {', '.join(strange)}"
    context = spec.get("securityContext", {})
    if context.get("runAsUser") == 0:
        yield "securityContext.runAsUser"
    for sysctl in context.get("sysctls", ()):
        if sysctl["name"] not in _SYSCTLS:
            yield f"securityContext.sysctls: {sysctl['name']}"
    if "seccompProfile" in context and context["seccompProfile"]["type"] not in _SECCOMP:
        yield "securityContext.seccompProfile"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "securityContext.windowsOptions"


def _of_containers(spec: dict[str, Any]) -> Iterator[str]:
    pod = spec.get("securityContext", {})
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        for container in spec.get(kind, ()):
            where = f"{kind}.{container['name']}"
            context = container.get("securityContext", {})
            if context.get("privileged"):
                yield f"{where}.privileged"
            if context.get("allowPrivilegeEscalation") is not False:
                yield f"{where}.allowPrivilegeEscalation"
            if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
                yield f"{where}.runAsNonRoot"
            if context.get("runAsUser") == 0:
                yield f"{where}.runAsUser"
            capabilities = context.get("capabilities", {})
            if "ALL" not in capabilities.get("drop", ()):
                yield f"{where}.capabilities.drop"
            if set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
                yield f"{where}.capabilities.add"
            profile = context.get("seccompProfile", pod.get("seccompProfile", {}))
            if profile.get("type") not in _SECCOMP:
                yield f"{where}.seccompProfile"
            if context.get("procMount", "Default") != "Default":
                yield f"{where}.procMount"
            for port in container.get("ports", ()):
                if port.get("hostPort"):
                    yield f"{where}.hostPort"
            for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
                if container.get(probe, {}).get("httpGet", {}).get("host"):
                    yield f"{where}.{probe}.host"
