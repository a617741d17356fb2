"""What never leaves the service in clear: tokens, and passwords in addresses."""

import json
import logging
import re
import time

_SECRETS = (
    (re.compile(r"fwy_[A-Za-z0-9_-]{8,}"), "fwy_***"),
    (re.compile(r"(?i)(bearer\s+)[^\s\"',]+"), r"\1***"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^/\s:@]*):[^/\s@]+@"), r"\1:***@"),
)


def redact(text: str) -> str:
    """The text with every token and password in it replaced by asterisks."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


class Redacting(logging.Formatter):
    """JSON lines without secrets: what a record says, and of an error its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        entry = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(entry, default=str))


def log_to_stderr() -> None:
    """Send the service's log to stderr, as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
