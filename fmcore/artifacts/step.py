"""A step's identity: what it would make, known before anything is made."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fmcore.artifacts.files import canonical_json, sha256_text


@dataclass(frozen=True)
class Step:
    """One arrow of the pipeline with all that decides its result.

    kind: the artifact's kind (documents, shards, checkpoint, report, model).
    name: the readable part of the artifact's path; no part of the identity.
    config: the identity part of the step's settings, JSON values only.
    parents: role -> fingerprint of each artifact the step reads.
    code_version: bumped by hand when the step's meaning changes.
    """

    kind: str
    name: str
    config: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    code_version: int = 1

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over (kind, config, the parents' fingerprints, code version)."""
        identity = {
            "kind": self.kind,
            "config": self.config,
            "parents": self.parents,
            "code_version": self.code_version,
        }
        return sha256_text(canonical_json(identity))
