"""What a recipe's path is: a local path, an address, or the name of a data set on the Hugging Face hub."""

import re

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")  # `::` chains addresses, as in zip://a.txt::s3://bucket/b.zip
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_url(path: str) -> bool:
    """Whether a path names its protocol, as s3:// and https:// do; it then stays as it is written."""
    return URL.match(path) is not None


def where_credentials_go(address: str) -> str:
    """Where user and password of an address belong, so that nothing that is stored holds them."""
    protocol, _, rest = address.partition("::")[0].partition("://")
    if protocol.lower() in ("http", "https"):
        if "?" in rest and "@" not in rest.partition("?")[0]:
            return "into a request of your own: fetch the file, and name the copy"
        host = rest.rpartition("@")[2].partition("/")[0].partition(":")[0] or "HOST"
        return f"into ~/.netrc (or the file that NETRC names), as `machine {host} login USER password PASSWORD`"
    if protocol.lower() in ("s3", "s3a"):
        return "into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS's own files"
    return "into the environment variables that the storage's driver reads"


def is_hub_name(path: str) -> bool:
    """Whether a path has the form of a data set's name on the hub: `name` or `owner/name`."""
    return HUB_NAME.fullmatch(path) is not None
