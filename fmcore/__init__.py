"""The library behind Strata: data, tokens, model, training, evaluation, artifacts, tracking. Knows no Prefect."""
