"""The network policies, as kubectl renders them: who may talk to whom, and nobody else."""

import copy
from typing import Any

import pytest

from tests.manifests import (
    BUILDS,
    Document,
    allowed,
    allowed_outside,
    matches,
    of_kind,
    pods,
    rendered,
    with_its_stack,
)

every_build = pytest.mark.parametrize("build", BUILDS)
every_policy = pytest.mark.parametrize("policy", ["postgres", "mlflow", "ray", "deny-all"])


@every_build
def test_nobody_talks_to_anybody_but_who_has_to(build: str) -> None:
    documents = with_its_stack(build)
    closed = [
        each["spec"]
        for each in of_kind(documents, "NetworkPolicy")
        if each["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ]
    ray = {(a, b, None) for a in ("ray-head", "ray-worker") for b in ("ray-head", "ray-worker")}

    assert closed, "no policy closes every pod"
    assert allowed(documents) == ray | {
        ("service", "postgres", 5432),
        ("service", "mlflow", 5000),
        ("service", "ray-head", 8265),
        ("mlflow", "postgres", 5432),
    }
    for each in pods(rendered(build)):
        selected = [
            policy
            for policy in of_kind(documents, "NetworkPolicy")
            if policy["spec"]["podSelector"] and matches(policy["spec"]["podSelector"], each.labels)
        ]
        assert selected, f"{each.owner}: closed, and nothing opens it"


@every_build
def test_nobody_outside_is_talked_to_but_who_has_to_be(build: str) -> None:
    dns = "kubernetes.io/metadata.name=kube-system/k8s-app=kube-dns"
    private = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")

    assert allowed_outside(with_its_stack(build)) == {
        ("fairway/proxy=true/*", "service", 7878),
        ("*/app.kubernetes.io/component=kuberay-operator", "ray-head", 8265),
        *((part, dns, 53) for part in ("service", "mlflow", "ray-head", "ray-worker")),
        *(("ray-head", block, port) for block in private for port in (443, 6443)),
    }


@every_policy
@pytest.mark.parametrize(
    ("direction", "rule"),
    [
        ("ingress", {"from": [{"namespaceSelector": {}}]}),
        ("ingress", {"from": [{"namespaceSelector": {}, "podSelector": {}}]}),
        ("egress", {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
    ],
)
def test_a_way_in_or_out_that_is_added_is_seen(
    policy: str, direction: str, rule: dict[str, Any]
) -> None:
    assert allowed_outside(_with(policy, direction, rule)) > allowed_outside(rendered("gpu"))


@every_policy
@pytest.mark.parametrize(
    ("direction", "rule"),
    [
        ("ingress", {"ports": [{"protocol": "TCP", "port": 5432}]}),
        ("ingress", {}),
        ("egress", {"to": []}),
    ],
)
def test_a_rule_that_names_nobody_is_refused_since_it_is_for_everybody(
    policy: str, direction: str, rule: dict[str, Any]
) -> None:
    changed = _with(policy, direction, rule)

    with pytest.raises(AssertionError, match="open to everybody"):
        allowed_outside(changed)
    with pytest.raises(AssertionError, match="open to everybody"):
        allowed(changed)


def _with(name: str, direction: str, rule: dict[str, Any]) -> tuple[Document, ...]:
    """The manifests with one more rule in a policy."""
    documents = copy.deepcopy(rendered("gpu"))
    for each in of_kind(documents, "NetworkPolicy"):
        if each["metadata"]["name"] == name:
            each["spec"].setdefault(direction, []).append(rule)
    assert documents != rendered("gpu")
    return documents
