# Prefect and MLflow servers, in the versions that the worker's client has.
FROM python:3.11.13-slim-bookworm
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt prefect mlflow "fastapi<0.151" psycopg2-binary \
    && useradd --create-home strata \
    && mkdir /artifacts && chown strata /artifacts
USER strata
WORKDIR /home/strata
