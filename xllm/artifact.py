"""The artifact: a directory with everything ``xllm run`` needs except the checkpoint's weights.

    manifest.json    factors of the key, pieces, schedule, buckets, memory plan, pass records
    graphs/          one readable file per pass and piece, and the lowered graphs as JSON
    report/          the passes side by side, for a browser; timings.json
    weights/         recipe.json, constants.safetensors
    blobs/<sha256>   compiled code

Every file but the report is listed in the manifest with its sha256 and is checked before use.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from xllm.errors import UserError

SCHEMA = 3
TIMINGS = "report/timings.json"


class ArtifactError(UserError, RuntimeError):
    """An artifact that cannot be used; names the file and what to do."""


@dataclass(frozen=True)
class Factor:
    """Something that, when it differs, makes another artifact; with the reason it is listed."""

    value: object
    reason: str


def key_of(factors: dict[str, Factor]) -> str:
    """sha256 over the factors' names and values: the artifact's identity."""
    text = json.dumps({name: f.value for name, f in sorted(factors.items())}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_dir() -> Path:
    """Where artifacts without ``-o`` live: ``$XLLM_CACHE`` or the user's cache directory."""
    base = os.environ.get("XLLM_CACHE")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xllm"
    return Path(base) if base else default


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(manifest: dict) -> str:
    """The manifest's text, with its own digest."""
    body = {name: value for name, value in manifest.items() if name != "digest"}
    text = json.dumps(body, sort_keys=True)
    sealed = body | {"digest": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(sealed, indent=1, sort_keys=True)


def refuse_foreign(destination: Path) -> None:
    """Raise unless ``destination`` is free, empty, or an artifact that may be replaced."""
    if not destination.exists() or Artifact.is_artifact(destination):
        return
    if not destination.is_dir() or any(destination.iterdir()):
        raise ArtifactError(f"{destination} exists and is no artifact; it is left alone, "
                            "name another place with -o")


class ArtifactWriter:
    """Builds an artifact in a directory beside its destination and moves it there when whole."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.path = destination.with_name(f".{destination.name}.{os.getpid()}.part")
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in ("graphs", "report", "weights", "blobs"):
            (self.path / folder).mkdir(parents=True)

    def text(self, name: str, content: str) -> None:
        """Write a text file at ``name``."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def blob(self, file: Path) -> str:
        """Take a file into ``blobs/``; returns its name there."""
        digest = sha256(file)
        shutil.copyfile(file, self.path / "blobs" / digest)
        return f"blobs/{digest}"

    def commit(self, manifest: dict, timings: dict) -> None:
        """Write the manifest and move the artifact to its destination.

        What differs from run to run (the timings, and the report that shows them) is not listed:
        manifest and graphs of two compiles of the same thing are the same to the bit.
        """
        files = {str(f.relative_to(self.path)): sha256(f) for f in sorted(self.path.rglob("*"))
                 if f.is_file() and f.parent.name != "report"}
        self.text(TIMINGS, json.dumps(timings))
        self.text("manifest.json", seal({"schema": SCHEMA, **manifest, "files": files}))
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        refuse_foreign(self.destination)
        aside = self.path.with_suffix(".old")
        if self.destination.exists():
            self.destination.rename(aside)
        try:
            self.path.rename(self.destination)
        except OSError:  # another process put its own, equal artifact there meanwhile
            self.discard()
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.path, ignore_errors=True)


class Artifact:
    """An artifact on disk, opened for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def is_artifact(path: Path) -> bool:
        """Whether a directory looks like one."""
        return (path / "manifest.json").is_file()

    @cached_property
    def manifest(self) -> dict:
        """The manifest; raises :class:`ArtifactError` where it is missing, corrupt or foreign."""
        file = self.path / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
            schema = manifest["schema"]
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.path} is no artifact: it has no manifest.json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{file} is corrupt ({error}); compile again") from error
        if schema != SCHEMA:
            raise ArtifactError(f"{file} has schema {schema}, this version reads {SCHEMA}; "
                                "compile again")
        if json.loads(seal(manifest))["digest"] != manifest.get("digest"):
            raise ArtifactError(f"{file} is corrupt: its digest is wrong; compile again")
        return manifest

    def file(self, name: str) -> Path:
        """A listed file, its content checked against the manifest."""
        expected = self.manifest["files"].get(name)
        file = self.path / name
        if expected is None or not file.is_file():
            raise ArtifactError(f"{self.path} lacks {name}; compile again")
        if sha256(file) != expected:
            raise ArtifactError(f"{file} is corrupt: its sha256 is not the manifest's; "
                                "compile again")
        return file

    def check(self) -> None:
        """Raise :class:`ArtifactError` unless every listed file is there and whole."""
        for name in self.manifest["files"]:
            self.file(name)

    def json(self, name: str) -> object:
        """A listed JSON file, checked and parsed."""
        return json.loads(self.file(name).read_text())

    @cached_property
    def timings(self) -> dict:
        """How long the compile took: ``seconds`` per phase, ``milliseconds`` per pass."""
        try:
            return json.loads((self.path / TIMINGS).read_text())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.path / TIMINGS} is missing or corrupt: {error}") from error

    def factor(self, name: str) -> object:
        """Value of one key factor."""
        return self.manifest["factors"][name]["value"]
