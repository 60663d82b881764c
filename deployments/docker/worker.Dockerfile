# The worker: Strata itself, which runs the flows.
FROM python:3.11.13-slim-bookworm
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[s3]" \
    && useradd --create-home strata \
    && mkdir /home/strata/.strata && chown strata /home/strata/.strata
USER strata
WORKDIR /home/strata
