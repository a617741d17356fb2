"""The environment variables that third-party packages read, set in one place.

Owns what a process must have set before it imports such a package. It imports none of them.
"""

import os

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


def hand_down(variables: dict[str, str]) -> None:
    """Set variables for the processes that this one will start."""
    os.environ.update(variables)


def quiet_mlflow() -> None:
    """Prepare this process for `import mlflow`; a variable that is already set is kept."""
    for name, value in MLFLOW_CLIENT.items():
        os.environ.setdefault(name, value)
