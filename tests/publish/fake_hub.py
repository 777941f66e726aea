"""A server that behaves like Hugging Face's hub, as far as huggingface_hub needs it to publish a model and `datasets`
to stream a dataset.

    python fake_hub.py FOLDER

It prints its port. FOLDER/models/OWNER/NAME/ gets what is published, FOLDER/datasets/OWNER/NAME/ is what can be read.
The token is "good", "reader" (which may not write) or "colleague" (which may not write to `lab`). Names make trouble:
`silent` is never answered, of `stuck` all but the files is, `taken` belongs to somebody who hides it, `secret` wants
another token, `gated` wants its terms accepted, `broken` loses the connection while a file is uploaded, `full` refuses
the upload, `invisible` is gone when it is committed.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ACCOUNTS = {
    "good": {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}},
    "reader": {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "read"}}},
    "colleague": {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "fineGrained"}}},
}


class Server(BaseHTTPRequestHandler):
    """What the fake hubs have in common: requests reach `answer`, which calls `send`."""

    protocol_version = "HTTP/1.1"
    folder: Path
    objects: dict[str, bytes] = {}  # large files, by SHA-256
    no_space: dict  # how the hub says so

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(b"")

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        trouble = urlsplit(self.path).path.rpartition("/")[2]
        if trouble == "broken":
            return self.hang_up()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if trouble == "full":
            return self.send(self.no_space, 413)
        self.objects[hashlib.sha256(content).hexdigest()] = content
        self.send({})

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def send(self, content, status: int = 200, headers: dict | None = None) -> None:
        """Answer with bytes, or with what becomes JSON."""
        headers = {"Content-Type": "application/json"} | (headers or {})
        if isinstance(content, dict) and "error" in content:
            headers["X-Error-Message"] = content["error"]
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def hang_up(self) -> None:
        """Close the connection while a file is being sent."""
        self.rfile.read(10)
        self.connection.close()
        self.close_connection = True


class Hub(Server):
    """Answers one connection."""

    private: dict[str, bool] = {}  # by repository
    no_space = {"error": "no space"}

    def answer(self, body: bytes) -> None:
        """Find out what a request is about, and answer it."""
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            account = ACCOUNTS.get(self.token)
            return self.send(account) if account else self.send({"error": "Invalid credentials"}, 401)
        if path == "/api/validate-yaml":
            bad = "license: nonsense" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of the known ones'}] if bad else []
            return self.send({"errors": errors, "warnings": []}, 400 if bad else 200)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/verify/\w+", path):
            return self.send({})
        if found := re.fullmatch(r"/(\w+/[\w-]+)\.git/info/lfs/objects/batch", path):
            return self.batch(found[1].partition("/")[2], json.loads(body))
        if found := re.fullmatch(r"/api/(models|datasets)/(\w+/[\w-]+)(/.*)?", path):
            return self.about(found[1], found[2], found[3] or "", body)
        if found := re.fullmatch(r"/datasets/(\w+/[\w-]+)/resolve/\w+/(.+)", path):
            if found[1] == "me/stuck":
                threading.Event().wait()
            return self.file(self.folder / "datasets" / found[1] / found[2])
        self.send({"error": f"nothing at {path}"}, 404)

    def create(self, asked: dict) -> None:
        owner, name = asked.get("organization") or "me", asked["name"]
        if name == "taken":
            return self.send({"error": "You already created this model repo"}, 409)
        if owner == "lab" and self.token == "colleague":
            return self.send({"error": "You don't have the rights to create a model under the namespace"}, 403)
        repository = f"{owner}/{name}"
        self.private[repository] = asked.get("visibility") == "private" or asked.get("private") is True
        (self.folder / "models" / repository).mkdir(parents=True)
        self.send({"url": f"{self.url}/{repository}", "name": repository})

    def about(self, kind: str, repository: str, rest: str, body: bytes) -> None:
        name, folder = repository.partition("/")[2], self.folder / kind / repository
        if name == "silent":
            threading.Event().wait()
        if name == "gated":
            return self.send({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        if name == "secret":
            return self.send({"error": "Invalid username or password."}, 401)
        if not folder.is_dir() or (name == "invisible" and rest.startswith("/commit")):
            return self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest.startswith("/preupload"):
            large = [file["path"] for file in json.loads(body)["files"] if file["path"].endswith(".safetensors")]
            modes = {file["path"]: "regular" for file in json.loads(body)["files"]} | dict.fromkeys(large, "lfs")
            answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.send({"files": answer})
        if rest.startswith("/commit"):
            return self.commit(repository, folder, body)
        entries = [self.entry(folder, path) for path in files]
        if rest.startswith("/tree"):
            return self.send(entries)
        if rest.startswith("/paths-info"):
            asked = json.loads(body)["paths"]
            return self.send([entry for entry in entries if entry["path"] in asked])
        names = [{"rfilename": entry["path"]} for entry in entries]
        visible = {"private": self.private.get(repository, False), "tags": [], "siblings": names}
        self.send({"id": repository, "sha": COMMIT, **visible})

    def entry(self, folder: Path, path: Path) -> dict:
        content = path.read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(content), "oid": oid}

    def batch(self, name: str, asked: dict) -> None:
        trouble = name if name in ("broken", "full") else ""
        objects = [
            {
                **about,
                "actions": {
                    "upload": {"href": f"{self.url}/upload/{about['oid']}/{trouble}?signature=secret"},
                    "verify": {"href": f"{self.url}/verify/{about['oid']}"},
                },
            }
            for about in asked["objects"]
        ]
        self.send({"transfer": "basic", "objects": objects})

    def commit(self, repository: str, folder: Path, body: bytes) -> None:
        for line in body.splitlines():
            change = json.loads(line)
            about = change["value"]
            if change["key"] == "file":
                (folder / about["path"]).write_bytes(base64.b64decode(about["content"]))
            elif change["key"] == "lfsFile":
                (folder / about["path"]).write_bytes(self.objects[about["oid"]])
        url = f"{self.url}/{repository}/commit/{COMMIT}"
        self.send({"success": True, "commitUrl": url, "commitOid": COMMIT})

    def file(self, path: Path) -> None:
        if not path.is_file():
            return self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"], status = f"bytes {first}-{last}/{len(content)}", 206
            content = content[first : last + 1]
        self.send(content, status, headers)


def serve(hub: type[Server]) -> None:
    """Serve until killed."""
    hub.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(Hub)
