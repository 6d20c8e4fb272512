"""The XML of S3's answers as plain trees. Servers disagree on the namespace, so it is dropped.

The parser is the standard library's, as in the minio SDK; expat bounds the expansion of entities since 2.4.
"""

from typing import Final
from xml.etree import ElementTree

from schemas.errors import StoreUnavailable

NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"
_NO_S3: Final = "what answers is no S3 server"


def parse_xml(body: bytes) -> ElementTree.Element:
    """The root, all names without their namespace. Raises StoreUnavailable for what is no XML."""
    try:
        root = ElementTree.fromstring(body)  # noqa: S314  # see this file's docstring
    except ElementTree.ParseError as error:
        raise StoreUnavailable(_NO_S3) from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def child_text(element: ElementTree.Element, path: str) -> str | None:
    """The text at `path` below the element, stripped; None where there is no such element."""
    text = element.findtext(path)
    return None if text is None else text.strip()


def required_text(element: ElementTree.Element, path: str) -> str:
    """The text at `path` below the element, stripped. Raises StoreUnavailable where there is none."""
    text = child_text(element, path)
    if not text:
        raise StoreUnavailable(_NO_S3)
    return text
