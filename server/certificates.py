"""TLS files: keys and certificates in PEM, checked before gRPC sees them, as it names neither file nor fault."""

from __future__ import annotations

import logging
import re
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path

from keysift.engine.errors import InvalidRequest

logger = logging.getLogger(__name__)

KEY, ENCRYPTED, CERTIFICATE = b"PRIVATE KEY-----", b"ENCRYPTED", b"-----BEGIN CERTIFICATE-----"
ONE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
SOON_S = 14 * 86400
"""Time before its end from which a certificate is warned of."""


def read_pair(key_file: Path, certificate_file: Path) -> tuple[bytes, bytes]:
    """Private key and certificate chain. Raises `InvalidRequest` naming the file and the fault."""
    key, chain = read("ssl_keyfile", key_file), read("ssl_certfile", certificate_file)
    _check_kinds(key_file, key, certificate_file, chain)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate_file, key_file, _no_password)
    except ssl.SSLError as error:
        if "KEY_VALUES_MISMATCH" in str(error):
            problem = f"the key of the certificate {str(certificate_file)!r}, got the key of another one"
            raise _fault("ssl_keyfile", key_file, problem) from None
        raise _fault("ssl_certfile", certificate_file, f"a certificate that fits its key ({error.reason})") from None
    except OSError as error:
        raise _fault("ssl_certfile", certificate_file, f"a readable file with its key ({error.strerror})") from None
    if (key, chain) != (read("ssl_keyfile", key_file), read("ssl_certfile", certificate_file)):
        raise _fault("ssl_certfile", certificate_file, "a file that does not change while it is read")
    warn_of_expiry("ssl_certfile", certificate_file, chain)
    return key, chain


def read_authority(field: str, path: Path) -> bytes:
    """Certificates of an authority. Raises `InvalidRequest` naming the file and the fault."""
    found = read(field, path)
    if CERTIFICATE not in found:
        raise _fault(field, path, f"certificates in PEM, got {_description(found)}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise _fault(field, path, f"certificates in PEM ({error.reason})") from None
    warn_of_expiry(field, path, found)
    return found


def read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(field, f"a readable file, got {str(path)!r} ({error.strerror})") from None


def _check_kinds(key_file: Path, key: bytes, certificate_file: Path, chain: bytes) -> None:
    if KEY not in key:
        raise _fault("ssl_keyfile", key_file, f"a private key in PEM, got {_description(key)}")
    if ENCRYPTED in key:
        raise _fault("ssl_keyfile", key_file, "a private key without a password, got an encrypted one")
    if CERTIFICATE not in chain:
        raise _fault("ssl_certfile", certificate_file, f"a certificate in PEM, got {_description(chain)}")


def _description(content: bytes) -> str:
    """Kind of a file's content, for an error that must not show any of it."""
    if CERTIFICATE in content:
        return "a certificate; are ssl_keyfile and ssl_certfile swapped?"
    if KEY in content:
        return "a private key; are ssl_keyfile and ssl_certfile swapped?"
    return "an empty file" if not content.strip() else "something else"


def _no_password() -> str:
    return ""  # else the terminal is asked


def warn_of_expiry(field: str, path: Path, chain: bytes) -> None:
    """Log a warning for a certificate whose time is over, about to be over, or still to come."""
    now = time.time()
    for pem in ONE.findall(chain.decode("ascii", "replace")):
        try:
            begins, ends = validity(ssl.PEM_cert_to_DER_cert(pem))
        except (ValueError, IndexError):
            logger.warning("%s: %s: the time of a certificate cannot be read", field, path)
            continue
        if ends < now:
            logger.warning("%s: %s: a certificate has expired on %s", field, path, _date(ends))
        elif begins > now:
            logger.warning("%s: %s: a certificate is not valid before %s", field, path, _date(begins))
        elif ends < now + SOON_S:
            logger.warning("%s: %s: a certificate expires on %s", field, path, _date(ends))


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def validity(der: bytes) -> tuple[float, float]:
    """First and last second of a certificate (RFC 5280, 4.1): the fourth field of its inner sequence, or the fifth."""
    [certificate] = _elements(der)
    inner = _elements(certificate[1])[0]
    fields = [field for field in _elements(inner[1]) if field[0] != 0xA0]  # the version is optional
    begins, ends = _elements(fields[3][1])
    return _seconds(*begins), _seconds(*ends)


def _elements(der: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element."""
    found, at = [], 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size >= 0x80:
            width = size & 0x7F
            size, at = int.from_bytes(der[at : at + width]), at + width
        found.append((tag, der[at : at + size]))
        at += size
    return found


def _seconds(tag: int, text: bytes) -> float:
    utc_time = 0x17
    form = "%y%m%d%H%M%SZ" if tag == utc_time else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode(), form).replace(tzinfo=UTC).timestamp()


def _fault(field: str, path: Path, problem: str) -> InvalidRequest:
    return InvalidRequest(field, f"{str(path)!r}: {problem}")
