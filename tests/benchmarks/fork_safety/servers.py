"""Servers for the clients: each answers with the address that the client has."""

import collections
import contextlib
import socketserver
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fork_safety import uses

#: How often something was sent to a path.
_arrived: collections.Counter[str] = collections.Counter()


class _HTTP(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        prefix, _, path = self.path.partition("/arrived")
        self._answer(str(_arrived[path]) if not prefix and path else str(self.client_address))

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _arrived[self.path] += 1
        self._answer("")

    def _answer(self, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


class _Mongo(socketserver.BaseRequestHandler):
    """As much of MongoDB's wire protocol as ``hello`` and ``ping`` take."""

    def handle(self) -> None:
        import bson

        with contextlib.suppress(ConnectionError, struct.error):
            while header := self.request.recv(16, 0x100):  # MSG_WAITALL
                length, request_id, _, opcode = struct.unpack("<iiii", header)
                self.request.recv(length - 16, 0x100)
                document = bson.encode(
                    {
                        "ok": 1,
                        "isWritablePrimary": True,
                        "ismaster": True,
                        "helloOk": True,
                        "maxWireVersion": 21,
                        "minWireVersion": 0,
                        "maxBsonObjectSize": 1 << 24,
                        "maxMessageSizeBytes": 48_000_000,
                        "maxWriteBatchSize": 100_000,
                        "peer": str(self.client_address),
                    }
                )
                if opcode == 2004:  # OP_QUERY, which is answered by OP_REPLY
                    body = struct.pack("<iqii", 8, 0, 0, 1) + document
                    reply = 1
                else:
                    body = struct.pack("<iB", 0, 0) + document
                    reply = 2013
                head = struct.pack("<iiii", 16 + len(body), 1, request_id, reply)
                self.request.sendall(head + body)


class _Threaded(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@contextlib.contextmanager
def serving() -> Iterator[dict[str, str]]:
    """Start all for which the library is here; yield the variables that say where they are."""
    found = {}
    with contextlib.ExitStack() as stack:
        for variable, server, prefix in (
            (uses.HTTP, ThreadingHTTPServer(("127.0.0.1", 0), _HTTP), "http"),
            (uses.MONGO, _Threaded(("127.0.0.1", 0), _Mongo), "mongodb"),
        ):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            found[variable] = f"{prefix}://127.0.0.1:{server.server_address[1]}"
        if uses.version("grpc"):
            found[uses.GRPC] = stack.enter_context(_grpc())
        yield found


@contextlib.contextmanager
def _grpc() -> Iterator[str]:
    import grpc

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.peer().encode())

    server = grpc.server(ThreadPoolExecutor(4), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)
