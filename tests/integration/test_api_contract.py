"""The API keeps to its OpenAPI document, whatever is asked of it (schemathesis)."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.api.app import make_app
from tests.api_home import Home, filled
from tests.serving import opened_service, token

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
NUM_CASES = {schemathesis.GenerationMode.POSITIVE: 25, schemathesis.GenerationMode.NEGATIVE: 12}
SLOW = "/report"  # seconds to draw
ENDLESS = "/events"  # what they answer is in test_api_stream


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("contract") / "home"
    names = ("testserver",)  # as schemathesis calls the app
    with opened_service(
        folder, requests_per_second=1e6, burst=1_000_000, allowed_hosts=names
    ) as services:
        yield filled(services)


@pytest.fixture(scope="module")
def header(home: Home) -> dict[str, str]:
    return token(home.services, "ann", "submitter")


@pytest.fixture(scope="module")
def schema(home: Home, header: dict[str, str]) -> Any:
    app = make_app(home.services.settings, services=home.services)
    return schemathesis.openapi.from_asgi("/api/v1/openapi.json", app, headers=header)


def operations(schema: Any) -> list[Any]:
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if not operation.path.endswith(ENDLESS)]


@pytest.mark.parametrize("mode", list(NUM_CASES))
def test_every_answer_is_as_documented(
    mode: schemathesis.GenerationMode, schema: Any, home: Home, header: dict[str, str]
) -> None:
    answered: dict[str, set[int]] = {}
    # Ids and their starts as well as what nobody would call a sweep.
    known = st.sampled_from([*home.ids, "warmdown", "later-0", "warmdown-"])

    def check(operation: Any) -> None:
        is_slow = operation.path.endswith(SLOW)
        num_cases = 2 if is_slow else NUM_CASES[mode]
        refs = st.just(home.queued) if is_slow else st.none() | known

        @seed(20_240_601)
        @settings(
            max_examples=num_cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), ref=refs)
        def ask(case: Any, ref: str | None) -> None:
            if ref is not None and "ref" in (case.path_parameters or {}):
                case.path_parameters["ref"] = ref
            answer = case.call(headers=header)
            answered.setdefault(operation.label, set()).add(answer.status_code)
            is_probe = operation.path.endswith("/readyz")  # 503 is what it is for
            checks = [c for c in CHECKS if not (is_probe and c is not_a_server_error)]
            case.validate_response(answer, checks=checks)

        ask()

    for operation in operations(schema):
        with suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked
            check(operation)

    assert len(answered) >= (20 if mode == schemathesis.GenerationMode.POSITIVE else 15)
    if mode == schemathesis.GenerationMode.POSITIVE:
        reads = [label for label in answered if "{ref}" in label and label.startswith("GET")]
        assert all(200 in answered[label] for label in reads), answered


def test_without_a_token_every_route_but_the_probes_says_401(schema: Any) -> None:
    said = {}
    for operation in operations(schema):
        body = {"body": {}} if operation.method == "post" and operation.body else {}
        case = operation.Case(path_parameters={"ref": "warmdown"}, **body)
        said[operation.label] = case.call().status_code

    is_open = {label for label, status in said.items() if status != 401}
    assert is_open == {"GET /api/v1/healthz", "GET /api/v1/readyz"}
