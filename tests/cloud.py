"""A real Cloud Storage emulator, and a proxy before it that is as strict as the real service and fails on demand.

The emulator ignores preconditions, generations, paging and `fields`; the proxy adds them. Clients are pointed to the proxy
by `STORAGE_EMULATOR_HOST`. Set `W2V2NB_STORAGE_EMULATOR` to the address of another emulator to use that one.
"""

import base64
import http.client
import json
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

FOR_EVER = 10**9
JSON = {"Content-Type": "application/json"}
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
LISTING = re.compile(r"/storage/v1/b/([^/]+)/o")
BACKGROUND = re.compile(r"/storage/v1/b/[^/?]+\?projection=noAcl.*")  # the client asks for this now and then, in a thread


# It writes all it knows to its disk at each upload, even where that is memory: with thousands of objects it does nothing else.
START = """
from gcp_storage_emulator import __main__, storage
storage.Storage._write_config_to_file = lambda self: None
__main__.main()
"""


@dataclass
class Fault:
    """What is to go wrong with the requests of a method whose path has a text in it.

    An HTTP status, or: `reset` (the connection), `lost` (the request is carried out, then reset), `cut` (the body ends early),
    `corrupt` (one byte of the body is another; of the request's body if it has one), `stall` (no answer),
    `half` (half of an answer, and then nothing).
    """

    kind: int | str
    path: str = ""  # any path that has this, decoded, with the query
    method: str = ""  # of any method when empty
    n: int = FOR_EVER  # how many requests
    message: str = ""  # what the service says with a status; empty: its usual words


@dataclass
class Request:
    method: str
    path: str  # decoded, with the query
    start_s: float
    end_s: float = float("inf")
    status: int = 0  # none yet


class Answer(NamedTuple):
    status: int
    headers: dict  # names in lower case
    body: bytes


class Emulator:
    "`gcp-storage-emulator` in a process of its own; one request at a time, since it has one thread."

    def __init__(self):
        self.lock, self.process, self.generations = Lock(), None, {}
        address = os.environ.get("W2V2NB_STORAGE_EMULATOR")
        if not address:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"http://127.0.0.1:{free.getsockname()[1]}"
            command = [sys.executable, "-c", START, "start", "--in-memory", "--quiet"]
            command += ["--host", "127.0.0.1", "--port", str(urlsplit(address).port)]
            self.log = tempfile.TemporaryFile()
            self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.host, self.port = urlsplit(address).hostname, urlsplit(address).port
        self.wait()

    def wait(self):
        until = time.monotonic() + 30
        while True:
            try:
                return socket.create_connection((self.host, self.port), timeout=1).close()
            except OSError as e:
                if self.process and self.process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the emulator does not answer at {self.host}:{self.port}") from e
                time.sleep(0.05)

    def send(self, method, path, body=None, headers=None):
        with self.lock:
            return self.send_now(method, path, body, headers)

    def send_now(self, method, path, body=None, headers=None):
        "Send a request; the lock is held."
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, {**(headers or {}), "Connection": "close"})
            answer = connection.getresponse()
            answer = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()
        if method != "GET":
            self.learn(answer)
        return answer

    def learn(self, answer):
        "Remember an object's generation from the answer to a write, so that a download needs one request."
        about = json.loads(answer.body) if answer.body.startswith(b"{") else {}
        if about.get("kind") == "storage#object":
            self.generations[about["bucket"], about["name"]] = int(about["generation"])
        else:
            self.generations.clear()

    def generation(self, bucket, name):
        "The generation of an object, 0 for none; the lock is held."
        if (bucket, name) not in self.generations:
            answer = self.send_now("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
            self.generations[bucket, name] = int(json.loads(answer.body)["generation"]) if answer.status == 200 else 0
        return self.generations[bucket, name]

    def close(self):
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.log.close()


class Proxy:
    "Hands requests on to an emulator, late and with faults, and keeps a log of them."

    def __init__(self, emulator, delay_s=0.0, page_size=1000):
        self.emulator, self.delay_s, self.page_size = emulator, delay_s, page_size
        self.faults, self.requests, self.lock, self.closing = [], [], Lock(), Event()
        handler = type("ProxyHandler", (Handler,), {"proxy": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add(self, *faults):
        with self.lock:
            self.faults += faults

    def clear(self):
        "No more faults, and an empty log."
        with self.lock:
            self.faults.clear()
            self.requests.clear()

    def find_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                is_meant = fault.path in path if fault.path else not BACKGROUND.fullmatch(path)
                if fault.n > 0 and fault.method in ("", method) and is_meant:
                    fault.n -= 1
                    return fault
        return None

    def seen(self, method="", path=""):
        "The requests of a method whose path has a text in it."
        with self.lock:
            return [r for r in self.requests if method in ("", r.method) and path in r.path]

    def most_at_once(self, method="", path=""):
        "How many such requests were on their way at the same time, at most."
        ends = sorted(event for r in self.seen(method, path) for event in ((r.start_s, 1), (r.end_s, -1)))
        now = most = 0
        for _, step in ends:
            now += step
            most = max(most, now)
        return most

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method, path, body, headers):
        "What the real service would answer: the emulator's answer, once preconditions hold."
        url = urlsplit(path)
        asked = {k: v[-1] for k, v in parse_qs(url.query).items()}
        with self.emulator.lock:
            bucket, name = self.find_target(method, url.path, asked, body)
            there = self.emulator.generation(bucket, name) if name else 0
            wanted = asked.get("ifGenerationMatch")
            if name and wanted is not None and int(wanted) != there:
                return refusal(412, "At least one of the pre-conditions you specified did not hold.")
            if name and method in ("GET", "DELETE") and int(asked.get("generation", there)) != there:
                return refusal(404, f"No such object: {bucket}/{name}")
            answer = self.emulator.send_now(method, path, body, headers)
        if answer.status == 404 and not answer.body:
            return refusal(404, f"No such object: {bucket}/{name}" if name else "The specified bucket does not exist.")
        if method == "GET" and answer.status < 300 and name and asked.get("alt") == "media":
            answer.headers.setdefault("x-goog-generation", str(there))
        if method == "GET" and answer.status == 200 and LISTING.fullmatch(url.path):
            return answer._replace(body=json.dumps(self.page(json.loads(answer.body), asked)).encode())
        return answer

    def find_target(self, method, path, asked, body):
        "Bucket and name of the object that a request is about, the name None when it is about none."
        if found := OBJECT.fullmatch(path):
            return found[1], unquote(found[2])
        if (found := UPLOAD.fullmatch(path)) and method == "POST" and "upload_id" not in asked:
            about = body.split(b"\r\n\r\n", 1)[1].split(b"\r\n--", 1)[0] if asked.get("uploadType") == "multipart" else body
            return found[1], asked.get("name") or json.loads(about)["name"]
        return None, None

    def page(self, listing, asked):
        "One page of a listing, with the fields that were asked for."
        n = min(int(asked.get("maxResults", self.page_size)), self.page_size)
        after = base64.urlsafe_b64decode(asked["pageToken"]).decode() if "pageToken" in asked else ""
        items = {item["name"]: item for item in listing.get("items", [])}
        names = sorted(name for name in [*items, *listing.get("prefixes", [])] if name > after)
        page, rest = names[:n], names[n:]
        fields = re.search(r"items\(([^)]*)\)", asked.get("fields", ""))
        kept = [
            {k: v for k, v in items[name].items() if not fields or k in fields[1].split(",")} for name in page if name in items
        ]
        prefixes = [name for name in page if name not in items]
        result = {"kind": "storage#objects"} | ({"items": kept} if kept else {}) | ({"prefixes": prefixes} if prefixes else {})
        if rest:
            result["nextPageToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        if fields:
            outside = re.sub(r"\([^)]*\)", "", asked["fields"]).split(",")
            result = {k: v for k, v in result.items() if k in outside}
        return result


def refusal(status, message):
    "An error as the service words it."
    body = {"error": {"code": status, "message": message, "errors": [{"message": message, "domain": "global"}]}}
    return Answer(status, {"content-type": "application/json"}, json.dumps(body).encode())


MESSAGES = {
    401: "Invalid Credentials",
    403: "someone@example.org does not have storage.objects.get access to the Google Cloud Storage object.",
    404: "No such object",
    412: "At least one of the pre-conditions you specified did not hold.",
    429: "The object exceeded the rate limit.",
    503: "Service Unavailable",
}


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed, or had enough
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def handle_request(self):
        self.request_seen = Request(self.command, unquote(self.path), time.monotonic())
        if not BACKGROUND.fullmatch(self.request_seen.path):
            with self.proxy.lock:
                self.proxy.requests.append(self.request_seen)
        body = self.read_body()
        fault = self.proxy.find_fault(self.command, self.request_seen.path)
        self.proxy.closing.wait(self.proxy.delay_s)
        self.carry_out(fault, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def carry_out(self, fault, body):
        fault, message = (fault.kind, fault.message) if fault else (None, "")
        if isinstance(fault, int):
            self.reply(refusal(fault, message or MESSAGES.get(fault, "")))
        elif fault == "stall":
            self.proxy.closing.wait()
            self.close_connection = True
        elif fault == "reset":
            self.reset()
        else:
            if fault == "corrupt" and body:
                at = body.rfind(b"\r\n--", 0, -8) - 1 if b"\r\n--" in body else len(body) // 2  # not in a boundary
                body, fault = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :], None
            hop = ("connection", "transfer-encoding", "content-length", "accept-encoding")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in hop}
            path = re.sub("^http://[^/]*", "", self.path)  # whoever takes this for an HTTP proxy names the host as well
            answer = self.proxy.answer(self.command, path, body, headers)
            self.reset() if fault == "lost" else self.reply(answer, fault)

    def reply(self, answer, fault=None):
        body = answer.body
        if fault == "corrupt" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        half = fault in ("cut", "half")
        self.request_seen.end_s, self.request_seen.status = time.monotonic(), answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name not in ("connection", "content-length", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        if fault == "half":
            self.proxy.closing.wait()
        self.close_connection = self.close_connection or half

    def reset(self):
        "Close the connection so that the other side sees `Connection reset by peer`."
        self.request_seen.end_s = time.monotonic()
        with socket.socket(fileno=self.connection.detach()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *arguments):
        pass


class Bucket:
    "A fresh bucket on the emulator, looked at past the proxy."

    def __init__(self, emulator, proxy, name, environment):
        self.emulator, self.proxy, self.name, self.environment = emulator, proxy, name, environment
        self.uri = f"gs://{name}"
        made = emulator.send("POST", "/storage/v1/b?project=test", json.dumps({"name": name}), JSON)
        assert made.status == 200, made

    def path(self, name):
        return f"/storage/v1/b/{self.name}/o/{quote(name, safe='')}"

    def put(self, name, content):
        "Write an object; its uri."
        content = content if isinstance(content, bytes) else content.encode()
        about, boundary = json.dumps({"name": name}).encode(), secrets.token_hex(16).encode()
        parts = [b"Content-Type: application/json\r\n\r\n" + about, b"Content-Type: application/octet-stream\r\n\r\n" + content]
        body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--"
        headers = {"Content-Type": f"multipart/related; boundary={boundary.decode()}"}
        path = f"/upload/storage/v1/b/{self.name}/o?uploadType=multipart"
        assert self.emulator.send("POST", path, body, headers).status == 200
        return f"{self.uri}/{name}"

    def put_folder(self, folder, prefix=""):
        "Write all files below a local folder; its uri."
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            self.put(f"{prefix}/{file.relative_to(folder).as_posix()}".lstrip("/"), file.read_bytes())
        return f"{self.uri}/{prefix}".rstrip("/")

    def get(self, name):
        answer = self.emulator.send("GET", self.path(name) + "?alt=media")
        if answer.status != 200:
            raise KeyError(name)
        return answer.body

    def generation(self, name):
        with self.emulator.lock:
            return self.emulator.generation(self.name, name)

    def delete(self, name):
        assert self.emulator.send("DELETE", self.path(name)).status in (200, 204)

    def names(self, prefix=""):
        answer = self.emulator.send("GET", f"/storage/v1/b/{self.name}/o?maxResults=100000&prefix={quote(prefix, safe='')}")
        return sorted(item["name"] for item in json.loads(answer.body).get("items", []))
