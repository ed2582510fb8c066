"""Serve the part of the JSON API of Google Cloud Storage that TensorStore and gcsfs use, on this machine.

Objects are in memory, named ``bucket/name``. Every request is recorded, and any may be answered with an error instead.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

_FIRST_GENERATION = 1000
_ERRORS = {403: "Permission denied", 404: "Not Found", 412: "Precondition Failed", 416: "Range Not Satisfiable"}


class Request(NamedTuple):
    """A request to the server.

    Attributes:
      verb: get, stat (metadata alone), list, upload, move, delete; bucket (its metadata); begin and batch (see
        :class:`_Handler`); other for requests that are no part of the API.
      target: bucket/name; for a list, the bucket; for others, the path.
      query: the query, without the random parameter by which TensorStore keeps proxies from caching.
      byte_range: [start, stop) of a get with a range; a negative start counts from the end, None is no bound.
      size: bytes of the content of an upload.
    """

    verb: str
    target: str
    query: dict[str, str]
    byte_range: tuple[int | None, int | None] | None
    size: int


class FakeGCS:
    """A context manager that runs the server.

    Attributes:
      objects: contents by ``bucket/name``.
      requests: all requests, in the order in which they arrived.
      fault: a function that is called with each request first, and returns the status of an error or None.
      lost: a function of a request that returns whether it is carried out but answered with 503.
      page: the largest number of names in one answer to a list.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fault: Callable[[Request], int | None] = lambda request: None
        self.lost: Callable[[Request], bool] = lambda request: False
        self.page = 1000
        self._generations: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": self, "begun": []}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> "FakeGCS":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self) -> Mapping[str, str]:
        """Return the environment of a process whose gs:// is this server, and that needs no credentials."""
        place = f"127.0.0.1:{self._server.server_port}"
        kept = {name: x for name, x in os.environ.items() if not name.lower().endswith("_proxy")}
        for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
            kept.pop(name, None)
        return {
            **kept,
            "TENSORSTORE_GCS_HTTP_URL": f"http://{place}",
            "STORAGE_EMULATOR_HOST": f"http://{place}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC for the kind of bucket
            "GCE_METADATA_ROOT": place,  # asked whether this machine is Google's; answers 404
            "CLOUDSDK_CONFIG": "/nonexistent",  # instead of ~/.config/gcloud
        }

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start a Python process whose gs:// is this server."""
        command, pipe = [sys.executable, *map(str, arguments)], subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(), stdout=pipe, stderr=pipe, text=True, cwd="/")

    def of(self, verb: str, folder: str = "") -> list[Request]:
        """Return the requests of a kind for objects in ``bucket/folder``."""
        return [each for each in self.requests if each.verb == verb and each.target.startswith(folder)]

    def put(self, folder: Path, place: str) -> None:
        """Copy the files of a local folder to ``bucket/folder``."""
        self.objects |= {f"{place}/{name}": content for name, content in files_in(folder).items()}

    def files(self, place: str) -> dict[str, bytes]:
        """Return the objects in ``bucket/folder``, by their names there."""
        prefix = f"{place}/"
        return {name.removeprefix(prefix): x for name, x in self.objects.items() if name.startswith(prefix)}

    def answer(self, request: Request, content: bytes) -> tuple[int, dict[str, str], bytes]:
        """Carry out a request; return status, headers and body of the answer."""
        with self._lock:
            self.requests.append(request)
        status = self.fault(request)
        if status is not None:
            return _error(status)
        with self._lock:
            if request.verb in ("get", "stat", "upload", "move", "delete"):
                answer = self._object(request, content)
            elif request.verb == "bucket":
                answer = _json({"kind": "storage#bucket", "id": request.target, "name": request.target})
            else:
                answer = self._list(request) if request.verb == "list" else _error(404)
        return _error(503) if self.lost(request) else answer

    def _object(self, request: Request, content: bytes) -> tuple[int, dict[str, str], bytes]:
        name, wanted = request.target, request.query
        generation = self._generations.setdefault(name, _FIRST_GENERATION) if name in self.objects else 0
        if int(wanted.get("ifGenerationMatch", generation)) != generation:
            return _error(412)
        if request.verb == "upload":
            self._generations[name] = self._generations.get(name, _FIRST_GENERATION) + 1
            self.objects[name] = content
            return _json(self._about(name))
        if not generation:
            return _error(404)
        if request.verb == "delete":
            del self.objects[name]
            return 204, {}, b""
        if request.verb == "move":
            self.objects[wanted["to"]] = self.objects.pop(name)
            return _json(self._about(wanted["to"]))
        if int(wanted.get("ifGenerationNotMatch", -1)) == generation:
            return 304, {}, b""
        if request.verb == "stat":
            return _json(self._about(name))
        whole, headers = self.objects[name], {"x-goog-generation": str(generation)}
        if request.byte_range is None:
            return 200, headers, whole
        start, stop, _ = slice(*request.byte_range).indices(len(whole))
        if start >= stop:
            return _error(416)
        return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(whole)}"}, whole[start:stop]

    def _list(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        wanted, bucket = request.query, f"{request.target}/"
        after, before = wanted.get("startOffset", ""), wanted.get("endOffset")
        names = sorted(name.removeprefix(bucket) for name in self.objects if name.startswith(bucket))
        names = [name for name in names if name >= after and (before is None or name < before)]
        names = [name for name in names if name.startswith(wanted.get("prefix", ""))]
        names = [name for name in names if name > bytes.fromhex(wanted.get("pageToken", "")).decode()]
        answer: dict[str, object] = {"kind": "storage#objects"}
        if "delimiter" in wanted:  # the names of files and folders in this folder alone
            start = len(wanted.get("prefix", ""))
            folders = {name[: name.index("/", start) + 1] for name in names if "/" in name[start:]}
            answer["prefixes"] = sorted(folders)
            names = [name for name in names if "/" not in name[start:]]
        answer["items"] = [self._about(bucket + name) for name in names[: self.page]]
        if len(names) > self.page:
            answer["nextPageToken"] = names[self.page - 1].encode().hex()
        return _json(answer)

    def _about(self, target: str) -> dict[str, str]:
        bucket, name = target.split("/", 1)
        size, generation = str(len(self.objects[target])), str(self._generations.get(target, _FIRST_GENERATION))
        return {"kind": "storage#object", "bucket": bucket, "name": name, "size": size, "generation": generation}


def printed(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a process, check its status, and return its standard output."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    return out


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the files of a local folder, by their names in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _json(content: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int) -> tuple[int, dict[str, str], bytes]:
    message = {"error": {"code": status, "message": _ERRORS.get(status, "Service Unavailable")}}
    return status, *_json(message)[1:]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections at once; a client takes seconds to try a dropped one again

    def handle_error(self, *request: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(*request)


class _Handler(BaseHTTPRequestHandler):
    """The handler of requests.

    An upload by gcsfs is two requests, one that begins it and one with the content; several deletes are one request.
    """

    gcs: FakeGCS
    begun: list[str]  # targets of uploads that have begun
    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True  # no wait between headers and body
    timeout = 20

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(size)
        if len(content) != size:  # the client was killed
            self.close_connection = True
            return
        request = self._request(size)
        if request.verb == "begin":
            self.begun.append(request.target)
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?upload_id={len(self.begun) - 1}"
            status, headers, body = 200, {"Location": place}, b""
        elif request.verb == "batch":
            status, headers, body = self._batch(content.decode())
        else:
            status, headers, body = self.gcs.answer(request, content)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            if status not in (204, 304) or name != "Content-Length":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _batch(self, content: str) -> tuple[int, dict[str, str], bytes]:
        answers = []
        for bucket, name in re.findall(r"^DELETE \S*/b/([^/]+)/o/(\S+)", content, re.MULTILINE):
            status, *_ = self.gcs.answer(Request("delete", f"{bucket}/{unquote(name)}", {}, None, 0), b"")
            answers.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} \r\n\r\n\r\n")
        return 200, {"Content-Type": "multipart/mixed; boundary=part"}, ("".join(answers) + "--part--").encode()

    def _request(self, size: int) -> Request:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items() if name != "tensorstore"}
        upload = url.path.removeprefix("/upload").removeprefix("/download")
        folder, _, name = upload.removeprefix("/storage/v1/b/").partition("/o")
        method, asked = self.command, self.headers.get("Range")
        if url.path == "/batch/storage/v1":
            return Request("batch", "", query, None, size)
        if not upload.startswith("/storage/v1/b/"):
            return Request("other", url.path, query, None, size)
        if query.get("uploadType") == "resumable":
            return Request("begin", f"{folder}/{query['name']}", query, None, size)
        if "upload_id" in query:
            return Request("upload", self.begun[int(query["upload_id"])], {}, None, size)
        if "/" not in folder and not name and not upload.endswith("/o"):
            return Request("bucket", folder, query, None, size)
        if "/moveTo/o/" in name and method == "POST":
            source, target = (f"{folder}/{unquote(x)}" for x in name[1:].split("/moveTo/o/"))
            return Request("move", source, {"to": target}, None, size)
        if url.path.startswith("/upload") and method == "POST" and query.get("uploadType") == "media":
            return Request("upload", f"{folder}/{query['name']}", query, None, size)
        if not name and method == "GET":
            return Request("list", folder, query, None, 0)
        verb = {"GET": "get" if query.get("alt") == "media" else "stat", "DELETE": "delete"}.get(method, "other")
        return Request(verb, f"{folder}/{unquote(name[1:])}", query, _byte_range(asked) if asked else None, size)

    def log_message(self, *message: object) -> None:
        pass


def _byte_range(header: str) -> tuple[int | None, int | None]:
    start, _, last = header.removeprefix("bytes=").partition("-")
    if not start:
        return -int(last), None
    return int(start), int(last) + 1 if last else None
