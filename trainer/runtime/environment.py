"""The environment variables that third-party packages read, set in one place.

Owns what a process must have set before it imports such a package. It imports none of them.
"""

import os
from dataclasses import dataclass
from pathlib import Path

# Source: MLflow 3.17, mlflow/environment_variables.py.
MLFLOW_CLIENT: dict[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # client and server would ask the network for a setting
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to data
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # a long value is an error, not a silent cut
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default blocks a call for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",  # MLflow's GitPython warns where no git is installed
}
MLFLOW_SERVER: dict[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes and 1.6 GB
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
}
# Source: Ray 2.60; Ray and Tune read these once, at import.
RAY_DRIVER: dict[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt is ours to answer
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its records are thrown away
}

# What sums may depend on: how many threads share them, and which kernels their libraries choose.
NUMERICS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_CBWR"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE"),
)

# What only the service needs: its tokens, webhooks and stores, whose addresses may hold passwords.
_SECRET_PREFIXES = ("FAIRWAY_", "MLFLOW_TRACKING_", "PG")
_COMPILED = (
    "TORCHINDUCTOR_CACHE_DIR"  # Source: torch 2.13, torch/_inductor/runtime/cache_dir_utils.py
)
_BUILD = {
    "git_commit": "FAIRWAY_GIT_COMMIT",
    "git_dirty": "FAIRWAY_GIT_DIRTY",
    "git_diff": "FAIRWAY_GIT_DIFF",
    "lock_file": "FAIRWAY_LOCK_FILE",
    "image_digest": "FAIRWAY_IMAGE_DIGEST",
}
"""What an image says of itself; no secret, and a sweep's own process records it."""


@dataclass(frozen=True, slots=True)
class BuildFacts:
    """What the image that this process runs in was built from; all None outside of one.

    git_diff: the path of a file inside it with what its code has over the commit. lock_file: of the
    one that its packages were installed from.
    """

    git_commit: str | None = None
    git_dirty: bool | None = None
    git_diff: str | None = None
    lock_file: str | None = None
    image_digest: str | None = None


def build_facts() -> BuildFacts:
    """Read what the image says of itself. An empty variable tells nothing, and so does a dirty flag
    that is neither true nor false."""
    told = {fact: os.environ.get(name) or None for fact, name in _BUILD.items()}
    dirty = {"1": True, "true": True, "0": False, "false": False}
    flag = dirty.get((told.pop("git_dirty") or "").lower())
    return BuildFacts(git_dirty=flag, **told)


def numerics_variables() -> dict[str, str]:
    """The variables of this process that its sums may depend on."""
    return {name: os.environ[name] for name in NUMERICS if name in os.environ}


def hand_down(variables: dict[str, str]) -> None:
    """Set variables for the processes that this one will start."""
    os.environ.update(variables)


def compiled_in(folder: Path) -> dict[str, str]:
    """The variable that has torch.compile keep its graphs and kernels in `folder`, where other
    processes find them; a place that this process was given is kept."""
    return {_COMPILED: os.environ.get(_COMPILED) or str(folder.absolute())}


def without_secrets() -> dict[str, str]:
    """This process's variables, but for those that a sweep has no use for and must not see."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _BUILD.values()
        or (not name.startswith(_SECRET_PREFIXES) and "DATABASE_URL" not in name)
    }


def and_tracking_uri(uri: str | None) -> dict[str, str]:
    """This process's variables with the address of MLflow, which may hold a password: for a child,
    whose command line everybody can read."""
    return {**os.environ, **({"MLFLOW_TRACKING_URI": uri} if uri else {})}


def tracking_uri() -> str | None:
    """The address of MLflow that this process was given, None without one."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def quiet_mlflow() -> None:
    """Prepare this process for `import mlflow`; a variable that is already set is kept."""
    for name, value in MLFLOW_CLIENT.items():
        os.environ.setdefault(name, value)


def prepare_for_ray() -> None:
    """Prepare this process for `import ray`; a variable that is already set is kept."""
    for name, value in RAY_DRIVER.items():
        os.environ.setdefault(name, value)
    # An address that is given is the one meant; Ray would prefer these over it.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)


def visible_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names by number or uuid, None where it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
