"""A loopback server that behaves as the Hugging Face Hub's API does for an upload; no test may use the real one.

The contract, from the calls of huggingface_hub 2.4 without Xet (HF_HUB_DISABLE_XET=1) and the Git LFS batch API:

- Every call carries `Authorization: Bearer <token>`; else, or with a token that is expired, 401 {"error"}. A token that
  can only read gets 403 from calls that write.
- GET /api/whoami-v2 → {"name", "auth": {"accessToken": {"role": "write" or "read"}}}.
- POST /api/repos/create {"name", "organization", "visibility"} → {"url"}; 409 where it exists.
- GET /api/models/<repo>, and .../revision/main → {"id", "sha", "private"}; 404 with X-Error-Code: RepoNotFound.
- POST /api/validate-yaml {"content"} → {"errors": [], "warnings": []}; 400 where the card's head is no YAML.
- POST /api/models/<repo>/preupload/main {"files": [{"path", "size", "sample"}]} → for each path uploadMode (`regular`
  or `lfs`), shouldIgnore, and the oid of what stands there: git's for a regular file, sha256 for one in LFS.
- POST /<repo>.git/info/lfs/objects/batch {"objects": [{"oid", "size"}]} → for each object what is to be done, `upload`
  and `verify`; nothing where the storage has it.
- PUT <upload>, the body is the file → 200, once it has arrived whole. POST <verify> {"oid", "size"} → 200, or 404.
- POST /api/models/<repo>/commit/main, a JSON object a line (header, file, lfsFile) → {"commitUrl", "commitOid"}; 400
  for an LFS file that was not uploaded. A commit is whole or not at all.
"""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import yaml

LARGE = (".gguf", ".safetensors", ".model")


class HubServer(ThreadingHTTPServer):
    "Its state is in plain attributes. `fails`: (part of a path, status) answered once each; `hold`: a PUT that waits."

    daemon_threads = True

    def __init__(self, token: str = "hf_good", role: str = "write"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.token, self.role, self.repos, self.storage, self.puts, self.fails = token, role, {}, {}, [], []
        self.hold, self.held, self.go = 0, Event(), Event()

    def __enter__(self):
        Thread(target=self.serve_forever, daemon=True, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self.go.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        "A client that died is no error of the server."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, value=None, **headers):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def refused(self) -> bool:
        "Whether the call was answered with an error."
        fail = next((f for f in self.server.fails if f[0] in self.path), None)
        if fail:
            self.server.fails.remove(fail)
            self.answer(fail[1], {"error": "said so"})
        elif self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.server.role == "read" and self.command != "GET":
            self.answer(403, {"error": "You don't have the rights to write"})
        else:
            return False
        return True

    def do_GET(self):
        if self.refused():
            return
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "somebody", "auth": {"accessToken": {"role": self.server.role}}})
        name = self.path.split("?")[0].removeprefix("/api/models/").removesuffix("/revision/main")
        repo = self.server.repos.get(name)
        if not repo:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        self.answer(200, {"id": name, "sha": repo["sha"], "private": repo["private"], "siblings": []})

    def do_PUT(self):
        oid, server = self.path.rpartition("/")[2], self.server
        server.puts.append(oid)
        if server.hold and len(server.puts) == server.hold:
            server.held.set()
            server.go.wait(30)
        body = self.read_body()
        if self.refused():
            return
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "content is not what was announced"})
        server.storage[oid] = body
        self.answer(200)

    def do_POST(self):
        body = self.read_body()
        if self.refused():
            return
        path, server = self.path.split("?")[0], self.server
        if path.endswith("/commit/main"):
            return self.commit(path.split("/")[3:5], body)
        asked = json.loads(body)
        if path == "/api/validate-yaml":
            wrong = problems(asked["content"])
            return self.answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            fresh = {"private": asked.get("visibility") == "private", "sha": "0" * 40, "files": {}, "commits": []}
            known = name in server.repos
            server.repos.setdefault(name, fresh)
            url = {"url": f"{server.endpoint}/{name}"}
            return self.answer(409 if known else 200, url | ({"error": "You already created this"} if known else {}))
        if path.endswith("/preupload/main"):
            files = server.repos["/".join(path.split("/")[3:5])]["files"]
            rows = [{"path": f["path"], "shouldIgnore": False, "oid": oid_of(files.get(f["path"])),
                     "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"} for f in asked["files"]]
            return self.answer(200, {"files": rows})
        if path.endswith("/objects/batch"):
            return self.answer(200, {"transfer": "basic", "objects": [self.instruction(o) for o in asked["objects"]]})
        if path == "/verify":
            return self.answer(200 if asked["oid"] in server.storage else 404, {})
        self.answer(404, {"error": "not found"})

    def instruction(self, asked: dict) -> dict:
        if asked["oid"] in self.server.storage:
            return asked
        url = self.server.endpoint
        upload, verify = f"{url}/storage/{asked['oid']}", f"{url}/verify"
        return asked | {"actions": {"upload": {"href": upload}, "verify": {"href": verify}}}

    def commit(self, name: list[str], body: bytes):
        repo, lines = self.server.repos["/".join(name)], [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                if value["oid"] not in self.server.storage:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = ("lfs", value["oid"])
        repo["files"] |= files
        repo["commits"].append(sorted(files))
        repo["sha"] = hashlib.sha1(body).hexdigest()
        url = f"{self.server.endpoint}/{'/'.join(name)}/commit/{repo['sha']}"
        self.answer(200, {"commitUrl": url, "commitOid": repo["sha"], "hookOutput": ""})


def problems(card: str) -> list[dict]:
    "What is wrong with the head of a card."
    try:
        yaml.safe_load(card.split("---\n")[1] if card.startswith("---\n") else "")
    except yaml.YAMLError as error:
        return [{"message": str(error)}]
    return []


def oid_of(kept) -> str | None:
    "How git and LFS name a content."
    if kept is None or isinstance(kept, tuple):
        return kept and kept[1]
    return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()
