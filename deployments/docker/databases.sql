-- Run once, by the image's entry point, on an empty volume; the database prefect is POSTGRES_DB.
CREATE DATABASE mlflow;
