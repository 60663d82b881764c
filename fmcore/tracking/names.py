"""The tags and aliases that Strata sets in MLflow; stable names, which other tools may search by."""

FINGERPRINT = "strata.fingerprint"
RUN_KEY = "strata.run_key"  # given by the home that made the run, to find it again
STAGE = "strata.stage"
CHECKPOINT = "strata.checkpoint"
MODEL_ID = "strata.model_id"
PARENT_MODEL_ID = "strata.parent_model_id"
PARENT_VERSION = "strata.parent_version"
VERDICT = "strata.verdict"
ORIGIN = "strata.origin"  # of an imported version: the folder or hub name
ORIGIN_DIGEST = "strata.origin_digest"  # sha256 over its weights, config and tokenizer
LICENCE = "strata.licence"
FLOW_RUN = "strata.flow_run"  # id of the Prefect flow run, the outermost one of a pipeline
REGRESSION_ACCEPTED = "strata.regression_accepted"  # the reason a person gave

# on the link between a run and a dataset
SOURCE_DIGEST = "strata.digest"
SOURCE_PATH = "strata.path"

CHAMPION = "champion"
CHALLENGER = "challenger"
