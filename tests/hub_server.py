"""A server that answers as the Hugging Face hub does, for its own package: tokens, private and gated repositories,
commits of ndjson with files in LFS, and downloads by ETag."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".png", ".npy", ".bin")
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other")


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """``history``: (commit, message, files) from the first commit on."""

    private: bool = False
    gated: bool = False
    history: list = field(default_factory=list)

    def __post_init__(self):
        self.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, message, files):
        known = json.dumps([message, len(self.history), {name: sha256(data) for name, data in files.items()}])
        self.history.append((hashlib.sha1(known.encode()).hexdigest(), message, files))

    @property
    def files(self):
        return self.history[-1][2]

    def at(self, revision):
        """The commit and its files, or None."""
        if revision == "main":
            return self.history[-1][0], self.files
        return next(((sha, files) for sha, _, files in self.history if sha == revision), None)

    def card(self):
        text = self.files.get("README.md", b"").decode()
        return (yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None) or {}


class Refused(Exception):
    def __init__(self, status, code=None, message=None, body=None):
        super().__init__(status)
        self.status, self.code, self.message, self.body = status, code, message, body


class HubServer(ThreadingHTTPServer):
    """``users``: (name, may write) by token. ``repos`` by (kind, user/name). ``stored``: LFS objects that arrived.
    ``failing``: a word of the paths that are answered by an error 500."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = {"hf_ada": ("ada", True), "hf_reads": ("ada", False), "hf_bob": ("bob", True)}
        self.repos, self.stored, self.uploads, self.requests, self.failing = {}, {}, [], [], None
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"  # another host, as the hub's
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.server.requests.append((self.command, path))
        try:
            if self.server.failing and self.server.failing in path:
                raise Refused(500, message="Internal Error")
            for method, pattern, answer in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    return answer(self, **match.groupdict())
            raise Refused(404, message=f"no such page: {path}")
        except Refused as refused:
            body = {"error": refused.message or str(refused.status)} if refused.body is None else refused.body
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, json.dumps(body).encode(), **{k: v for k, v in headers.items() if v})

    def _send(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    # ---- who asks, for what

    def _user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.server.users.get(token, (None, False))

    def _repo(self, kind, repo, *, write=False, content=False):
        user, may_write = self._user()
        found = self.server.repos.get((kind.rstrip("s") or "model", repo))
        owns = user is not None and repo.startswith(f"{user}/")
        if found is None or (found.private and not owns):
            if user is None:
                raise Refused(401, message="Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        if content and found.gated and not owns:
            raise Refused(401 if user is None else 403, "GatedRepo", f"Access to model {repo} is restricted.")
        if write and not (owns and may_write):
            raise Refused(403, message="Forbidden: you must use a write token to upload to a repository.")
        return found

    def _at(self, repo, revision):
        if (found := repo.at(revision)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # ---- repositories

    def create(self):
        user, may_write = self._user()
        asked = json.loads(self.body)
        owner = asked.get("organization") or user
        if user != owner or not may_write:
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        key = (asked.get("type", "model"), f"{owner}/{asked['name']}")
        if key in self.server.repos:
            raise Refused(409, message="You already created this model repo")
        self.server.repos[key] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._json({"url": f"{self.server.endpoint}/{key[1]}", "id": "1", "name": key[1]})

    def info(self, kind, repo, revision=None):
        found = self._repo(kind, repo)
        sha, files = self._at(found, revision or "main")
        card = found.card()
        told = {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "gated": found.gated}
        told |= {"tags": card.get("tags", []), "siblings": [{"rfilename": name} for name in sorted(files)]}
        told |= {"cardData": card, "downloads": 0, "likes": 0}
        if "library_name" in card:
            told["library_name"] = card["library_name"]
        self._json(told)

    def tree(self, kind, repo, revision, path):
        _, files = self._at(self._repo(kind, repo, content=True), revision)
        listed = []
        for name, content in sorted(files.items()):
            if name.startswith(path or ""):
                entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                if name.endswith(LFS):
                    entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                listed.append(entry)
        self._json(listed)

    # ---- uploads

    def validate(self):
        text = json.loads(self.body)["content"]
        card = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        errors, warnings = [], []
        if not card:
            warnings = [{"message": "empty or missing yaml metadata in repo card"}]
        elif card.get("license", "other") not in LICENCES:
            errors = [{"message": f'"license" must be one of {list(LICENCES)}'}]
        body = {"errors": errors, "warnings": warnings}
        if errors:
            raise Refused(400, body=body)
        self._json(body)

    def preupload(self, kind, repo, revision):
        found = self._repo(kind, repo, write=True)
        files = []
        for asked in json.loads(self.body)["files"]:
            name, lfs = asked["path"], asked["path"].endswith(LFS)
            answer = {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if name in found.files:
                answer["oid"] = (sha256 if lfs else git_oid)(found.files[name])
            files.append(answer)
        self._json({"files": files})

    def batch(self, kind, repo):
        self._repo(kind or "model", repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.stored:
                answer["actions"] = {"upload": {"href": f"{self.server.endpoint}/storage/{asked['oid']}", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid):
        if sha256(self.body) != oid:
            raise Refused(400, message="the content is another one")
        self.server.stored[oid] = self.body
        self.server.uploads.append(oid)
        self._send(200)

    def commit(self, kind, repo, revision):
        found = self._repo(kind, repo, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(found.files)
        if header.get("parentCommit") not in (None, found.history[-1][0]):
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise Refused(400, message="LFS pointer pointed to a file that does not exist")
                files[value["path"]] = self.server.stored[value["oid"]]
            elif value["path"] not in files:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                del files[value["path"]]
        found.commit(header["summary"], files)
        sha = found.history[-1][0]
        url = f"{self.server.endpoint}/{repo}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # ---- downloads

    def resolve(self, kind, repo, revision, path):
        sha, files = self._at(self._repo(kind or "model", repo, content=True), revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        if not path.endswith(LFS):
            return self._content(content, **{"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": sha})
        oid = sha256(content)
        self.server.stored[oid] = content
        headers = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": len(content), "X-Repo-Commit": sha}
        self._send(302, **headers, Location=f"{self.server.cdn}/cdn/{oid}")

    def cdn(self, oid):
        self._content(self.server.stored[oid], ETag=f'"{oid}"')

    def _content(self, content, **headers):
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], **headers)
        self._send(200, content, **headers)


_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_PAGE = rf"/(?:(?P<kind>datasets)/)?{_ID}"
_READ = ("GET", "HEAD")
ROUTES = (
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (_READ, _API, Handler.info),
    (_READ, rf"{_API}/revision/(?P<revision>.+)", Handler.info),
    (_READ, rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", Handler.tree),
    (("POST",), rf"{_API}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), rf"{_API}/commit/(?P<revision>.+)", Handler.commit),
    (("POST",), rf"{_PAGE}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/storage/(?P<oid>[0-9a-f]{64})", Handler.store),
    (_READ, "/cdn/(?P<oid>[0-9a-f]{64})", Handler.cdn),
    (_READ, rf"{_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)
