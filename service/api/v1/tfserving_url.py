"""The codec of paths with `?format=tfserving`: that of `/v1`, answering as TensorFlow Serving does."""

from service.api.headers import RequestHeaders
from service.api.limits import NO_LIMITS, ReadLimits
from service.api.v1 import decode as v1_decode
from service.api.v1.decode import Call, is_heavy
from service.api.v1.encode import encode
from service.api.v1.tfserving import BY_ROW
from service.model.manifest import AnyManifest

__all__ = ["decode", "encode", "is_heavy"]


def decode(body: bytes, manifest: AnyManifest, headers: RequestHeaders, limits: ReadLimits = NO_LIMITS) -> Call:
    """Do what `service.api.v1.decode.decode` does, for an answer in TensorFlow Serving's form."""
    call = v1_decode.decode(body, manifest, headers, limits)
    return call if call.form else call._replace(form=BY_ROW)
