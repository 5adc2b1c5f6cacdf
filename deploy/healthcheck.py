"""Exit 0 when the service in this container is ready; by a socket alone, so that asking costs a few milliseconds."""

import os
import socket
import sys

KEY = (os.environ.get("SERVICE_ADMIN_KEY") or os.environ.get("SERVICE_API_KEY", "")).partition(",")[0].strip()
PORT = int(os.environ.get("SERVICE_PORT") or os.environ.get("PORT") or 8000)

try:
    with socket.create_connection(("127.0.0.1", PORT), timeout=4) as connection:
        field = f"X-API-Key: {KEY}\r\n" if KEY else ""  # with a key, the answer gives the reason
        head = f"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n{field}Connection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
except OSError as error:
    sys.exit(f"no answer on port {PORT}: {error}")
head, _, body = answer.partition(b"\r\n\r\n")
print(body.decode(errors="replace"))  # docker keeps it: `docker inspect` shows why a container is unhealthy
sys.exit(0 if head.split(b" ")[1:2] == [b"200"] else 1)
