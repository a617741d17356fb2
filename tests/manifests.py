"""The Kubernetes manifests as kubectl renders them, and what is asked of them again and again."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[1] / "docker" / "kubernetes"
OVERLAYS = ("gpu", "kueue", "volcano", "cpu-small")
BUILDS = tuple(name for overlay in OVERLAYS for name in (overlay, f"{overlay}/sweep"))
GPU = "nvidia.com/gpu"
CLUSTER_WIDE = ("ClusterQueue", "Namespace", "Queue", "ResourceFlavor")
MADE_BY_KUBERNETES = {"kube-root-ca.crt"}
WORKLOADS = ("Deployment", "StatefulSet")
_UNITS = {"m": 1e-3, "": 1.0, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

Document = dict[str, Any]


@dataclass(frozen=True)
class Pods:
    """A pod template, whose it is, and how many pods there are at most."""

    owner: str
    template: Document
    most: int

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def part(self) -> str:
        """What the network policies know it by."""
        return self.labels["app.kubernetes.io/component"]

    @property
    def spec(self) -> Document:
        return self.template["spec"]

    @property
    def containers(self) -> list[Document]:
        """Those that stay."""
        return self.spec["containers"]

    @property
    def all_containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.containers]

    def requests(self) -> dict[str, float]:
        """What its containers reserve together, in units of one."""
        sums: dict[str, float] = {}
        for container in self.containers:
            for kind, amount in container["resources"]["requests"].items():
                sums[kind] = sums.get(kind, 0.0) + quantity(amount)
        return sums


@cache
def rendered(build: str) -> tuple[Document, ...]:
    """The documents of an overlay, `gpu/sweep` for the sweep beside it; skips without kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: the manifests cannot be rendered")
    command = [kubectl, "kustomize", str(KUBERNETES / "overlays" / build)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # a deprecated field is told there
    return tuple(yaml.safe_load_all(done.stdout))


def with_its_stack(build: str) -> tuple[Document, ...]:
    """The documents of a build, and those that have to be there before a sweep."""
    stack = build.removesuffix("/sweep")
    return rendered(stack) if stack == build else (*rendered(stack), *rendered(build))


def of_kind(documents: tuple[Document, ...], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def names(documents: tuple[Document, ...], kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of_kind(documents, kind)}


def pods(documents: tuple[Document, ...]) -> list[Pods]:
    """Every pod that the documents make."""
    return [each for document in documents for each in _pods_of(document)]


def _pods_of(document: Document) -> Iterator[Pods]:
    kind, spec = document["kind"], document.get("spec", {})
    owner = f"{kind}/{document['metadata']['name']}"
    if kind in WORKLOADS:
        yield Pods(owner, spec["template"], spec["replicas"])
    elif kind in ("RayCluster", "RayJob"):
        cluster = ray_cluster(document)
        yield Pods(f"{owner} head", cluster["headGroupSpec"]["template"], 1)
        for group in cluster["workerGroupSpecs"]:
            yield Pods(f"{owner} {group['groupName']}", group["template"], group["maxReplicas"])


def ray_cluster(document: Document) -> Document:
    """The spec of the Ray cluster that a RayCluster or a RayJob describes."""
    spec = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def ray_nodes(document: Document, *, most: bool) -> list[dict[str, Any]]:
    """Its worker nodes as `ray.nodes()` would tell of them: at most, or at least."""
    nodes = []
    for group in ray_cluster(document)["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        resources = {"CPU": quantity(limits["cpu"]), "GPU": quantity(limits.get(GPU, "0"))}
        nodes += [{"Alive": True, "Resources": resources}] * group[
            f"{'max' if most else 'min'}Replicas"
        ]
    return nodes


def secrets() -> dict[str, dict[str, str]]:
    """What `secrets.sh` makes this time: name → key → value."""
    script = [str(KUBERNETES / "secrets.sh")]
    text = subprocess.run(script, capture_output=True, text=True, timeout=10, check=True).stdout
    made = list(yaml.safe_load_all(text))
    assert {(each["kind"], each["metadata"]["namespace"]) for each in made} == {
        ("Secret", "fairway")
    }
    return {each["metadata"]["name"]: each["stringData"] for each in made}


def schema(kind: str) -> Document:
    """The schema of one of the custom kinds."""
    schemas = json.loads((KUBERNETES / "schemas.json").read_text(encoding="utf-8"))
    assert kind in schemas["$defs"], f"{kind}: schemas.json does not know it"
    return {**schemas, "$ref": f"#/$defs/{kind}"}


def quantity(text: str) -> float:
    """An amount of Kubernetes' as a number."""
    number = text.rstrip("KMGTim")
    return float(number) * _UNITS[text[len(number) :]]


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    wanted = selector.get("matchLabels", {}).items()
    if any(labels.get(key) != value for key, value in wanted):
        return False
    for wish in selector.get("matchExpressions", []):
        assert wish["operator"] == "In", wish
        if labels.get(wish["key"]) not in wish["values"]:
            return False
    return True


def allowed(documents: tuple[Document, ...]) -> set[tuple[str, str, int | None]]:
    """Which of our pods may call which on which port, None for all: what both sides allow."""
    parts = {each.part: each.labels for each in pods(documents)}
    policies = [document["spec"] for document in of_kind(documents, "NetworkPolicy")]
    outward: set[tuple[str, str, int | None]] = set()
    inward: set[tuple[str, str, int | None]] = set()
    for policy in policies:
        here = [part for part, labels in parts.items() if matches(policy["podSelector"], labels)]
        for rule in policy.get("egress", []):
            ends = _ends(_peers(rule, "to"), parts)
            outward |= {(a, b, port) for a in here for b in ends for port in _ports(rule)}
        for rule in policy.get("ingress", []):
            ends = _ends(_peers(rule, "from"), parts)
            inward |= {(b, a, port) for a in here for b in ends for port in _ports(rule)}
    return outward & inward


def allowed_outside(documents: tuple[Document, ...]) -> set[tuple[str, str, int | None]]:
    """Who may call whom on which port where one of the two is not ours: a range of addresses, or
    `namespaces/pods` by their labels, * for all."""
    parts = {each.part: each.labels for each in pods(documents)}
    found: set[tuple[str, str, int | None]] = set()
    for policy in (document["spec"] for document in of_kind(documents, "NetworkPolicy")):
        here = [part for part, labels in parts.items() if matches(policy["podSelector"], labels)]
        for rule in policy.get("egress", []):
            others = _outsiders(_peers(rule, "to"))
            found |= {(a, b, port) for a in here for b in others for port in _ports(rule)}
        for rule in policy.get("ingress", []):
            others = _outsiders(_peers(rule, "from"))
            found |= {(b, a, port) for a in here for b in others for port in _ports(rule)}
    return found


def _peers(rule: Document, side: str) -> list[Document]:
    peers = rule.get(side)
    assert peers, f"{rule}: open to everybody, as it has no `{side}`"
    return peers


def _outsiders(peers: list[Document]) -> list[str]:
    return [_named(peer) for peer in peers if set(peer) != {"podSelector"}]


def _named(peer: Document) -> str:
    if "ipBlock" in peer:
        assert set(peer["ipBlock"]) == {"cidr"}, peer
        return peer["ipBlock"]["cidr"]
    selectors = (peer["namespaceSelector"], peer.get("podSelector", {}))
    assert all(set(selector) <= {"matchLabels"} for selector in selectors), peer
    labels = (selector.get("matchLabels", {}).items() for selector in selectors)
    return "/".join(",".join(f"{key}={value}" for key, value in each) or "*" for each in labels)


def _ends(peers: list[Document], parts: dict[str, dict[str, str]]) -> set[str]:
    """The parts that peers without a namespace or an address of their own name."""
    ours = [peer["podSelector"] for peer in peers if set(peer) == {"podSelector"}]
    return {part for part, labels in parts.items() if any(matches(one, labels) for one in ours)}


def _ports(rule: Document) -> list[int | None]:
    assert not [port for port in rule.get("ports", []) if "endPort" in port], rule
    return [port["port"] for port in rule.get("ports", [])] or [None]


def asked(documents: tuple[Document, ...]) -> dict[str, float]:
    """What Ray's pods reserve together when there are as many as there may be."""
    sums: dict[str, float] = {}
    for each in pods(tuple(of_kind(documents, "RayCluster", "RayJob"))):
        for kind, amount in each.requests().items():
            sums[kind] = sums.get(kind, 0.0) + each.most * amount
    return sums


def check_volume(
    volume: Document, documents: tuple[Document, ...], keys: dict[str, set[str]]
) -> None:
    """What a volume refers to is there; `keys`: those of every secret."""
    for source in [volume, *volume.get("projected", {}).get("sources", [])]:
        if claim := source.get("persistentVolumeClaim"):
            assert claim["claimName"] in names(documents, "PersistentVolumeClaim")
        if config := source.get("configMap"):
            assert config["name"] in names(documents, "ConfigMap") | MADE_BY_KUBERNETES
        if secret := source.get("secret"):
            has = keys[secret.get("name") or secret["secretName"]]
            assert {item["key"] for item in secret.get("items", [])} <= has


def check_restricted(context: Document) -> None:
    """A container's security context is the one that all of ours have."""
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
