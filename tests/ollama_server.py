"""A loopback server that behaves as Ollama does for registration, because no Ollama can be installed here.

The contract, from Ollama's API documentation (docs/api.md) and what its official client sends:

- GET /api/version → 200 {"version": ...}.
- HEAD /api/blobs/<digest> → 200 where the blob is there, else 404.
- POST /api/blobs/<digest>, the body is the file → 201; 400 where the body has another digest.
- POST /api/create {"model", "files": {name: digest}, "template", "parameters", "stream": false} → 200
  {"status": "success"}; 400 {"error"} where a blob is missing or a template does not parse.
- POST /api/show {"model"} → 200 with template, parameters (a line each), details, model_info; 404 {"error"} else.
- GET /api/tags → 200 {"models": [{"name", "model", "digest", "size", "details"}]}. The digest is that of the model's
  manifest: the same content has the same one.
"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class OllamaServer(ThreadingHTTPServer):
    "Its state is in plain attributes, for tests to look at. `fails`: what the next creations answer."

    daemon_threads = True

    def __init__(self, takes_models: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{self.server_port}"
        self.blobs, self.models, self.uploads, self.fails, self.takes_models = {}, {}, 0, [], takes_models

    def __enter__(self):
        Thread(target=self.serve_forever, daemon=True, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, value=None):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_HEAD(self):
        self.answer(200 if self.path.rpartition("/")[2] in self.server.blobs else 404)

    def do_GET(self):
        if self.path == "/api/version":
            return self.answer(200, {"version": "0.12.0"})
        if self.path == "/api/tags":
            return self.answer(200, {"models": [
                {"name": name, "model": name, "digest": m["digest"], "size": m["size"], "details": {"format": "gguf"}}
                for name, m in self.server.models.items()]})
        self.answer(404, {"error": "not found"})

    def do_POST(self):
        body, server = self.body(), self.server
        if not server.takes_models:
            return self.answer(404, {"error": "not found"})
        if self.path.startswith("/api/blobs/"):
            digest = self.path.rpartition("/")[2]
            if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
                return self.answer(400, {"error": "digest mismatch"})
            server.blobs[digest], server.uploads = len(body), server.uploads + 1
            return self.answer(201)
        asked = json.loads(body)
        if self.path == "/api/show" and asked["model"] in server.models:
            model = server.models[asked["model"]]
            pairs = [(k, v) for k, vs in model["parameters"].items() for v in (vs if isinstance(vs, list) else [vs])]
            lines = "\n".join(f"{key} {json.dumps(value)}" for key, value in pairs)
            return self.answer(200, {"template": model["template"], "parameters": lines, "model_info": {},
                                     "details": {"format": "gguf"}})
        if self.path == "/api/create":
            return self.create(asked)
        self.answer(404, {"error": "not found"})

    def create(self, asked: dict):
        server = self.server
        if server.fails:
            return self.answer(server.fails.pop(0), {"error": "out of disk"})
        missing = [name for name, digest in asked["files"].items() if digest not in server.blobs]
        if missing:
            return self.answer(400, {"error": f"blob of {missing[0]} not found"})
        if asked["template"].count("{{") != asked["template"].count("}}"):
            return self.answer(400, {"error": "template does not parse"})
        kept = {"files": sorted(asked["files"].values())} | {k: asked[k] for k in ("template", "parameters")}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        server.models[asked["model"]] = kept | {"digest": digest, "size": sum(server.blobs[d] for d in kept["files"])}
        self.answer(200, {"status": "success"})
