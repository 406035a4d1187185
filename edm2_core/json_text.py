"""JSON of files that others may have written or damaged."""

import json
from typing import Any


def parse_json(text: str | bytes, /) -> Any:
    """As ``json.loads``, which for text nested too deeply raises no ValueError but a RecursionError.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
