"""Fill in the HTML templates of this folder; pages hold all of their pictures and open offline."""

import base64
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Return the HTML of the file `template` with `values` filled in and escaped."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.filters |= {"duration": _format_duration, "thousands": _format_thousands}
    return templates.get_template(template).render(**values)


def embed_png(path: Path) -> str:
    """Return the file's bytes as a data URI: unchanged, so the image keeps its colours."""
    return embed(path.read_bytes(), "png")


def embed(content: bytes, kind: str) -> str:
    """Return an image file's bytes as a data URI; `kind` is the subtype of its media type, such as "svg+xml"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def format_time(time: datetime) -> str:
    """Format a time in UTC to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC")


def _format_duration(seconds: float) -> str:
    """Format 1234.5 as 0:20:34."""
    return str(timedelta(seconds=round(seconds)))


def _format_thousands(number: int) -> str:
    return f"{number:,}"
