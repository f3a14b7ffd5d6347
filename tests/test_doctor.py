"""`w2v2nb doctor`: what it says of buckets that refuse, of credentials and of this machine, and that it leaves nothing behind."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from cloud import Fault

from w2v2nb import doctor
from w2v2nb.config import ConfigError

TOKEN = "ya29.secret-access-token"


def marks(findings):
    return {finding.what: finding.mark for finding in findings}


def run_doctor(*arguments, **environment):
    "The command in a process of its own, which has no credentials but what the environment names."
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH", "HF_HUB_OFFLINE") if name in os.environ}
    code = "import sys; from w2v2nb.doctor import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120)


def test_all_is_well_and_nothing_is_left(bucket, capsys):
    bucket.put("study/a.wav", b"sound")
    assert doctor.main([bucket.uri]) == 0
    last = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert last == [["ok", f"{what}:"] for what in ("list", "read", "write", "remove")]
    assert bucket.names() == ["study/a.wav"]
    assert len(bucket.proxy.seen("DELETE", doctor.PROBE)) == 1
    assert not bucket.proxy.seen("DELETE", "a.wav") and not bucket.proxy.seen("POST", "a.wav")


def test_only_what_lies_below_the_folder_is_touched(bucket):
    bucket.put("other/b.wav", b"sound")
    found = list(doctor.probe_bucket(f"{bucket.uri}/study"))
    assert marks(found) == dict(list="ok", read="ok", write="ok", remove="ok") and "nothing is there yet" in found[0].told
    assert not bucket.proxy.seen(path="b.wav")
    assert bucket.proxy.seen("DELETE", f"study/{doctor.PROBE}") and bucket.names() == ["other/b.wav"]


def test_a_gcs_path_is_the_same(bucket):
    bucket.put("study/a.wav", b"sound")
    found = doctor.examine(f"/gcs/{bucket.name}/study/")
    assert {"list": "ok", "read": "ok", "write": "ok", "remove": "ok"}.items() <= marks(found).items()
    assert f"{bucket.uri}/study can be listed" in repr(found)


@pytest.mark.parametrize(
    ("fault", "found", "told"),
    [
        (Fault(403, "/o?", "GET"), dict(list="no", read="ok", write="ok", remove="ok"), "roles/storage.objectViewer"),
        (Fault(403, "alt=media", "GET"), dict(list="ok", read="no", write="ok", remove="ok"), "roles/storage.objectViewer"),
        (Fault(403, "/upload/", "POST"), dict(list="ok", read="ok", write="no"), "roles/storage.objectUser"),
        (Fault(403, method="DELETE"), dict(list="ok", read="ok", write="ok", remove="no"), "roles/storage.objectUser"),
        (Fault(403), dict(list="no", read="--", write="no"), "roles/storage.objectUser"),
        (Fault(503), dict(list="no"), "try again"),
        (Fault("reset"), dict(list="no"), "try again"),
    ],
    ids=["list", "read", "write", "remove", "all", "down", "unreachable"],
)
def test_each_refusal_is_a_line_with_its_remedy(bucket, monkeypatch, fault, found, told):
    monkeypatch.setenv("W2V2NB_STORAGE_TIMEOUT", "2")
    uri = bucket.put("study/a.wav", b"sound").rpartition("/")[0]
    bucket.proxy.add(fault)
    findings = list(doctor.probe_bucket(uri))
    assert marks(findings) == found
    assert any(finding.mark == "no" and told in finding.told and bucket.uri in finding.told for finding in findings)
    left = [name for name in bucket.names() if doctor.PROBE in name]
    assert len(left) == (found.get("remove") == "no")


def test_a_bucket_that_is_not_there_is_said_once(bucket):
    (found,) = doctor.probe_bucket(f"{bucket.uri}-of-old/study")
    assert found.mark == "no" and f"there is no bucket {bucket.name}-of-old" in found.told


def test_without_credentials_the_remedy_is_one_line_and_the_status_1(tmp_path):
    done = run_doctor("gs://somewhere/study", HOME=str(tmp_path), NO_GCE_CHECK="true")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (wrong,) = [line for line in done.stdout.splitlines() if line.startswith("no")]
    assert wrong.startswith("no  account:") and "gcloud auth application-default login" in wrong
    assert done.stdout.splitlines()[-1] == wrong, "the bucket should not be asked"


def test_credentials_that_name_no_file_are_explained(tmp_path):
    environment = dict(HOME=str(tmp_path), NO_GCE_CHECK="true", GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"))
    done = run_doctor("gs://somewhere/study", **environment)
    assert done.returncode == 1 and "key.json" in done.stdout and "Traceback" not in done.stderr


def test_without_a_bucket_no_credentials_are_needed(tmp_path):
    done = run_doctor(str(tmp_path), HOME=str(tmp_path), NO_GCE_CHECK="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--  account:" in done.stdout and "ok  write:" in done.stdout


class Metadata(BaseHTTPRequestHandler):
    "What a machine of Google's says about its service account."

    account = {"email": "robot@study.iam.gserviceaccount.com", "scopes": ["cloud-platform"], "aliases": ["default"]}

    def do_GET(self):
        path = self.path.partition("?")[0]
        answer = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"} if path.endswith("/token") else self.account
        text = "study-project" if path.endswith("project-id") else json.dumps(answer)
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", "text/plain" if path.endswith("project-id") else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def machine():
    "The address of a metadata server, such as a Workbench machine has."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_on_a_machine_of_google_s_the_service_account_is_named_and_its_token_is_not(machine, tmp_path):
    done = run_doctor(HOME=str(tmp_path), GCE_METADATA_HOST=machine, GCE_METADATA_IP=machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok  account:  robot@study.iam.gserviceaccount.com (service account)" in done.stdout
    assert "ok  project:  study-project" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_a_person_is_named_by_the_identity_token():
    from google.oauth2.credentials import Credentials

    header, claims = ({"alg": "RS256", "kid": "1"}, {"email": "someone@example.org"})
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims)]
    assert doctor.find_email(Credentials(TOKEN, id_token=".".join([*parts, "c2lnbmVk"]))) == "someone@example.org"
    assert doctor.find_email(Credentials(TOKEN)) is None


def test_a_kernel_of_another_python_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    about = {"argv": ["/opt/other/bin/python"], "display_name": "x", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(about))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    found = doctor.find("kernel", doctor.tell_kernel)
    assert found.mark == "no" and "/opt/other/bin/python" in found.told and "ipykernel install" in found.told


def test_a_cache_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").touch()
    done = run_doctor(HOME=str(tmp_path), NO_GCE_CHECK="true", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.returncode == 1 and "no  disk:" in done.stdout and "cannot be made" in done.stdout, done.stdout + done.stderr


def test_folders_of_this_machine(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")
    assert marks(doctor.probe_folder(str(tmp_path))) == dict(list="ok", write="ok")
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert marks(doctor.probe_folder(str(tmp_path / "none"))) == dict(list="no")
    if os.path.isdir("/proc/self"):  # where nobody can write, root included
        assert marks(doctor.probe_folder("/proc/self")) == dict(list="ok", write="no")


@pytest.mark.parametrize("arguments", [["gs://a", "gs://b"], ["--all"]])
def test_what_it_does_not_take(arguments):
    with pytest.raises(ConfigError, match="at most one word"):
        doctor.main(arguments)


def test_another_scheme_is_refused_before_any_check(capsys):
    with pytest.raises(ValueError, match="s3://"):
        doctor.main(["s3://bucket"])
    assert not capsys.readouterr().out
