"""A Hub on the loopback interface: the part of its HTTP interface that huggingface_hub uses for models.

A test adds repositories from local directories and users with `add_repo` and `add_user`, points `HF_ENDPOINT` at
`LoopbackHub.endpoint`, and reads from `LoopbackHub.requests` what the client asked for, and from `contents` what a
repository holds. `LoopbackHub.fail` makes chosen requests go wrong. Large files go by LFS; by Xet where
`LoopbackHub.xet` names a directory, in which the client's own library for it then plays the storage server.

Each route is a method from a request to an `Answer` and stands in `_ROUTES`; the handler below only moves
bytes. Repositories are commits of immutable files under named references, so that a route which takes
uploads has a commit to add and a reference to move, and nothing else to change.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

__all__ = ["Answer", "LoopbackHub", "Request"]

# What the Hub keeps in LFS, by its default .gitattributes: such files have a SHA-256 for an ETag, others
# their git hash.
_LFS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}

# Of what the Hub checks in a card's metadata, what it refuses.
_LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "llama2", "llama3", "gemma", "other", "unknown"}
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}


class Request(NamedTuple):
    """One request, as it came.

    Attributes:
        method: `GET` for instance.
        path: percent-decoded, without the query.
        headers: as sent; look-ups ignore case.
        body: empty for what has none.
        target: the undecoded path, in which a `/` inside a revision is still `%2F`.
        query: what stands after the path, by name.
    """

    method: str
    path: str
    headers: Message
    body: bytes
    target: str
    query: Mapping[str, list[str]] = {}

    @property
    def token(self) -> str:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ")


@dataclass(frozen=True)
class Answer:
    """A status, headers and a body; the length is added when it is sent."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        return cls(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    @classmethod
    def error(cls, status: int, code: str | None, text: str, headers: Mapping[str, str] | None = None) -> Answer:
        """As the Hub says it: a code for programs in a header, a text in the header and in the body."""
        codes = {} if code is None else {"X-Error-Code": code}
        return cls.json({"error": text}, status, {**codes, "X-Error-Message": text, **(headers or {})})


class _File:
    """The content of a file in a commit, with the hashes that the Hub names it by; by Xet, the hashes alone."""

    def __init__(self, path: str, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.sha256 = hashlib.sha256(content).hexdigest() if Path(path).suffix in _LFS else None
        self.xet_hash: str | None = None

    @classmethod
    def in_xet(cls, path: str, sha256: str, size: int, xet_hash: str) -> _File:
        file = cls(path, sha256.encode())
        file.content, file.sha256, file.size, file.xet_hash = b"", sha256, size, xet_hash
        return file

    @property
    def headers(self) -> dict[str, str]:
        if self.sha256 is None:
            return {"ETag": f'"{self.blob_id}"'}
        quoted = f'"{self.sha256}"'
        xet = {} if self.xet_hash is None else {"X-Xet-Hash": self.xet_hash}
        return {"ETag": quoted, "X-Linked-Etag": quoted, "X-Linked-Size": str(self.size), **xet}

    def entry(self, path: str) -> dict[str, Any]:
        """The file in an answer of `tree`."""
        size = self.size
        lfs = {} if self.sha256 is None else {"lfs": {"oid": self.sha256, "size": size, "pointerSize": 130}}
        return {"type": "file", "path": path, "size": size, "oid": self.blob_id, **lfs}


_Commit = dict[str, _File]


@dataclass
class _Repo:
    """Commits by hash, and references (branches, tags and pull requests) by name."""

    commits: dict[str, _Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, ref: str, files: _Commit) -> str:
        names = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(files.items()))
        commit = hashlib.sha1(names.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


@dataclass
class _Fault:
    pattern: str
    method: str | None
    answer: Answer | None
    cut_after: int | None
    hang: bool
    call: Callable[[], object] | None
    times: float

    def matches(self, request: Request) -> bool:
        return self.method in {None, request.method} and fnmatchcase(request.path, self.pattern)


class LoopbackHub:
    """The server; a context manager, which starts it and stops it.

    Attributes:
        requests: every request in the order of arrival, the ones that were made to fail too.
        objects: what was uploaded to LFS, by SHA-256, committed or not.
        part_bytes: size of the parts in which LFS takes larger files; None takes each whole.
        xet: directory for what is uploaded by Xet, or the address of a storage server, with no reading back.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}
        self.part_bytes: int | None = None
        self.xet: Path | str | None = None
        self._parts: dict[tuple[str, int], bytes] = {}
        self._users: dict[str, tuple[str, set[str]]] = {}
        self._repos: dict[str, _Repo] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        """The value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add_user(self, token: str, name: str, organizations: Iterable[str] = ()) -> None:
        """Let a token stand for a user, who may write to repositories of theirs and of these organizations."""
        self._users[token] = (name, {name, *organizations})

    def contents(self, repo_id: str, ref: str = "main") -> dict[str, bytes]:
        """The files of a repository, by path."""
        repo = self._repos[repo_id]
        return {path: file.content for path, file in repo.commits[repo.refs[ref]].items()}

    def is_private(self, repo_id: str) -> bool:
        return self._repos[repo_id].private

    def add_repo(
        self, repo_id: str, directory: Path, revisions: Mapping[str, Path] | None = None, *, private: bool = False
    ) -> str:
        """Serve a directory as it is now; a later call for the same repository adds commits to it.

        Args:
            repo_id: `org/name`.
            directory: the files of `main`.
            revisions: directories of further branches or tags, by name.
            private: whether only users who may write to it see it.

        Returns:
            The hash of the commit that `main` now is.
        """
        repo = self._repos.setdefault(repo_id, _Repo(private=private))
        for name, tree in (revisions or {}).items():
            repo.commit(name, _read(tree))
        return repo.commit("main", _read(directory))

    def fail(
        self,
        pattern: str,
        *,
        method: str | None = None,
        status: int | None = None,
        error_code: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        cut_after: int | None = None,
        hang: bool = False,
        call: Callable[[], object] | None = None,
        times: float = float("inf"),
    ) -> None:
        """Make requests go wrong. Of several faults that match a request, the oldest takes it.

        Args:
            pattern: of the path, as fnmatch reads it (`*` matches `/` too).
            method: only requests of this method; every method by default.
            status: answer with this status instead.
            error_code: `X-Error-Code` of that answer.
            headers: of that answer, or on top of the right ones.
            body: of that answer, instead of the Hub's JSON.
            cut_after: close the connection after so many bytes of the body; headers promise all of it.
            hang: take the request and say nothing until the server stops.
            call: call this before anything else, to change a repository during a download for instance.
            times: how many requests; all by default.
        """
        if status is not None and body is not None:
            answer = Answer(status, headers or {}, body)
        elif status is not None:
            answer = Answer.error(status, error_code, "made to fail", headers)
        else:
            answer = None
        with self._lock:
            self._faults.append(_Fault(pattern, method, answer, cut_after, hang, call, times))

    def heal(self) -> None:
        """Forget every fault and every request."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def downloads(self, repo_id: str) -> list[str]:
        """The files of a repository whose content was asked for, once for each time, in order of names."""
        start = re.compile(rf"/{re.escape(repo_id)}/resolve/[^/]+/")
        paths = [request.path for request in list(self.requests) if request.method == "GET"]
        return sorted(path[found.end() :] for path in paths if (found := start.match(path)))

    def answer(self, request: Request) -> tuple[Answer, int | None] | None:
        """What to send, and after how many bytes of the body to break off; None is nothing at all."""
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.matches(request)), None)
            if fault is not None:
                fault.times -= 1
                self._faults = [kept for kept in self._faults if kept.times > 0]
        if fault is None:
            return self._route(request), None
        if fault.call is not None:
            fault.call()
        if fault.hang:
            self._stopping.wait()
            return None
        return fault.answer or self._route(request), fault.cut_after

    def _route(self, request: Request) -> Answer:
        for method, pattern, route in _ROUTES:
            match = pattern.fullmatch(request.target)
            if match is not None and request.method in method.split():
                names = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                answer: Answer = getattr(self, route)(request, **names)
                return answer
        return Answer.error(404, None, "no such address")

    def _model_info(self, request: Request, repo_id: str, revision: str) -> Answer:
        found = self._find(request, repo_id, revision)
        if isinstance(found, Answer):
            return found
        commit, files = found
        siblings = [{"rfilename": path} for path in files]
        value = {"_id": commit[:24], "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        card = files["README.md"].content.decode() if "README.md" in files else ""
        shown = {"private": self._repos[repo_id].private, "cardData": _metadata(card)}
        return Answer.json({**value, **shown, "gated": False, "disabled": False, "tags": []})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str) -> Answer:
        found = self._find(request, repo_id, revision)
        if isinstance(found, Answer):
            return found
        start = f"{folder}/" if folder else ""
        return Answer.json([file.entry(path) for path, file in found[1].items() if path.startswith(start)])

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        found = self._find(request, repo_id, revision)
        if isinstance(found, Answer):
            return found
        commit, files = found
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            return Answer.error(404, "EntryNotFound", "Entry not found", headers)
        headers |= {"Content-Type": "application/octet-stream", **files[path].headers}
        if files[path].xet_hash is not None:
            headers["X-Xet-Refresh-Route"] = f"{self.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
        return _part(request, headers, files[path].content)

    def _find(self, request: Request, repo_id: str, revision: str) -> tuple[str, _Commit] | Answer:
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and not self._may_write(request, repo_id)):
            # To whom is not logged in the Hub does not tell an absent repository from a private one.
            status = 404 if request.headers["Authorization"] else 401
            return Answer.error(status, "RepoNotFound", "Repository not found")
        commit = repo.refs.get(revision or "main", revision)
        if commit not in repo.commits:
            return Answer.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    # Uploads. Every route first asks who it is.

    def _whoami(self, request: Request) -> Answer:
        if request.token not in self._users:
            return Answer.error(401, None, "Invalid credentials in Authorization header")
        name, organizations = self._users[request.token]
        orgs = [{"name": each} for each in sorted(organizations - {name})]
        return Answer.json({"type": "user", "name": name, "orgs": orgs, "auth": {"accessToken": {"role": "write"}}})

    def _may_write(self, request: Request, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in self._users.get(request.token, ("", set()))[1]

    def _refused(self, request: Request, repo_id: str) -> Answer | None:
        found = self._find(request, repo_id, "main")
        if isinstance(found, Answer):
            return found
        return None if self._may_write(request, repo_id) else Answer.error(403, None, "You may not write here")

    def _create(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        if request.token not in self._users:
            return Answer.error(401, None, "Invalid credentials in Authorization header")
        repo_id = f"{wanted['organization'] or self._users[request.token][0]}/{wanted['name']}"
        if not self._may_write(request, repo_id):
            return Answer.error(403, None, f"You don't have the rights to create a model under {repo_id}")
        url = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self._repos:
            return Answer.json({"error": "You already created this model repo", **url}, 409)
        repo = self._repos[repo_id] = _Repo(private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": _File(".gitattributes", b"*.safetensors filter=lfs\n")})
        return Answer.json(url)

    def _validate_yaml(self, request: Request) -> Answer:
        content = json.loads(request.body)["content"]
        if not content.startswith("---\n"):
            return Answer.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        errors = [{"message": text} for text in _metadata_errors(_metadata(content))]
        return Answer.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        found = self._find(request, repo_id, revision)
        if isinstance(found, Answer):
            return found
        if "create_pr" not in request.query and (refused := self._refused(request, repo_id)):
            return refused
        described = []
        for each in json.loads(request.body)["files"]:
            lfs, there = Path(each["path"]).suffix in _LFS, found[1].get(each["path"])
            oid = {} if there is None else {"oid": there.sha256 or there.blob_id}
            mode = "lfs" if lfs else "regular"
            described.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return Answer.json({"files": described, "commitOid": found[0]})

    def _batch(self, request: Request, repo_id: str) -> Answer:
        wanted = json.loads(request.body)
        if "ref" in wanted and not self._may_write(request, repo_id):  # without one it is for a pull request
            return Answer.error(403, None, "You may not write here")
        objects = []
        for each in wanted["objects"]:
            oid, size = each["oid"], each["size"]
            if oid in self.objects:
                objects.append({"oid": oid, "size": size})
                continue
            # As the Hub's own addresses do, they carry what gives access.
            address = f"{self.endpoint}/lfs/{oid}"
            upload: dict[str, Any] = {"href": f"{address}?X-Amz-Signature=signed"}
            if self.part_bytes is not None and size > self.part_bytes:
                count = -(-size // self.part_bytes)
                parts = {str(n): f"{address}/{n}?X-Amz-Signature=signed" for n in range(1, count + 1)}
                upload = {"href": f"{address}/complete", "header": {"chunk_size": str(self.part_bytes), **parts}}
            actions = {"upload": upload, "verify": {"href": f"{address}/verify"}}
            objects.append({"oid": oid, "size": size, "actions": actions})
        return Answer.json({"transfer": "basic", "objects": objects})

    def _put(self, request: Request, oid: str, part: str) -> Answer:
        if request.query.get("X-Amz-Signature") != ["signed"]:
            return Answer.error(403, None, "no signature")
        if part:
            self._parts[oid, int(part)] = request.body
            return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        return self._store(oid, request.body)

    def _complete(self, request: Request, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in json.loads(request.body)["parts"]]
        return self._store(oid, b"".join(self._parts[oid, number] for number in numbers))

    def _store(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            return Answer.error(400, None, "the content has another hash")
        self.objects[oid] = content
        return Answer()

    def _verify(self, request: Request, oid: str) -> Answer:
        whole = oid in self.objects and len(self.objects[oid]) == json.loads(request.body)["size"]
        return Answer.json({}) if whole else Answer.error(404, None, "no such object")

    def _commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        found = self._find(request, repo_id, revision)
        if isinstance(found, Answer):
            return found
        repo, (parent, files) = self._repos[repo_id], found
        is_pr = request.query.get("create_pr") == ["1"]
        if not is_pr and (refused := self._refused(request, repo_id)):
            return refused
        files = dict(files)
        for line in request.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", parent) != parent:
                return Answer.error(412, None, "A commit has happened since")
            if entry["key"] == "file":
                files[value["path"]] = _File(value["path"], base64.b64decode(value["content"]))
            if entry["key"] == "lfsFile":
                file = self._uploaded(value)
                if file is None:
                    return Answer.error(400, None, "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = file
        pulls = sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = f"refs/pr/{pulls + 1}" if is_pr else revision or "main"
        commit = repo.commit(ref, files)
        value = {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit}"}
        pr = {"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/{pulls + 1}"} if is_pr else {}
        return Answer.json(value | pr)

    def _uploaded(self, pointer: Mapping[str, Any]) -> _File | None:
        path, oid = pointer["path"], pointer["oid"]
        if oid in self.objects:
            return _File(path, self.objects[oid])
        xet_hash = _xet_hashes(self.xet).get(oid) if isinstance(self.xet, Path) else None
        return None if xet_hash is None else _File.in_xet(path, oid, pointer["size"], xet_hash)

    def _xet_token(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        if self.xet is None:
            return Answer.error(404, None, "no such address")
        if kind == "write" and "create_pr" not in request.query and (refused := self._refused(request, repo_id)):
            return refused
        storage = self.xet if isinstance(self.xet, str) else f"local://{self.xet}"
        token, end = "xet-token", 4102444800
        headers = {"X-Xet-Cas-Url": storage, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
        return Answer.json({"casUrl": storage, "accessToken": token, "exp": end}, headers=headers)

    def _branch(self, request: Request, repo_id: str, revision: str) -> Answer:
        if refused := self._refused(request, repo_id):
            return refused
        repo = self._repos[repo_id]
        if revision in repo.refs:
            return Answer.error(409, None, "Reference already exists")
        repo.refs[revision] = repo.refs["main"]
        return Answer.json({})


def _xet_hashes(directory: Path) -> dict[str, str]:
    """The name in Xet of every file in its storage, by SHA-256, from its shards.

    A shard has a header of 48 bytes, then for each file a record of 48 (its hash, flags, count of entries), the entries
    and as many verifications, and the SHA-256 where the flags say so; a record of ones ends it. Hashes are four
    little-endian numbers of 64 bits (https://huggingface.co/docs/xet/shard).
    """
    found = {}
    for path in directory.rglob("*.mdb"):
        shard, position = path.read_bytes(), 48
        while (name := shard[position : position + 32]) != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", shard, position + 32)
            position += 48 * (1 + count * (2 if flags >> 31 else 1))
            if flags >> 30 & 1:
                found[_hex(shard[position : position + 32])] = _hex(name)
                position += 48
    return found


def _hex(four: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", four))


def _metadata(card: str) -> Any:
    """The metadata of a README.md; None without any, and a string for what is no YAML."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        return None if match is None else yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return str(error)


def _metadata_errors(metadata: Any) -> list[str]:
    """What the Hub's own validation would refuse, in so far as this suite could get it wrong."""
    if not isinstance(metadata, dict):
        return ["the metadata are no YAML map"]
    errors = []
    if metadata.get("license", "unknown") not in _LICENSES:
        errors.append('"license" must be one of the known ones')
    bases = metadata.get("base_model", [])
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", base) for base in ([bases] if isinstance(bases, str) else bases)):
        errors.append('"base_model" must be the id of a model')
    if metadata.get("base_model_relation", "adapter") not in _RELATIONS:
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    if not all(isinstance(metadata.get(name, ""), str) for name in ("library_name", "pipeline_tag", "license_name")):
        errors.append("must be a string")
    if "base_model_relation" in metadata and "base_model" not in metadata:
        errors.append('"base_model_relation" without "base_model"')
    return errors


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", re.compile(rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?"), "_model_info"),
    ("GET", re.compile(rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?"), "_tree"),
    ("GET HEAD", re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"), "_resolve"),
    ("GET", re.compile(r"/api/whoami-v2"), "_whoami"),
    ("POST", re.compile(r"/api/repos/create"), "_create"),
    ("POST", re.compile(r"/api/validate-yaml"), "_validate_yaml"),
    ("POST", re.compile(rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)"), "_preupload"),
    ("POST", re.compile(rf"/{_REPO}\.git/info/lfs/objects/batch"), "_batch"),
    ("PUT", re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?"), "_put"),
    ("POST", re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})/complete"), "_complete"),
    ("POST", re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})/verify"), "_verify"),
    ("POST", re.compile(rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)"), "_commit"),
    ("GET", re.compile(rf"/api/models/{_REPO}/xet-(?P<kind>read|write)-token/(?P<revision>[^/]+)"), "_xet_token"),
    ("POST", re.compile(rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)"), "_branch"),
]


def _read(directory: Path) -> _Commit:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: _File(name, path.read_bytes()) for name, path in names.items()}


def _part(request: Request, headers: Mapping[str, str], content: bytes) -> Answer:
    """The bytes that `Range` asks for: `bytes=first-` or `bytes=first-last`; everything without one."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["Range"] or "")
    if request.method == "HEAD" or match is None:
        return Answer(200, headers, content)
    first, size = int(match[1]), len(content)
    last = min(int(match[2] or size), size - 1)
    if first > last:
        return Answer(416, {**headers, "Content-Range": f"bytes */{size}"})
    return Answer(206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}, content[first : last + 1])


class _Server(ThreadingHTTPServer):
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away is no fault of the server; everything else should be seen.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as the Hub keeps them
    disable_nagle_algorithm = True  # headers and body go separately, and each body would wait 40 ms
    server: _Server

    def handle_any(self) -> None:
        target = urlsplit(self.path)
        request = Request(
            self.command, unquote(target.path), self.headers, self._body(), target.path, parse_qs(target.query)
        )
        sent = self.server.hub.answer(request)
        if sent is None:
            self.close_connection = True
            return
        answer, cut_after = sent
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if cut_after is not None:
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut_after])

    def _body(self) -> bytes:
        if "chunked" not in (self.headers["Transfer-Encoding"] or ""):
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def log_message(self, *args: Any) -> None:
        """Nothing: what was asked for is in `LoopbackHub.requests`."""
