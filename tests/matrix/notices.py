"""What transformers and torch complain of while something runs."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


@contextmanager
def deprecations() -> Iterator[set[str]]:
    """Gathers them, whether warned of or logged, also those that are said only once a process."""
    found: set[str] = set()
    logger = transformers_logging.get_logger("transformers")
    for once in ("warning_once", "info_once"):  # 4.23 and later
        getattr(getattr(logger, once, None), "cache_clear", lambda: None)()

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.search("deprecat|will be removed", record.getMessage()):
                found.add(record.getMessage())

    handler, level = Gather(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found |= {str(each.message) for each in caught if issubclass(each.category, DEPRECATIONS)}
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
