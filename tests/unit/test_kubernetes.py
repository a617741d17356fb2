"""The Kubernetes manifests, rendered by kubectl and held against each other.

Nothing is started: there is no cluster here. docs/kubernetes.md lists what that leaves unproven.
"""

import copy
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import typer
import yaml

from service.policies import gangs_at_once, what_is_missing
from service.sweep import load_sweep
from tests.manifests import (
    BUILDS,
    CLUSTER_WIDE,
    GPU,
    KUBERNETES,
    OVERLAYS,
    WORKLOADS,
    asked,
    check_restricted,
    check_volume,
    matches,
    names,
    of_kind,
    pods,
    quantity,
    ray_cluster,
    ray_nodes,
    rendered,
    schema,
    secrets,
    with_its_stack,
)

DOCKER = KUBERNETES.parent
BY_DIGEST = re.compile(r"[a-z0-9.-]+(?:/[a-z0-9._-]+)*@(sha256:[0-9a-f]{64})")
CUSTOM = ("RayCluster", "RayJob", "ResourceFlavor", "ClusterQueue", "LocalQueue", "Queue")
SWEEPS = tuple(build for build in BUILDS if build.endswith("/sweep"))
GUIDE = (KUBERNETES.parents[1] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
EVENTUAL = "0" * 64  # the digest that images/kustomization.yaml has until there is one
every_build = pytest.mark.parametrize("build", BUILDS)
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@every_build
def test_a_build_has_each_object_once_and_in_the_one_namespace(build: str) -> None:
    documents = rendered(build)

    named = [(each["kind"], each["metadata"]["name"]) for each in documents]
    assert len(set(named)) == len(named)
    for each in documents:
        if each["kind"] not in CLUSTER_WIDE:
            assert each["metadata"]["namespace"] == "fairway", each["metadata"]["name"]


@every_build
def test_kubernetes_own_kinds_and_every_pod_are_valid_to_the_last_field(build: str) -> None:
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    documents = rendered(build)
    core = [each for each in documents if each["kind"] not in CUSTOM]
    ray = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": each.spec}
        for each in pods(documents)
    ]

    for document in core + ray:
        for version in ("1.29", "1.37"):
            kubernetes_validate.validate(document, version, strict=True)


@every_build
def test_the_custom_kinds_have_only_fields_of_their_definitions(build: str) -> None:
    for document in of_kind(rendered(build), *CUSTOM):
        jsonschema.validate(document, schema(document["kind"]))


def test_a_field_that_ray_does_not_know_is_found() -> None:
    (cluster,) = of_kind(rendered("gpu"), "RayCluster")
    misspelt = copy.deepcopy(cluster)
    misspelt["spec"]["workerGroupSpecs"][0]["maxReplica"] = 2

    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(misspelt, schema("RayCluster"))


@every_overlay
def test_every_service_leads_to_a_port_of_a_pod(overlay: str) -> None:
    documents = rendered(overlay)
    for service in of_kind(documents, "Service"):
        reached = [
            each
            for each in pods(documents)
            if matches({"matchLabels": service["spec"]["selector"]}, each.labels)
        ]
        assert len(reached) == 1, service["metadata"]["name"]
        ports = {p["name"]: p["containerPort"] for p in reached[0].containers[0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


@every_build
def test_whatever_a_pod_refers_to_is_there(build: str) -> None:
    documents = with_its_stack(build)
    keys = {name: set(values) for name, values in secrets().items()}
    for each in pods(rendered(build)):
        assert each.spec["serviceAccountName"] in names(documents, "ServiceAccount"), each.owner
        for volume in each.spec["volumes"]:
            check_volume(volume, documents, keys)
        for container in each.all_containers:
            assert not [one for one in container.get("env", []) if "valueFrom" in one]
    for document in of_kind(documents, "RayCluster", "RayJob"):
        assert "auth_token" in keys[ray_cluster(document)["authOptions"]["secretName"]]


@every_build
def test_mounts_and_volumes_are_the_same_and_files_named_lie_in_them(build: str) -> None:
    for document in of_kind(rendered(build), *WORKLOADS, "RayCluster", "RayJob"):
        claims = document["spec"].get("volumeClaimTemplates", [])
        autoscaler = ray_cluster(document).get("autoscalerOptions", {}).get("volumeMounts", [])
        for each in pods((document,)):
            volumes = {
                one["name"] for one in each.spec["volumes"] + [c["metadata"] for c in claims]
            }
            mounts = [one for c in each.all_containers for one in c["volumeMounts"]]
            beside = autoscaler if each.part == "ray-head" else []
            assert {one["name"] for one in mounts + beside} == volumes, each.owner
            for container in each.all_containers:
                paths = [one["mountPath"] for one in container["volumeMounts"]]
                for variable in container.get("env", []):
                    if variable["name"].endswith(("_FILE", "_PATH")):
                        assert str(Path(variable["value"]).parent) in paths


@every_overlay
def test_addresses_on_command_lines_are_those_of_services(overlay: str) -> None:
    documents = rendered(overlay)
    (cluster,) = of_kind(documents, "RayCluster")
    head = f"{cluster['metadata']['name']}-head-svc"  # how KubeRay calls it
    services = {
        each["metadata"]["name"]: {port["port"] for port in each["spec"]["ports"]}
        for each in of_kind(documents, "Service")
    }
    ports = ray_cluster(cluster)["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    services[head] = {port["containerPort"] for port in ports}

    found = set()
    for each in pods(documents):
        for container in each.all_containers:
            words = container.get("args", []) + [
                variable["value"] for variable in container.get("env", [])
            ]
            for address in (urlsplit(word.split("=", 1)[-1]) for word in words if "://" in word):
                found.add(address.hostname)
                assert (address.port or 5432) in services[str(address.hostname)], address

    assert found == {head, "mlflow", "postgres"}


@every_build
def test_every_container_is_as_the_restricted_profile_wants_it_and_cannot_write(build: str) -> None:
    for document in of_kind(rendered(build), "Namespace"):
        assert document["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for each in pods(rendered(build)):
        assert each.spec["automountServiceAccountToken"] is False, each.owner
        assert each.spec["enableServiceLinks"] is False
        assert each.spec["securityContext"]["runAsUser"] > 0
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(each.spec)
        for volume in each.spec["volumes"]:
            kinds = {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected"}
            assert set(volume) - {"name"} <= kinds
        for container in each.all_containers:
            check_restricted(container["securityContext"])
    for document in of_kind(rendered(build), "RayCluster", "RayJob"):
        cluster = ray_cluster(document)
        if cluster["enableInTreeAutoscaling"]:
            check_restricted(cluster["autoscalerOptions"]["securityContext"])


@every_build
def test_what_stays_is_probed_and_what_runs_has_bounds(build: str) -> None:
    for each in pods(rendered(build)):
        for container in each.containers:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        for container in each.all_containers:
            requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
            assert requests["memory"] == limits["memory"], each.owner
            assert requests.get(GPU) == limits.get(GPU)
            assert quantity(requests["cpu"]) <= quantity(limits["cpu"])


@every_build
def test_images_come_by_digest_and_ray_is_told_its_own(build: str) -> None:
    for each in pods(rendered(build)):
        for container in each.all_containers:
            found = BY_DIGEST.fullmatch(container["image"])
            assert found, container["image"]
            told = [v for v in container.get("env", []) if v["name"] == "FAIRWAY_IMAGE_DIGEST"]
            assert len(told) == (1 if each.part.startswith("ray") else 0)
            assert all(variable["value"] == found[1] for variable in told)
            is_known = not found[1].endswith(EVENTUAL)
            assert is_known == (each.part == "postgres")


@every_overlay
def test_the_service_counts_the_gangs_that_the_cluster_holds(overlay: str, tmp_path: Path) -> None:
    (cluster,) = of_kind(rendered(overlay), "RayCluster")
    resources = _sweep_of(overlay, tmp_path).spec.resources
    args = next(e for e in pods(rendered(overlay)) if e.part == "service").containers[0]["args"]
    budgets = {
        each["metadata"]["name"]: each["spec"]["minAvailable"]
        for each in of_kind(rendered(overlay), "PodDisruptionBudget")
    }
    most = ray_nodes(cluster, most=True)

    assert f"--gangs={gangs_at_once(resources, most)}" in args
    assert budgets == {"ray-head": 1, "ray-worker": len(most)}
    # A sweep is refused where its gang cannot start: one place must be there before it asks.
    assert what_is_missing(resources, ray_nodes(cluster, most=False)) is None


@pytest.mark.parametrize("build", SWEEPS)
def test_a_sweep_of_its_own_has_the_pods_for_one_gang_and_no_more(
    build: str, tmp_path: Path
) -> None:
    (job,) = of_kind(rendered(build), "RayJob")
    resources = _sweep_of(build.removesuffix("/sweep"), tmp_path).spec.resources
    nodes = ray_nodes(job, most=True)

    assert nodes == ray_nodes(job, most=False)
    assert not ray_cluster(job)["enableInTreeAutoscaling"]
    assert what_is_missing(resources, nodes) is None
    assert gangs_at_once(resources, nodes) == 1
    if resources.gpus_per_worker:
        assert sum(node["Resources"]["GPU"] for node in nodes) == resources.workers
    assert not of_kind(rendered(build), "RayCluster")


def _sweep_of(overlay: str, folder: Path) -> Any:
    """The sweep that the overlay's RayJob mounts, as Fairway reads it."""
    (config,) = of_kind(rendered(f"{overlay}/sweep"), "ConfigMap")
    (folder / "sweep.yaml").write_text(config["data"]["sweep.yaml"], encoding="utf-8")
    return load_sweep(folder / "sweep.yaml")


@every_build
def test_fairway_understands_the_command_lines(build: str) -> None:
    from service.cli import app

    lines = [
        container.get("args", []) for each in pods(rendered(build)) for container in each.containers
    ]
    lines += [shlex.split(job["spec"]["entrypoint"]) for job in of_kind(rendered(build), "RayJob")]
    ours = [line[1:] for line in lines if line[:1] == ["fairway"]]

    assert ours
    for verb, *words in ours:
        command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
        command.make_context(verb, words)  # a usage error raises


def test_kueues_queue_is_the_one_named_and_has_quota_for_all_that_may_beasked() -> None:
    documents = with_its_stack("kueue/sweep")
    (queue,), (local,) = of_kind(documents, "ClusterQueue"), of_kind(documents, "LocalQueue")
    (group,) = queue["spec"]["resourceGroups"]
    quota = dict.fromkeys(group["coveredResources"], 0.0)
    for flavor in group["flavors"]:
        assert flavor["name"] in names(documents, "ResourceFlavor")
        assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]
        for each in flavor["resources"]:
            quota[each["name"]] += quantity(each["nominalQuota"])

    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    for asking in of_kind(documents, "RayCluster", "RayJob"):
        labels = asking["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    for kind, amount in asked(documents).items():
        assert amount <= quota[kind], kind


def test_volcanos_queue_is_the_one_named_and_holds_all_that_may_beasked() -> None:
    documents = with_its_stack("volcano/sweep")
    (queue,) = of_kind(documents, "Queue")

    for asking in of_kind(documents, "RayCluster", "RayJob"):
        assert asking["metadata"]["labels"] == {
            "ray.io/scheduler-name": "volcano",
            "volcano.sh/queue-name": queue["metadata"]["name"],
        }
    for kind, amount in asked(documents).items():
        assert amount <= quantity(queue["spec"]["capability"][kind]), kind


def test_secrets_are_made_anew_each_time_and_none_is_in_a_build() -> None:
    first, second = secrets(), secrets()

    assert {build for build in BUILDS if of_kind(rendered(build), "Secret")} == set()
    values = [
        value for made in (first, second) for keys in made.values() for value in keys.values()
    ]
    assert len(set(values)) == len(values)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in values)


def test_the_images_have_what_the_manifests_take_from_them() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    compose = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    home = re.search(r"FAIRWAY_HOME=(\S+)", dockerfile)
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    postgres = re.search(r"postgres:17-bookworm@(sha256:\w+)", compose)

    assert home
    assert postgres
    assert {"service-base", "trainer-base", "trainer-cpu-base"} <= targets
    assert set(re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE)) == {"10001:10001"}
    for each in pods(rendered("gpu")):
        if each.part == "postgres":
            assert each.containers[0]["image"].endswith(postgres[1])
            continue
        assert each.spec["securityContext"]["runAsUser"] == 10001
        if each.part != "mlflow":
            mounted = {one["name"]: one["mountPath"] for one in each.containers[0]["volumeMounts"]}
            assert mounted["home"] == home[1]
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    mounted = compose["services"]["postgres"]["volumes"]
    # Here, for kustomize reads no file outside of its folder.
    roles = "kubernetes/base/postgres-roles.sh"
    assert (DOCKER / roles).is_file()
    assert f"./{roles}:/docker-entrypoint-initdb.d/10-roles.sh:ro" in mounted


def test_the_service_waits_for_its_first_token_and_no_longer(tmp_path: Path) -> None:
    service = next(each for each in pods(rendered("gpu")) if each.part == "service")
    waits = next(c["args"] for c in service.spec["initContainers"] if c["name"] == "first-token")
    path = Path(sys.executable).parent
    (tmp_path / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")  # nobody waits here
    (tmp_path / "sleep").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{path}:/usr/bin:/bin",
        "FAIRWAY_HOME": str(tmp_path / "home"),
    }
    create = [str(path / "fairway"), "token", "create", "ann", "--role", "admin"]

    waiting = subprocess.Popen(
        waits, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert waiting.stderr is not None
        assert "no token yet" in waiting.stderr.readline()
        subprocess.run(create, env=environment, capture_output=True, check=True, timeout=240)
        out, _ = waiting.communicate(timeout=240)
    finally:
        waiting.kill()

    assert (waiting.returncode, out) == (0, "")


def test_what_the_guide_runs_in_a_container_has_the_addresses_that_it_needs() -> None:
    from service.cli import app

    run = r"exec deploy/fairway(?: -c (\S+))? -- +/opt/fairway/entrypoint.sh fairway (.+)"
    found = re.findall(run, GUIDE.replace("\\\n", " "))
    service = next(each for each in pods(rendered("gpu")) if each.part == "service")
    containers = {each["name"]: each for each in service.all_containers}

    assert {line.split()[0] for _, line in found} == {"token", "sync"}
    assert len(found) == GUIDE.count("entrypoint.sh fairway")
    for name, line in found:
        container = containers[name or service.containers[0]["name"]]
        given = {variable["name"] for variable in container["env"]}
        command = typer.main.get_command(app)
        for word in shlex.split(line):
            command = getattr(command, "commands", {}).get(word, command)
        stores = {option.envvar for option in command.params} & {
            "FAIRWAY_DATABASE_URL",
            "MLFLOW_TRACKING_URI",
        }
        assert stores
        assert stores <= given, (line, container["name"])


@pytest.mark.parametrize("build", SWEEPS)
def test_a_job_that_fails_gets_no_second_cluster_to_fail_on(build: str) -> None:
    (job,) = of_kind(rendered(build), "RayJob")

    assert job["spec"]["backoffLimit"] == 0


def test_every_command_of_the_guide_names_a_build_that_exists() -> None:
    folders = re.findall(r"-k (docker/kubernetes/\S+)", GUIDE)

    assert {folder.removeprefix("docker/kubernetes/overlays/") for folder in folders} >= {"gpu"}
    for folder in folders:
        text = (KUBERNETES.parents[1] / folder / "kustomization.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)["kind"] == "Kustomization"
