"""A reverse proxy that serves a server under a path of its own, as an ingress does."""

import http.client
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Prefix:
    """A context manager: `<prefix>/x` on a port of its own answers as `/x` of `target` does; any other path is 404."""

    def __init__(self, target: str, prefix: str) -> None:
        host = urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Pass a request on."""
                if not self.path.startswith(f"{prefix}/"):
                    self.send_error(404)
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(host, timeout=30)
                connection.request(self.command, self.path.removeprefix(prefix), body, dict(self.headers.items()))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in _HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._url = f"http://127.0.0.1:{self._server.server_address[1]}{prefix}/"

    def __enter__(self) -> str:
        """Serve, and return the address that ends in the prefix."""
        self._thread.start()
        return self._url

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
