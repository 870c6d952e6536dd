"""A hub on this machine that serves one folder as the model org/tiny, and counts what it serves."""

import json
import threading
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bert_files import COMMIT


@contextmanager
def serve(folder):
    """Yield the hub's address and the list of the files that it has served."""
    served = []
    paths = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802
            name = self.path.partition(f"/resolve/{COMMIT}/")[2]
            if name in paths:
                self.answer(paths[name].read_bytes(), name)
            elif "/tree/" in self.path:
                tree = [{"type": "file", "path": name} for name in paths]
                sizes = [{"size": p.stat().st_size, "oid": oid(p)} for p in paths.values()]
                self.answer([one | size for one, size in zip(tree, sizes, strict=True)])
            elif self.path.startswith("/api/models/org/tiny"):
                self.answer(
                    {
                        "id": "org/tiny",
                        "sha": COMMIT,
                        "siblings": [{"rfilename": name} for name in paths],
                    }
                )
            else:
                self.send_error(404)

        do_GET = do_HEAD  # noqa: N815

        def answer(self, content, name=None):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if name is not None:
                self.send_header("ETag", f'"{oid(paths[name])}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                served.extend([name] if name else [])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", served
    finally:
        server.shutdown()
        server.server_close()


def oid(path):
    return sha1(path.read_bytes()).hexdigest()
