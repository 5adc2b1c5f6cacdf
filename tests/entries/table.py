"""The table: requests of every kind, and the statuses that both entries must answer and log.

What belongs to an HTTP server rather than to this service, such as its answer to a head that is no HTTP, is not in it.
"""

import base64
import gzip
import json

from tests.entries.build import (
    CANVAS,
    CHUNKED,
    CLOSE,
    EXPECT,
    GOOD,
    GZIPPED,
    HEAVY,
    LIMIT,
    NAPPER,
    PREVIEW,
    TENSORS,
    V1,
    V2,
    ask,
    chunk,
    cut,
    draw,
    get,
    leave,
    nap,
    pack_tensor,
    row,
    talk,
)
from tests.entries.observe import GONE, KEY
from tests.entries.steps import Leave, Pause, Read, Row, Write


def build_predictions() -> list[Row]:
    """Return rows of good predictions in every format."""
    picture, (binary, length) = draw(), pack_tensor(1.0, 2.0)
    b64 = json.dumps({"instances": [{"b64": base64.b64encode(picture).decode()}]}).encode()
    form = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f.png"\r\n\r\n%b\r\n--b--\r\n' % picture
    many = json.dumps({"instances": [[0.5]] * 1000}).encode()
    parts = [HEAVY[at : at + 5000] for at in range(0, len(HEAVY), 5000)]
    trace = "traceparent: 00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    return [
        row("v1", ask(V1, GOOD), 200),
        row("v1 with an id and a trace", ask(V1, GOOD, trace, sent_id="mine"), 200),
        row("v1 of a version", ask("/v1/models/doubler/versions/1:predict", GOOD), 200),
        row("v1 of a binary model", ask("/v1/models/coin:predict", b'{"instances": [{"a": 1, "b": 0}]}'), 200),
        row("v1 with a charset", ask(V1, GOOD, kind="application/json; charset=utf-8"), 200),
        row("v1 with a timeout", ask(V1, GOOD, "X-Request-Timeout: 5.5"), 200),
        row("v1 in a long answer", ask(V1, many), 200),
        row("v1 in a compressed answer", ask(V1, many, "Accept-Encoding: gzip"), 200),
        row("v1 of gzip", ask(V1, gzip.compress(GOOD, mtime=0), GZIPPED), 200),
        row("v1 heavy", ask(V1, HEAVY), 200),
        row("v1 of GZIP", ask(V1, gzip.compress(GOOD, mtime=0), "Content-Encoding: GZip"), 200),
        row("v1 of x-gzip", ask(V1, gzip.compress(GOOD, mtime=0), "Content-Encoding: x-gzip, identity"), 200),
        row(
            "v1 of gzip in members",
            ask(V1, b"".join(gzip.compress(part, mtime=0) for part in (GOOD[:9], GOOD[9:])), GZIPPED),
            200,
        ),
        row("v1 in chunks", ask(V1, None, CHUNKED) + chunk(GOOD[:9], GOOD[9:]), 200),
        row("v1 heavy in chunks", ask(V1, None, CHUNKED) + chunk(*parts), 200),
        row("v1 and close", ask(V1, GOOD, CLOSE), 200, 0),
        row("v1 in TensorFlow Serving's form", ask(f"{V1}?format=tfserving", GOOD), 200),
        row("v1 by column", ask(V1, b'{"inputs": {"inputs": [2.5]}}'), 200),
        row("PNG", ask(CANVAS, picture, kind="image/png"), 200),
        row("multipart", ask(CANVAS, form, kind="multipart/form-data; boundary=b"), 200),
        row("base64", ask(CANVAS, b64), 200),
        row("v2", ask(V2, TENSORS), 200),
        row("v2 of a version", ask("/v2/models/doubler/versions/1/infer", TENSORS), 200),
        row("v2 heavy", ask(V2, TENSORS + b" " * 2**18), 200),
        row("v2 binary", ask(V2, binary, length, kind="application/octet-stream"), 200),
    ]


def build_failures() -> list[Row]:
    """Return rows of predictions that are refused or fail once their head has been read."""
    picture, (binary, length) = draw(), pack_tensor(1.0, 2.0)
    bomb = gzip.compress(b" " * (LIMIT + 1), mtime=0)
    too_many = json.dumps({"instances": [[0]] * 5000}).encode()
    running = nap(0.4, sent_id="runs")
    waiting = ask(NAPPER, json.dumps({"instances": [[0]] * 4096}).encode(), sent_id="waits")
    late = (Write(nap(0.3, "X-Request-Timeout: 0.05")), Read())
    full = (Write(running), Pause(0.1), Write(waiting, 1), Read(1), Read())
    return [
        row("v2 binary cut short", ask(V2, binary[:-1], length, kind="application/octet-stream"), 400),
        row("v2 of a wrong shape", ask(V2, TENSORS.replace(b"[1, 1]", b"[1, 2]")), 400),
        row("no JSON", ask(V1, b'{"instances": [[1'), 400),
        row("no body", ask(V1, b""), 400),
        row("wrong values", ask(V1, b'{"instances": [["a"]]}'), 400),
        row("wrong gzip", ask(V1, b"no gzip", GZIPPED), 400),
        row("gzip over the limit", ask(V1, bomb, GZIPPED), 413),
        row("wrong PNG", ask(CANVAS, picture[:60], kind="image/png"), 400),
        row("wrong content type", ask(V1, b"2.0", kind="text/csv"), 415),
        row("picture for numbers", ask(V1, picture, kind="image/png"), 415),
        row("two content codings", ask(V1, gzip.compress(gzip.compress(GOOD)), "Content-Encoding: gzip, gzip"), 415),
        row("a second content coding", ask(V1, GOOD, GZIPPED, "Content-Encoding: br"), 415),
        row("too many values", ask(V1, b'{"instances": [%b[0]]}' % (b"[0], " * 200_000)), 413),
        row("too many values of v2", ask(V2, TENSORS.replace(b"[2.0]", b"[%b2.0]" % (b"0," * 2**18))), 400),
        row("unknown content coding", ask(V1, GOOD, "Content-Encoding: br"), 415),
        row("too many instances", ask(V1, too_many), 413),
        row("a graph that fails", ask("/v1/models/thrower:predict", GOOD, sent_id="fails"), 500),
        row("a timeout that is no number", ask(V1, GOOD, "X-Request-Timeout: soon"), 400),
        Row("an answer that is late", late, (504,), dropped=(("napper", "1", "expired"),)),
        row("a body that is late", ask(V1, None, "Content-Length: 9", "X-Request-Timeout: 0.05"), 504, early=True),
        Row("a full queue", full, (503, 200), (200, 503), (("napper", "1", "full"),)),
    ]


def build_heads() -> list[Row]:
    """Return rows about paths, methods, keys and what else a head says."""
    paths = {
        "/v1/models/%64oubler:predict": 200, "/v1/models/doubler%3Apredict": 200, "/v1/models/doubler:%70redict": 200,
        "/v1/models/doubler%2Fversions%2F1:predict": 200, "/v1/models/doubler/versions/%31:predict": 200,
        "/v2/models/%64oubler/infer": 200, "/%76%32/models/doubler/inf%65r": 200, "/v1/models/%2564oubler:predict": 404,
        "/v1/models/%ff:predict": 404, "/v1/models/%C3%A9:predict": 404, "/v1/models/%0A:predict": 404,
        "/v1/models/doubler:predict?": 200, "/v1/models/doubler:predict?a=1&b=:predict": 200,
        "/v2/models/doubler/infer?%64=/": 200, "http://test/v1/models/doubler:predict": 200,
        "/v1/models/doubler:predict/": 404, "/v2/models/doubler/infer/": 404, "/v1/models/nosuch:predict": 404,
        "/v1/models/doubler/versions/9:predict": 404, "/v1/models/doubler/versions/x:predict": 404,
        "/v2/models/nosuch/infer": 404, "/v1/models/:predict": 404, "/v1/models/doubler:other": 404,
        "/V1/models/doubler:predict": 404,
    }  # fmt: skip
    bearer = f"Authorization: Bearer {KEY}"
    return [
        *[row(f"POST {path}", ask(path, TENSORS if "inf" in path else GOOD), status) for path, status in paths.items()],
        *[row(f"{method} {V1}", ask(V1, None, method=method), 405) for method in ("GET", "OPTIONS")],
        *[row(f"PUT {path}", ask(path, GOOD, method="PUT"), 405) for path in (V1, V2)],
        *[row(f"HEAD {path}", ask(path, None, CLOSE, method="HEAD"), 405, 0) for path in (V1, V2)],
        row("key missing", ask(V1, GOOD, key=""), 401),
        row("key wrong", ask(V1, GOOD, key="wrong"), 401),
        row("key as a bearer", ask(V1, GOOD, bearer, key=""), 200),
        row("key missing for an unknown model", ask("/v1/models/nosuch:predict", GOOD, key=""), 401),
        row("key missing for a list", ask("/v1/models", None, key="", method="GET"), 401),
        row("key missing and close", ask(V1, GOOD, CLOSE, key=""), 401, 0),
    ]


def build_limits() -> list[Row]:
    """Return rows about bodies over the limit and `Expect`."""
    long, head = f"Content-Length: {LIMIT + 1}", ask(V1, None, CHUNKED, EXPECT)
    refusals = {
        "an unknown model": (ask("/v1/models/nosuch:predict", None, EXPECT, "Content-Length: 9"), 404),
        "a wrong key": (ask(V1, None, EXPECT, "Content-Length: 9", key="wrong"), 401),
        "a wrong type": (ask(V1, None, EXPECT, "Content-Length: 9", kind="text/csv"), 415),
        "a body over the limit": (ask(V1, None, EXPECT, long), 413),
        "a wrong method": (ask(V1, None, EXPECT, "Content-Length: 9", method="PUT"), 405),
    }
    over = chunk(*[b" " * 2**16] * (LIMIT // 2**16), b" ")
    return [
        row("a body at the limit", ask(V1, GOOD + b" " * (LIMIT - len(GOOD))), 200),
        row("a body over the limit", ask(V1, b" " * (LIMIT + 1)), 413, early=True),
        row("a body over the limit that does not come", ask(V1, None, long), 413, early=True),
        row("chunks over the limit", ask(V1, None, CHUNKED) + over, 413, early=True),
        row("chunks over the limit of v2", ask(V2, None, CHUNKED) + over, 413, early=True),
        row("a preview over the limit", ask(PREVIEW, b" " * (LIMIT + 1)), 413, early=True),
        talk("Expect", (ask(V1, None, EXPECT, f"Content-Length: {len(GOOD)}"), 100), (GOOD, 200), (ask(V1, GOOD), 200)),
        talk("Expect of v2", (ask(V2, None, EXPECT, f"Content-Length: {len(TENSORS)}"), 100), (TENSORS, 200)),
        talk("Expect before a heavy body", (ask(V1, None, EXPECT, f"Content-Length: {len(HEAVY)}"), 100), (HEAVY, 200)),
        talk("Expect before chunks", (head, 100), (chunk(GOOD), 200), (head, 100), (chunk(GOOD), 200)),
        talk("Expect before a bad body", (ask(V1, None, EXPECT, "Content-Length: 2"), 100), (b"{]", 400)),
        talk("Expect of a preview", (ask(PREVIEW, None, EXPECT, f"Content-Length: {len(GOOD)}"), 100), (GOOD, 200)),
        *[row(f"Expect, {name}", request, status, early=True) for name, (request, status) in refusals.items()],
    ]


def build_operations() -> list[Row]:
    """Return rows of previews, and of what is answered beside predictions."""
    answers = {
        "/v1/models": 200, "/v1/models/doubler": 200, "/v1/models/doubler/versions/1": 200, "/v1/models/nosuch": 404,
        "/v2": 200, "/v2/models": 200, "/v2/models/doubler": 200, "/nosuch": 404,
        "/v2/models/%64oubler/config": 200, "/v1/models/%64oubler": 200, "/v1/models/": 404, "/openapi.json": 200,
        "/v2/repository/index": 405, PREVIEW: 405,
    }  # fmt: skip
    probes = ("/health/live", "/health/ready", "/v2/health/ready", "/v2/models/doubler/ready")
    return [
        *[row(f"GET {path}", get(path), status) for path, status in answers.items()],
        *[row(f"GET {path} without a key", ask(path, None, method="GET", key=""), 200, logged=()) for path in probes],
        *[row(f"{method} /v1/models", ask("/v1/models", b"{}", method=method), 405) for method in ("POST", "DELETE")],
        row("HEAD /v1/models", ask("/v1/models", None, CLOSE, method="HEAD"), 200, 0),
        row("POST /nosuch", ask("/nosuch", GOOD), 404),
        row("the index", ask("/v2/repository/index", b"{}"), 200),
        row("an encoded index", ask("/v2/repositor%79/index", b"{}"), 404),
        row("an encoded change", ask("/v2%2Frepository/models/doubler/unl%6Fad", b""), 404),
        row("a change by a caller", ask("/v2/repository/models/doubler/unload", b""), 401),
        row("an unknown action", ask("/v2/repository/models/doubler/nosuch", b""), 404),
        row("preview", ask(PREVIEW, GOOD), 200),
        row("preview of a version", ask("/v1/models/doubler/versions/1:preview", GOOD), 200),
        row("preview in chunks", ask(PREVIEW, None, CHUNKED) + chunk(GOOD), 200),
        row("preview of a picture", ask("/v1/models/canvas:preview", draw(), kind="image/png"), 200),
        row("preview of a bad body", ask(PREVIEW, b"{}"), 400),
        row("preview of a wrong type", ask(PREVIEW, b"2.0", kind="text/csv"), 415),
        row("preview of an unknown model", ask("/v1/models/nosuch:preview", GOOD), 404),
        row("preview of an encoded name", ask("/v1/models/%64oubler:preview", GOOD), 200),
        row("preview without a key", ask(PREVIEW, GOOD, key=""), 401),
    ]


def build_pipelines() -> list[Row]:
    """Return rows of several requests on one connection, and of requests in parts."""
    light, heavy, bad = ask(V1, GOOD, sent_id="light"), ask(V1, HEAVY, sent_id="heavy"), ask(V1, b"{}", sent_id="bad")
    about, tensors = get("/v1/models/doubler", sent_id="about"), ask(V2, TENSORS, sent_id="tensors")
    chunks = ask(V1, None, CHUNKED, sent_id="chunks") + chunk(GOOD[:9], GOOD[9:])
    gzipped = ask(V1, gzip.compress(GOOD, mtime=0), GZIPPED, sent_id="gzip")
    picture, slow = ask(CANVAS, draw(), kind="image/png", sent_id="picture"), nap(0.2, sent_id="slow")
    encoded, unknown = ask("/v1/models/%64oubler:predict", GOOD), ask("/v1/models/nosuch:predict", GOOD)
    mixed = [heavy, light, picture, tensors, gzipped, about, chunks, heavy, bad, light]
    orders = {
        "two light": [light, tensors], "light, heavy, GET, light": [light, heavy, about, tensors],
        "heavy, light": [heavy, light], "heavy, heavy, picture, light": [heavy, heavy, picture, light],
        "picture, GET, light": [picture, about, light], "GET, light, heavy": [about, light, heavy],
        "chunks, gzip, chunks, heavy, light": [chunks, gzipped, chunks, heavy, light], "slow, light": [slow, light],
    }  # fmt: skip
    return [
        *[row(f"pipeline: {name}", b"".join(order), *[200] * len(order)) for name, order in orders.items()],
        row("pipeline: bad, unknown, encoded, light", bad + unknown + encoded + light, 400, 404, 200, 200),
        row("pipeline: heavy, bad, light and close", heavy + bad + ask(V1, GOOD, CLOSE), 200, 400, 200, 0),
        talk("mixed on one connection", *[(each, 400 if each is bad else 200) for each in mixed]),
        Row("a request in bytes", (*[Write(light[at : at + 1]) for at in range(len(light))], Read()), (200,)),
        cut("cut at every byte", light, 200),
        cut("chunks cut at every byte", chunks, 200),
        cut("a refusal and a prediction cut at every byte", bad + tensors, 400, 200),
    ]


def leave_everywhere() -> Row:
    """Return a row of a client that leaves after each byte of a request but the last; it counts from its body on."""
    request = ask(V1, b'{"instances": [[2.0]], "parameters": {}}', "User-Agent: test", "Accept: */*", sent_id="leaves")
    steps = [step for at in range(1, len(request)) for step in (Write(request[:at], at), Leave(at))]
    return Row("leaves after every byte", tuple(steps), (), (GONE,) * (len(request) - request.index(b"\r\n\r\n") - 4))


def build_leavers() -> list[Row]:
    """Return rows of clients that leave before their answer."""
    known, unknown = ask(V1, GOOD)[:-5], ask("/v1/models/nosuch:predict", GOOD)[:-5]
    expects = (Write(ask(V1, None, EXPECT, "Content-Length: 9")), Read(), Leave())
    second = (Write(ask(V1, GOOD) + known), Read(), Pause(0.05), Leave())
    slow, queued = nap(0.5, sent_id="runs"), nap(0.1, sent_id="waits")
    waits = (Write(slow), Pause(0.1), Write(queued, 1), Pause(0.1), Leave(1), Read())
    return [
        leave_everywhere(),
        leave("leaves in its body", known),
        leave("leaves in its body by a reset", known, reset=True),
        leave("leaves in its body of v2", ask(V2, TENSORS)[:-5]),
        leave("leaves before its body", ask(V1, None, "Content-Length: 9")),
        leave("leaves in a heavy body", ask(V1, HEAVY)[:-5]),
        leave("leaves in a picture", ask(CANVAS, draw(), kind="image/png")[:-5]),
        leave("leaves between chunks", (ask(V1, None, CHUNKED) + chunk(GOOD))[:-5]),
        leave("leaves in its body of a preview", ask(PREVIEW, GOOD)[:-5]),
        leave("leaves while it runs", slow),
        Row("leaves instead of going on", expects, (100,), (GONE,)),
        Row("leaves in its second body", second, (200,), (200, GONE)),
        Row("leaves in its head", (Write(known[:50]), Pause(0.05), Leave()), (), ()),
        Row("leaves after a refusal", (Write(unknown), Read(), Leave()), (404,), early=True),
        Row("leaves the queue", waits, (200,), (200, GONE)),
    ]


TABLE = [
    *build_predictions(),
    *build_failures(),
    *build_heads(),
    *build_limits(),
    *build_operations(),
    *build_pipelines(),
    *build_leavers(),
]
