"""Settings, from flags and environment variables.

Each field, such as `request_timeout`, has a flag `--request-timeout` and a variable `SERVICE_REQUEST_TIMEOUT`. Flags
override the environment, which overrides the defaults. `PORT` is used if `SERVICE_PORT` is not set.
"""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from service.errors import StartError, describe_invalid

Placement = Literal["auto", "inline", "engine"]

MIN_STUCK_SECONDS = 5.0  # that a backend call may take, however short the request timeout is


class Settings(BaseModel):
    """The service's configuration. Changing it requires a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for all interfaces")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    grpc_port: int | None = Field(
        default=None, ge=0, le=65535, description="TCP port for gRPC, which needs the grpc extra; 0 picks a free one"
    )
    models_dir: Path = Field(default=Path("models"), description="models folder, with <name>/<version>/manifest.json")
    model_name: str = Field(default="", description="name of the model, if the models folder itself is one version")
    reload_interval: float = Field(
        default=2.0,
        ge=0,
        le=3600,
        description="seconds within which a change in the models folder is served; 0: only on request",
    )
    workers: int = Field(default=0, ge=0, le=256, description="worker processes; 0: one per CPU core")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="device to run on: auto, cpu, cuda, cuda:N or mps",
    )
    backend: Literal["auto", "onnx", "torchscript", "torch-export", "onnx-int8"] = Field(
        default="auto", description="artifact to run: auto, onnx, torchscript, torch-export or onnx-int8"
    )
    tf32: bool = Field(default=False, description="allow TF32 on NVIDIA GPUs: faster, less precise")
    placement: Placement = Field(
        default="auto",
        description="where models run: in every worker (inline), in one engine process, or by size and speed (auto)",
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="CPU threads per backend call; 0: chosen from the available cores"
    )
    open_timeout: float = Field(
        default=60.0, gt=0, le=3600, description="seconds allowed for opening and checking one version"
    )
    memory_budget: ByteSize = Field(
        default=ByteSize(0),
        ge=0,
        description="memory for open models, such as 500MB; others are opened when asked for; 0: all are open",
    )
    max_batch_size: int = Field(default=64, ge=1, le=65536, description="maximum instances per backend call")
    queue_size: int = Field(default=4096, ge=1, description="maximum queued instances per model and worker")
    request_timeout: float = Field(default=30.0, gt=0, le=3600, description="seconds until a request is answered 504")
    drain_delay: float = Field(
        default=0.0, ge=0, le=300, description="seconds to keep listening after SIGTERM, while reporting not ready"
    )
    shutdown_grace: float = Field(
        default=10.0, gt=0, le=300, description="seconds that requests in flight then have to finish"
    )
    header_timeout: float = Field(
        default=10.0, gt=0, le=300, description="seconds allowed for a request's headers to arrive"
    )
    max_connections: int = Field(default=4096, ge=1, description="maximum open connections per worker; more get 503")
    max_request_bytes: int = Field(default=16 * 2**20, ge=1024, description="maximum request body size, in bytes")
    api_key: str = Field(
        default="", repr=False, description="comma-separated keys, one of which callers must send; empty: no key needed"
    )
    require_signature: str = Field(
        default="",
        description="public key file (PEM) that must verify every version's signature; empty: none needed",
    )
    admin_key: str = Field(
        default="",
        repr=False,
        description="key to load, unload and roll back; empty: only the local command line may",
    )
    tls_cert: str = Field(default="", description="certificate file (PEM) for TLS on the gRPC port; empty: no TLS")
    tls_key: str = Field(default="", description="private key file (PEM) of the certificate")
    allowed_hosts: str = Field(
        default="",
        description="comma-separated host names that requests may use, * for any; empty: any, or on loopback only its "
        "names",
    )
    cors_origin: str = Field(
        default="",
        description="comma-separated origins whose web pages may call the service, * for any; empty: only its own",
    )
    access_log: bool = Field(default=True, description="log every request")
    log_format: Literal["text", "json"] = Field(default="text", description="log format: text or json")

    @property
    def stuck_seconds(self) -> float:
        """Seconds after which a backend call counts as one that never ends."""
        return max(MIN_STUCK_SECONDS, 2 * self.request_timeout)

    @field_validator("grpc_port", mode="before")
    @classmethod
    def _read_blank(cls, value: object) -> object:
        """Take a blank variable, as compose files pass on, for none."""
        return None if value == "" else value

    @field_validator("api_key", "admin_key")
    @classmethod
    def _strip_key(cls, value: str) -> str:
        """Strip whitespace. A key that is set but blank is rejected, as it would turn authentication off."""
        if value and not value.replace(",", "").strip():
            raise ValueError("this key is blank; give one, or leave the setting empty for none")
        return value.strip()


def add_flags(
    parser: argparse.ArgumentParser, names: list[str] | None = None, helps: Mapping[str, str] | None = None
) -> None:
    """Add a flag to a parser for each setting, or for those in `names`; `helps` are other descriptions of some."""
    for name, field in Settings.model_fields.items():
        if names is None or name in names:
            shown = str("" if field.default is None else field.default) or "none"
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                default=None,
                metavar=name.rsplit("_", maxsplit=1)[-1].upper(),
                help=f"{(helps or {}).get(name, field.description)} (default: {shown}; environment: {variable(name)})",
            )


def load_settings(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Combine flags (None if not given), environment and defaults.

    Raises:
        StartError: A value is invalid; the message names the flag or variable it came from.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if "PORT" in environment:
        values["port"], origin["port"] = environment["PORT"], "PORT"
    for name in Settings.model_fields:
        if variable(name) in environment:
            values[name], origin[name] = environment[variable(name)], variable(name)
        if flags.get(name) is not None:
            values[name], origin[name] = flags[name], f"--{name.replace('_', '-')}"
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        reason = describe_invalid(error).partition(": ")[2]
        raise StartError(f"{origin.get(name, name)}={values.get(name)!r}: {reason}") from error


def variable(name: str) -> str:
    """Return the name of a setting's environment variable."""
    return f"SERVICE_{name.upper()}"


def count_cores() -> int:
    """Return the number of CPU cores available: the affinity or the cgroup quota rounded up, whichever is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _cgroup_quota()))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the cgroup's CPU quota in cores, rounded up; a very large number if there is none."""
    v1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    for files in (("cpu.max",), v1):
        try:
            quota, period = " ".join((root / file).read_text() for file in files).split()
            if int(quota) > 0:  # -1 is cgroup v1's "max"
                return math.ceil(int(quota) / int(period))
        except (OSError, ValueError):  # another cgroup version, or "max"
            continue
    return 2**16
