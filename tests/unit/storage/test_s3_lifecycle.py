"""Our lifecycle rule among foreign ones: what goes over the wire. Real servers are in the contract."""

from datetime import timedelta
from xml.etree import ElementTree

import pytest
from minio.credentials.providers import StaticProvider
from s3_servers.http import Request, Response, http_server

from storage.s3_client import S3Client
from storage.s3_lifecycle import ensure_rule
from storage.s3_options import S3Options

FOREIGN = (
    "<Rule><ID>logs</ID><Prefix>logs/</Prefix><Status>Enabled</Status><Expiration><Days>7</Days></Expiration></Rule>",
    "<Rule><ID>big</ID><Filter><And><Prefix>b/</Prefix><ObjectSizeGreaterThan>5</ObjectSizeGreaterThan></And></Filter>"
    "<Status>Enabled</Status><NoncurrentVersionExpiration><NoncurrentDays>3</NoncurrentDays>"
    "<NewerNoncurrentVersions>2</NewerNoncurrentVersions></NoncurrentVersionExpiration></Rule>",
    "<Rule><ID>all</ID><Filter/><Status>Disabled</Status><Expiration><Days>1</Days></Expiration></Rule>",
)


@pytest.mark.parametrize("namespace", ["", ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'])
def test_foreign_rules_go_back_to_the_letter(namespace: str) -> None:
    """The SDK's own classes lose a rule's Prefix, so that it would expire the whole bucket, and fail on the others."""
    rules = f"<LifecycleConfiguration{namespace}>{''.join(FOREIGN)}</LifecycleConfiguration>".encode()
    written: list[bytes] = []

    def answer(request: Request) -> Response:
        if request.method == "PUT":
            written.append(request.body)
            return Response(200)
        return Response(200, {}, rules)

    with http_server(answer) as endpoint:
        options = S3Options(endpoint=endpoint, bucket="clips")
        assert ensure_rule(S3Client(options, StaticProvider("a", "b")), options, timedelta(hours=1))
    root = ElementTree.fromstring(written[0])  # noqa: S314  # ours
    assert root.tag == "{http://s3.amazonaws.com/doc/2006-03-01/}LifecycleConfiguration"
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    sent = [ElementTree.tostring(rule, encoding="unicode").replace("<Filter />", "<Filter/>") for rule in root]
    assert sent[:-1] == list(FOREIGN)
    assert root[-1].findtext("Filter/Prefix") == "clips/"
    assert root[-1].findtext("Expiration/Days") == "1"
