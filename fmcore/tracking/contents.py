"""What the run of a stage holds beside its metrics by step: said by the tasks as they end, and by `strata sync`.

Each function logs what one artifact has to tell and returns how much of that was new.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from fmcore.artifacts.types import Checkpoint, Documents, EvalReport, TokenShards
from fmcore.data.prepare import source_rows
from fmcore.evaluation.spec import SAMPLES_FILE
from fmcore.recipes.fields import TaskData, TextData
from fmcore.tracking.plots import plot_training
from fmcore.tracking.runs import StageRun
from fmcore.training.metrics import FILE_NAME as METRICS

NO_COUNTS = ("choices",)  # of documents: how often each response occurs, which evaluation needs


def log_documents(run: StageRun, documents: Documents, data: TextData | TaskData) -> int:
    """The sources with their digests, and what was read, kept, held out and dropped."""
    counts = {what: value for what, value in documents.counts.items() if what not in NO_COUNTS}
    return run.log_sources(source_rows(documents, data)) + run.log_counts(counts)


def log_shards(run: StageRun, shards: TokenShards) -> int:
    """How many tokens there are to train on."""
    return run.log_counts({"train_tokens": shards.num_tokens, **shards.counts})


def log_checkpoint(run: StageRun, checkpoint: Checkpoint) -> int:
    """The training in a few numbers, and its course as pictures."""
    summary = {
        "train/parameters": checkpoint.num_parameters,
        "train/trainable_parameters": checkpoint.num_trainable,
        "train/seconds": checkpoint.train_seconds,
        "train/final_loss": checkpoint.final_loss,
        **{f"train/{name}": value for name, value in checkpoint.figures.items()},
    }
    with TemporaryDirectory() as folder:
        plot_training(checkpoint.path / METRICS, Path(folder))
        return run.log_metrics(summary) + run.log_artifact(Path(folder), "plots")


def log_report(run: StageRun, report: EvalReport) -> int:
    """The scores, and texts and answers of the model."""
    return run.log_metrics(report.metrics) + run.log_artifact(report.path / SAMPLES_FILE, "report")
