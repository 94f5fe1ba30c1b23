"""An S3-compatible server (moto) on loopback, in a process of its own. For test_object_store.py.

    python s3_server.py

Prints its port. moto looks at If-None-Match and then stores, in several threads; a real store does both at once. So
requests are answered one at a time here. ``PUT /--faults?when=before&status=503&code=SlowDown&count=5&match=records``
makes the next five requests whose method and path contain `match` fail: before they are done, or after (the answer is
lost).
"""

import threading
import urllib.parse

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class QuietHandler(WSGIRequestHandler):
    """Without a line per request."""

    def log(self, type: str, message: str, *args: object) -> None:
        pass


class OneAtATime:
    """A WSGI application that answers one request at a time, and fails when it was told to."""

    def __init__(self) -> None:
        self._answer = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: dict[str, str] = {}
        self._left = 0
        self._failed = 0

    def __call__(self, environ, start_response):
        with self._lock:
            if environ["PATH_INFO"] == "/--faults":
                return self._told(environ, start_response)
            request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
            if self._left and self._faults["match"] in request:
                self._left -= 1
                self._failed += 1
                if self._faults["when"] == "after":
                    b"".join(self._answer(environ, lambda *args: None))
                else:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(f"{self._faults['status']} Fault", [("Content-Type", "application/xml")])
                return [
                    f"<Error><Code>{self._faults['code']}</Code><Message>told to</Message></Error>".encode()
                ]
            return [b"".join(self._answer(environ, start_response))]

    def _told(self, environ, start_response):
        query = dict(urllib.parse.parse_qsl(environ["QUERY_STRING"], keep_blank_values=True))
        answer = f"{self._failed}".encode()
        if environ["REQUEST_METHOD"] == "PUT":
            self._faults, self._left, self._failed = query, int(query["count"]), 0
        start_response("200 OK", [])
        return [answer]


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, OneAtATime(), threaded=True, request_handler=QuietHandler)
    print(server.server_port, flush=True)
    server.serve_forever()
