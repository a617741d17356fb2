"""What a service is started with. Secrets show in no repr."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_PORT = 7878
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Settings:
    """One service on one home.

    slots: gangs that may run at once on the cluster. cluster: the address of its Ray dashboard;
    None runs sweeps on this machine, on `num_cpus` of its CPUs. roots: folders from which a sweep
    may name files. allowed_hosts: further names by which the service is reached.
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    database_url: str | None = field(default=None, repr=False)
    """Without one: service.db in the home."""
    cluster: str | None = None
    slots: int = 1
    num_cpus: int | None = None
    tracking_uri: str | None = field(default=None, repr=False)
    """Without one: the MLflow database in the home."""
    roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    webhooks: tuple[str, ...] = field(default=(), repr=False)
    webhook_secret: str | None = field(default=None, repr=False)
    requests_per_second: float = 50.0
    """What one user, or one address without a token, may ask for on the long run."""
    burst: int = 200
    max_body_bytes: int = 1_000_000

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)

    @property
    def is_private(self) -> bool:
        """Whether the service is meant for this machine alone: bound to it, and known by no name
        under which a proxy might bring others."""
        return self.is_loopback and not self.allowed_hosts


def is_loopback(host: str) -> bool:
    """Whether an address or a name to bind to is this machine's own."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
