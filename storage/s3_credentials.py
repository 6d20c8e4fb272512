"""Where the keys of an S3 server come from. Nothing here logs, keeps or sends them.

Make a provider in the process that uses it: it must not travel between processes.
"""

import configparser
from typing import Final

from minio.credentials.credentials import Credentials
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    EnvMinioProvider,
    IamAwsProvider,
    MinioClientConfigProvider,
    Provider,
    StaticProvider,
)
from pydantic import SecretStr
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from schemas.errors import StoreUnavailable

_METADATA_TIMEOUT_S: Final = 1.0
"""The metadata service is on the same host; off AWS its address does not answer at all."""

_PROVIDER_ERRORS: Final = (ValueError, KeyError, OSError, HTTPError, configparser.Error)
"""What the SDK's providers raise where there is nothing, or nothing usable."""


def static_credentials(
    access_key: SecretStr, secret_key: SecretStr, session_token: SecretStr | None = None
) -> Provider:
    """Credentials that are known already."""
    token = None if session_token is None else session_token.get_secret_value()
    return StaticProvider(access_key.get_secret_value(), secret_key.get_secret_value(), token)


def found_credentials() -> Provider:
    """The first that there are of `AWS_…`, `MINIO_…`, AWS's file, the MinIO client's file, and the IAM role."""
    metadata = PoolManager(timeout=Timeout(_METADATA_TIMEOUT_S), retries=Retry(0))
    return ChainedProvider(
        [
            EnvAWSProvider(),
            EnvMinioProvider(),
            AWSConfigProvider(),
            MinioClientConfigProvider(),
            IamAwsProvider(http_client=metadata),
        ]
    )


def retrieve(credentials: Provider) -> Credentials:
    """The credentials of this moment. Raises StoreUnavailable when there are none."""
    try:
        return credentials.retrieve()
    except _PROVIDER_ERRORS as error:
        raise StoreUnavailable("the service has no credentials for the object store") from error
