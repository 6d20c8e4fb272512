"""Our lifecycle rule of a bucket: clips expire after the retention, abandoned uploads after a day.

The rules of others stay as they are, to the letter: they are kept as XML, since the minio SDK's classes drop what
they don't know (a rule's own `Prefix`, sizes), and a rule without its filter deletes the whole bucket.
"""

import math
from datetime import timedelta
from typing import Final
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from minio.helpers import md5sum_hash

from storage.s3_client import S3Client
from storage.s3_options import S3Options
from storage.s3_xml import NAMESPACE, child_text, parse_xml
from storage.store import ObjectNotFound

CLIPS: Final = "clips/"
"""What every clip's key begins with (`storage.keys`)."""

ABORT_AFTER_DAYS: Final = 1
_LIFECYCLE: Final = {"lifecycle": ""}


def rule_id(options: S3Options) -> str:
    """One rule for each prefix, so that two services can share a bucket."""
    return f"wan-serve {options.prefix}{CLIPS}"


def ensure_rule(client: S3Client, options: S3Options, retention: timedelta) -> bool:
    """Put our rule among the bucket's rules. Returns whether anything had to be written.

    Args:
        client: signs with credentials that may read and write the bucket's lifecycle configuration.
        options: name the prefix, which the rule never leaves.
        retention: how long clips are kept, in whole days; a part of a day counts as one.

    Raises StoreUnavailable, NotSupported.
    """
    rules = _rules(client)
    wanted = _rule(options, max(1, math.ceil(retention / timedelta(days=1))))
    ours = [rule for rule in rules if child_text(rule, "ID") == rule_id(options)]
    if [_meaning(rule) for rule in ours] == [_meaning(wanted)]:
        return False
    root = Element("LifecycleConfiguration", {"xmlns": NAMESPACE})
    root.extend([*(rule for rule in rules if rule not in ours), wanted])
    body = ElementTree.tostring(root)
    client.send("PUT", query=_LIFECYCLE, headers={"Content-MD5": md5sum_hash(body) or ""}, body=body)
    return True


def _rules(client: S3Client) -> list[Element]:
    try:
        return parse_xml(client.send("GET", query=_LIFECYCLE).body).findall("Rule")
    except ObjectNotFound:
        return []


def _rule(options: S3Options, days: int) -> Element:
    rule = Element("Rule")
    SubElement(rule, "ID").text = rule_id(options)
    SubElement(SubElement(rule, "Filter"), "Prefix").text = options.prefix + CLIPS
    SubElement(rule, "Status").text = "Enabled"
    SubElement(SubElement(rule, "Expiration"), "Days").text = str(days)
    abort = SubElement(rule, "AbortIncompleteMultipartUpload")
    SubElement(abort, "DaysAfterInitiation").text = str(ABORT_AFTER_DAYS)
    return rule


def _meaning(rule: Element) -> frozenset[tuple[str, str]]:
    """A rule's leaves by their names, in no order, and without the empty ones that some servers add."""
    leaves = [(leaf.tag, (leaf.text or "").strip()) for leaf in rule.iter() if len(leaf) == 0]
    return frozenset((tag, text) for tag, text in leaves if text)
