"""What a recipe's path is: a local path, an address, or the name of a data set on the Hugging Face hub."""

import re

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")  # `::` chains addresses, as in zip://a.txt::s3://bucket/b.zip
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_url(path: str) -> bool:
    """Whether a path names its protocol, as s3:// and https:// do; it then stays as it is written."""
    return URL.match(path) is not None


def is_hub_name(path: str) -> bool:
    """Whether a path has the form of a data set's name on the hub: `name` or `owner/name`."""
    return HUB_NAME.fullmatch(path) is not None
