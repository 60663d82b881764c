"""The home folder: where artifacts, run records, databases and caches live."""

import os
from dataclasses import dataclass
from pathlib import Path

from fmcore.artifacts.store import DIGESTS


@dataclass(frozen=True)
class Workspace:
    """Paths below STRATA_HOME (default `./.strata`)."""

    home: Path

    @classmethod
    def current(cls) -> "Workspace":
        """The home that STRATA_HOME names."""
        return cls(Path(os.environ.get("STRATA_HOME", ".strata")).expanduser().absolute())

    @property
    def runs(self) -> Path:
        """Run records: one JSON file per recipe identity."""
        return self.home / "runs"

    @property
    def digests(self) -> Path:
        """What is remembered of files' sha256s; without it every file is read again."""
        return self.home / DIGESTS

    @property
    def own_tracking_uri(self) -> str:
        """The home's own MLflow database."""
        return f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def tracking_uri(self) -> str:
        """MLFLOW_TRACKING_URI when set, else the home's own database."""
        return os.environ.get("MLFLOW_TRACKING_URI") or self.own_tracking_uri
