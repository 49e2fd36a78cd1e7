"""The certificate that a TLS server shows: until when it is valid, and whether clients will take it."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from typing import NamedTuple

_EXPIRED, _NOT_YET = 10, 9
"""OpenSSL's numbers (X509_V_ERR_...) for what its verification found."""


class Certificate(NamedTuple):
    """`days_left` is None when the dates cannot be read; `refusal` is why this machine does not trust it."""

    days_left: float | None
    refusal: str = ""
    fault: str = ""


def read_certificate(host: str, port: int, timeout_seconds: float) -> Certificate:
    """Ask the server for its certificate. What goes wrong is in the result."""
    try:
        shown = ssl.get_server_certificate((host, port), timeout=timeout_seconds)
        days = _days_left(host, port, shown, timeout_seconds)
        return Certificate(days, _refusal(host, port, timeout_seconds))
    except (OSError, ValueError) as error:
        return Certificate(None, fault=str(error) or type(error).__name__)


def _days_left(host: str, port: int, pem: str, timeout_seconds: float) -> float:
    """Days of validity left; at most 0 of one that is not valid now.

    Python tells the dates of verified certificates alone, so this one is trusted for the moment.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=pem)
    try:
        shown = _connect(context, host, port, timeout_seconds)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (_EXPIRED, _NOT_YET):
            return 0.0
        raise
    return (ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()) / 86400


def _refusal(host: str, port: int, timeout_seconds: float) -> str:
    """Why a client of this machine that asks for `host` would refuse it; empty if it would not."""
    try:
        _connect(ssl.create_default_context(), host, port, timeout_seconds)
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return ""


def _connect(context: ssl.SSLContext, host: str, port: int, timeout_seconds: float) -> dict[str, object]:
    with (
        socket.create_connection((host, port), timeout=timeout_seconds) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        return dict(wrapped.getpeercert() or {})


def is_loopback(address: str) -> bool:
    """Whether this address of a machine is reached from nowhere else."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)
