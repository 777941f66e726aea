"""A server that behaves like ModelScope's hub, as far as modelscope_hub needs it to publish a model.

    python fake_modelscope.py FOLDER

It prints its port. FOLDER/models/OWNER/NAME/ gets what is published. The token is "good"; it may write to `me` and
`lab`. As on the hub, a private model is hidden from the API that knows users by the header Authorization, and shown by
the older one, which knows them by a cookie. Names make trouble: `silent` is never answered, `taken` belongs to somebody
who hides it, `broken` loses the connection while a file is uploaded, `full` refuses the upload, `locked` refuses the
commit, `mute` takes the files and never answers the commit.
"""

import base64
import json
import re
import threading
from urllib.parse import unquote, urlsplit

from fake_hub import Server, serve

PRIVATE, PUBLIC = 1, 5
TAKEN = {"Code": 10010101001, "Message": "model already exists", "Success": False}


class ModelScopeHub(Server):
    """Answers one connection."""

    abouts: dict[str, dict] = {}  # what each repository was made with
    no_space = {"Code": 413, "Message": "no space"}

    def answer(self, body: bytes) -> None:
        """Find out what a request is about, and answer it."""
        path = unquote(urlsplit(self.path).path)
        cookie = f"m_session_id={self.token}" in self.headers.get("Cookie", "")
        if path == "/openapi/v1/users/me":
            if self.token != "good":
                return self.send({"code": "InvalidAuthentication", "message": "invalid token", "success": False}, 401)
            return self.send({"success": True, "data": {"username": "me"}})
        if path == "/api/v1/models" and cookie:
            return self.create(json.loads(body))
        found = re.fullmatch(r"/(openapi|api)/v1/(?:repos/)?models/(\w+/[\w-]+)(/.*)?", path)
        if not found:
            return self.send({"Message": f"nothing at {path}"}, 404)
        api, repository, rest = found[1], found[2], found[3] or ""
        about = self.abouts.get(repository)
        if repository == "me/silent":
            threading.Event().wait()
        if about is None or (api == "api" and not cookie):
            return self.send({"Code": 10010205001, "Message": "model does not exist", "Success": False}, 404)
        if rest.endswith("/info/lfs/objects/batch"):
            return self.batch(repository.partition("/")[2], json.loads(body))
        if rest == "/commit/master":
            return self.commit(repository, json.loads(body))
        if api == "api":
            return self.send({"Code": 200, "Success": True, "Data": about})
        if about["Visibility"] == PRIVATE:
            return self.send({"code": "ResourceNotFound", "message": "no such model", "success": False}, 404)
        self.send({"success": True, "data": {"id": repository, "private": False, "license": about["License"]}})

    def create(self, asked: dict) -> None:
        repository = f"{asked['Path']}/{asked['Name']}"
        if asked["Path"] not in ("me", "lab"):
            return self.send({"Code": 10010203001, "Message": "no permission", "Success": False}, 403)
        if asked["Name"] == "taken" or repository in self.abouts:
            return self.send(TAKEN, 400)
        self.abouts[repository] = asked
        folder = self.folder / "models" / repository
        folder.mkdir(parents=True)
        folder.with_suffix(".json").write_text(json.dumps(asked))
        self.send({"Code": 200, "Success": True, "Data": asked})

    def batch(self, name: str, asked: dict) -> None:
        trouble = name if name in ("broken", "full") else ""
        missing = [about for about in asked["objects"] if trouble or about["oid"] not in self.objects]
        href = f"{self.url}/upload/{{oid}}/{trouble}?signature=secret"
        objects = [about | {"actions": {"upload": {"href": href.format(**about)}}} for about in missing]
        self.send({"Code": 200, "Success": True, "Data": {"objects": objects}})

    def commit(self, repository: str, asked: dict) -> None:
        name, folder = repository.partition("/")[2], self.folder / "models" / repository
        if name == "mute":
            threading.Event().wait()
        if name == "locked":
            return self.send({"Code": 10010203001, "Message": "no permission", "Success": False}, 403)
        for action in asked["actions"]:
            is_large = action["type"] == "lfs"
            content = self.objects[action["sha256"]] if is_large else base64.b64decode(action["content"])
            (folder / action["path"]).write_bytes(content)
        self.send({"Code": 200, "Success": True, "Data": {"CommitId": "0123456789abcdef"}})


if __name__ == "__main__":
    serve(ModelScopeHub)
