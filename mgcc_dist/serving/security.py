"""Who may talk to the server: this page, in a browser of this machine, with the token of this start.

Browsers send requests of any page to 127.0.0.1, so a check of the address is not enough: Host is checked against DNS
rebinding, Origin and Sec-Fetch-Site against requests of other pages, and the token against other users of the machine.
The token is sent in a header, which other pages can't set, and not in a cookie, which all ports share.
"""

import base64
import hashlib
import re
import secrets
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ["127.0.0.1", "localhost"]
API = "/api/"
HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def middleware(token: str, policy: str) -> list[Middleware]:
    """The checks of every request, outermost first."""
    return [Middleware(Guard, token=token, policy=policy), Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]


def content_policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own script and style, and requests to this server."""
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'sha256-{hashes['script']}'",
            f"style-src 'sha256-{hashes['style']}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


class Guard:
    """Middleware that checks Origin and, of requests to the API, where they come from and the token."""

    def __init__(self, app: ASGIApp, token: str, policy: str) -> None:
        self.app = app
        self._token = token
        self._headers = HEADERS | {"content-security-policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        refused = self._refusal(scope)
        await (refused or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Any:
        headers = Headers(scope=scope)
        if headers.get("origin", "") not in ("", f"http://{headers.get('host')}"):
            return JSONResponse({"error": "requests of other pages are refused"}, 403)
        if not scope["path"].startswith(API):
            return None
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return JSONResponse({"error": "requests of other pages are refused"}, 403)
        given = headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, f"Bearer {self._token}".encode()):
            return JSONResponse({"error": "the token is wrong. Open the address that `mgcc serve` printed."}, 401)
        return None
