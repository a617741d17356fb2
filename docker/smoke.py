"""See that a running stack works and is shut: `make smoke`, after `make up`.

Runs the shipped quickstart on the cluster, through the service, and looks for it in MLflow. One
line for each thing that was seen; the first that is not so ends it with exit code 1.
"""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import stack

SWEEP_S = 900.0
PUBLISHED = {"service": "7878/tcp", "mlflow": "5000/tcp"}
WORKERS = ("ray-worker", "ray-worker-gpu")
OVER = ("succeeded", "infeasible", "illegal", "failed", "lost", "cancelled", "stopped")


def main() -> None:
    """Check everything, the sweep last."""
    if not stack.containers("service"):
        sys.exit("smoke: the stack is not running; start it with make up")
    check_doors()
    for service in ("service", "mlflow", "ray-head"):
        check_container(service)
    check_images()
    if any(stack.containers(worker) for worker in WORKERS):
        check_sweep()
    else:
        print("not checked: a sweep, which needs a worker; COMPOSE_PROFILES is cpu or gpu")


def check_doors() -> None:
    """Ready; nobody gets in without a token; nothing inside is reached from outside."""
    code, ready = ask("/readyz")
    require(code == 200, f"the service is ready: {json.dumps(ready)}")
    code, _ = ask("/api/v1/sweeps")
    require(code == 401, f"without a token the service answers {code}")
    code, me = ask("/api/v1/me", token=token())
    require(code == 200 and me["role"] == "admin", f"the token is {me.get('user')}'s")
    for service in ("postgres", "mlflow", "ray-head", *WORKERS, "service"):
        for container in stack.containers(service):
            ports = engine("port", container).splitlines()
            shut = all(port.startswith(f"{PUBLISHED.get(service)} -> 127.0.0.1:") for port in ports)
            require(shut, f"{service} can be reached at: {', '.join(ports) or 'nothing'}")


def check_container(service: str) -> None:
    """An unprivileged user, a root that cannot be written, no capabilities."""
    user = execute(service, "id", "-u")
    require(user == "10001", f"{service} runs as user {user}")
    touched = execute(service, "sh", "-c", "touch /opt/x 2>/dev/null && echo yes || echo no")
    require(touched == "no", f"{service} cannot write its root")
    status = execute(service, "sh", "-c", "grep -E 'CapEff|NoNewPrivs' /proc/self/status")
    words = dict(line.split(":\t") for line in status.splitlines())
    is_bare = int(words["CapEff"], 16) == 0 and words["NoNewPrivs"] == "1"
    require(is_bare, f"{service} has no capability and gets none")


def check_images() -> None:
    """The service has no torch, the cluster has; each runs the image that it says it is."""
    found = execute("service", "python", "-c", FIND.format("torch"))
    require(found == "False", "the service's image has no torch")
    found = execute("ray-head", "python", "-c", FIND.format("torch"))
    require(found == "True", "the cluster's image has torch")
    for service, key in (("service", "FAIRWAY_SERVICE"), ("ray-head", "FAIRWAY_TRAINER")):
        (container,) = stack.containers(service)
        image = engine("inspect", "--format", "{{.Image}}", container)
        # Of an image that was built here the digest is its own; a registry's is its manifest's.
        also = engine("image", "inspect", "--format", "{{.Id}} {{.RepoDigests}}", image)
        digest = stack.setting(f"{key}_DIGEST")
        known = re.findall("[0-9a-f]{64}", f"{image} {also}")
        require(digest.removeprefix("sha256:") in known, f"{service} runs {digest[:19]}")
        told = execute(service, "sh", "-c", 'echo "$FAIRWAY_IMAGE_DIGEST"')
        require(told == digest, f"{service} knows its digest")


FIND = "import importlib.util as u; print(u.find_spec('{}') is not None)"


def check_sweep() -> None:
    """Submit quickstart, wait for its end, find its best, and all of it in MLflow."""
    text = (stack.ROOT / "tune_spaces" / "sweeps" / "quickstart.yaml").read_text(encoding="utf-8")
    body = {"sweep": text, "files": {}, "assignments": []}
    code, sweep = ask("/api/v1/sweeps", body, token())
    require(code in (200, 201, 202), f"quickstart is queued: {sweep.get('id', sweep)}")
    where, deadline = f"/api/v1/sweeps/{sweep['id']}", time.monotonic() + SWEEP_S
    while sweep["state"] not in OVER and time.monotonic() < deadline:
        time.sleep(3)
        _, sweep = ask(where, token=token())
    done = sweep["progress"]
    require(
        sweep["state"] == "succeeded" and done["finals_done"] == done["finals_total"] > 0,
        f"quickstart {sweep['state']} with {done['finals_done']} finals ({sweep['reason']})",
    )
    require(sweep["best"] is not None, f"its best has {sweep['best']['val_bpb']:.4f} bpb")
    finals = 0
    while finals < done["finals_total"] and time.monotonic() < deadline:
        time.sleep(2)
        finals = num_finals_in_mlflow(sweep["id"])
    require(finals == done["finals_total"], f"MLflow has {finals} finals")


def num_finals_in_mlflow(sweep_id: str) -> int:
    """How many finals of a sweep MLflow shows as finished."""
    base = f"http://127.0.0.1:{stack.setting('FAIRWAY_MLFLOW_PORT', '5000')}/api/2.0/mlflow"
    _, found = ask("/experiments/search", {"max_results": 1000}, base=base)
    ids = [each["experiment_id"] for each in found.get("experiments", ())]
    wanted = f"tags.`fairway.sweep` = '{sweep_id}' and tags.`fairway.kind` = 'final'"
    body = {"experiment_ids": ids, "filter": wanted, "max_results": 1000}
    _, found = ask("/runs/search", body, base=base)
    return sum(run["info"]["status"] == "FINISHED" for run in found.get("runs", ()))


def engine(*words: str) -> str:
    """What the engine answers to a question."""
    done = subprocess.run([stack.engine(), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def execute(service: str, *words: str) -> str:
    """What a command prints inside a service's container."""
    return stack.compose("exec", "-T", service, *words, capture=True).strip()


def ask(
    path: str, body: Any = None, token: str | None = None, base: str | None = None
) -> tuple[int, Any]:
    """A request's status and its JSON, refused or not."""
    request = urllib.request.Request(
        f"{base or stack.address()}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {token}"} if token else {}),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def token() -> str:
    """The admin's token."""
    return stack.ADMIN_TOKEN.read_text(encoding="utf-8").strip()


def require(is_so: bool, what: str) -> None:
    """Say what was seen, or end."""
    if not is_so:
        sys.exit(f"smoke: NOT SO: {what}")
    print(f"ok: {what}")


if __name__ == "__main__":
    main()
