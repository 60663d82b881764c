"""How an error of ours ends a task or a flow: in Failed with its message, and nothing more in the run's log."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from prefect.states import Failed, State

from fmcore.errors import Interrupted, StrataError

LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")
ENGINE_LINE = "exited with unexpected exception"


def failing_in_words(body: Callable[..., Any]) -> Callable[..., Any]:
    """End a task or flow in Failed with the message of an error of ours, its log without a traceback.

    Whoever called it directly is handed the error itself. An interruption goes on as it is.
    """

    @wraps(body)
    def call(*given: Any, **named: Any) -> Any | State:
        try:
            return body(*given, **named)
        except Interrupted:
            raise
        except StrataError as error:
            return Failed(message=str(error), data=error)

    return call


class WithoutTracebacks(logging.Filter):
    """Prefect logs the traceback of whatever a run failed with; an error of ours has said all in its message."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop what only announces the traceback; take the traceback off the rest."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if record.exc_info and (error is None or isinstance(error, StrataError)):
            record.exc_info = None
            return ENGINE_LINE not in record.getMessage()
        return True


for _name in LOGGERS:
    logging.getLogger(_name).addFilter(WithoutTracebacks())
