"""The tags and aliases that Strata sets in MLflow; stable names, which other tools may search by."""

FINGERPRINT = "strata.fingerprint"
RUN_KEY = "strata.run_key"  # given by the home that made the run, to find it again
STAGE = "strata.stage"
CHECKPOINT = "strata.checkpoint"
MODEL_ID = "strata.model_id"
PARENT_MODEL_ID = "strata.parent_model_id"
PARENT_VERSION = "strata.parent_version"
VERDICT = "strata.verdict"
REGRESSION_ACCEPTED = "strata.regression_accepted"  # the reason a person gave

# on the link between a run and a dataset
SOURCE_DIGEST = "strata.digest"
SOURCE_PATH = "strata.path"

CHAMPION = "champion"
CHALLENGER = "challenger"
