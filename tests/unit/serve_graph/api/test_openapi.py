"""The OpenAPI document and the page that shows it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from api_under_test import Api
from openapi_spec_validator import OpenAPIV31SpecValidator

from schemas.errors import PROBLEM_MEDIA_TYPE
from schemas.model_profile import ModelProfile
from schemas.official_profiles import PROFILES
from schemas.requests import GenerateRequest
from serve_graph.api.app import create_api
from serve_graph.api.routes import Service

ASSET = re.compile(r"""(?:src|href|Url|url)\s*[=:]\s*["']([^"']+)["']""")


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    return api.app.openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_openapi_document_is_valid(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


def test_openapi_documents_every_route(document: dict[str, Any]) -> None:
    assert {
        "POST /generate",
        "GET /jobs",
        "GET /jobs/{job_id}",
        "DELETE /jobs/{job_id}",
        "GET /jobs/{job_id}/events",
        "POST /jobs/{job_id}/cancel",
        "POST /batches",
        "GET /batches",
        "GET /batches/{batch_id}",
        "GET /batches/{batch_id}/results",
        "POST /batches/{batch_id}/cancel",
        "GET /outputs/{clip_id}",
        "GET /outputs/{clip_id}/{name}",
        "GET /models",
        "GET /health",
        "GET /health/live",
        "GET /health/ready",
        "GET /metrics",
        "POST /v1/videos",
        "GET /v1/videos",
        "GET /v1/videos/{video_id}",
        "DELETE /v1/videos/{video_id}",
        "GET /v1/videos/{video_id}/content",
    } == {name for name, _ in operations(document)}


def test_openapi_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, operation in operations(document)]

    assert len(ids) == len(set(ids))


def test_openapi_does_not_know_fastapis_own_errors(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in str(document)
    assert "ValidationError" not in document["components"]["schemas"]


def test_openapi_documents_every_error_as_a_problem_and_nothing_else(document: dict[str, Any]) -> None:
    problem = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    openai = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    documented = 0
    for name, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) >= 400 and (name, status) != ("GET /health", "503"):
                assert response["content"] == (openai if "/v1/" in name else problem), (name, status)
                documented += 1
    assert documented > 10


def test_openapi_problem_is_defined(document: dict[str, Any]) -> None:
    assert {"type", "title", "status", "detail", "request_id"} <= document["components"]["schemas"]["Problem"][
        "properties"
    ].keys()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_openapi_examples_are_accepted_by_the_profile_they_are_shown_for(api: Api, profile: ModelProfile) -> None:
    async def no_metrics() -> bytes:
        return b""

    service = Service(api.jobs.service, api.monitor, no_metrics)
    document = create_api(service, profile=profile, metrics=api.jobs.metrics, max_body_bytes=1_000).openapi()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    shown = [example["value"] for example in body["examples"].values()]
    shown += document["components"]["schemas"]["GenerateRequest"]["examples"]

    assert len(body["examples"]) == 3
    for example in shown:
        profile.resolve(GenerateRequest.model_validate(example))


async def test_openapi_document_is_served(api: Api, document: dict[str, Any]) -> None:
    assert (await api.http.get("/openapi.json")).json() == document


async def test_docs_need_no_other_server(api: Api) -> None:
    page = await api.http.get("/docs")

    assert page.status_code == 200
    assets = [asset for asset in ASSET.findall(page.text) if not asset.startswith("data:")]
    assert any(asset.endswith(".js") for asset in assets)
    assert not [asset for asset in assets if asset.startswith(("http:", "https:", "//"))]
    for asset in assets:
        assert (await api.http.get(asset)).status_code == 200, asset
