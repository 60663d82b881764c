"""Runs, metrics, model registry and lineage in MLflow; the only package that imports mlflow."""

import os

# mlflow reads these when it is imported, so they stand before the first `import mlflow` of any module here.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
