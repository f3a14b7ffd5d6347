"""Cloud Storage over a real connection: each failure's sentence, what is survived, whole files only, copies downloaded once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cloud import Fault

from w2v2nb import bucket as module
from w2v2nb import objects

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def recording(bucket):
    return bucket.put("folder/a b é.wav", CONTENT)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("W2V2NB_STORAGE_TIMEOUT", "1")


def download(uri, folder):
    return objects.download(uri, folder / "a.wav")


def upload(uri, folder):
    (folder / "local").write_bytes(CONTENT)
    return module.upload(folder / "local", uri)


def list_objects(uri, folder):
    return module.list_objects(uri)


def remove(uri, folder):
    return module.remove(uri)


ACTIONS = [download, upload, list_objects, remove]


def run_python(code, *arguments, environment, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# What the tests stand on


def test_the_service_here_is_as_strict_as_the_real_one(bucket, tmp_path):
    first = bucket.generation("folder/x") or upload(f"{bucket.uri}/folder/x", tmp_path).generation
    assert bucket.generation("folder/x") == first
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(module.ChangedError):
        module.upload(tmp_path / "other", f"{bucket.uri}/folder/x", first + 1)
    with pytest.raises(module.ChangedError):
        module.upload(tmp_path / "other", f"{bucket.uri}/folder/x", 0)
    assert module.upload(tmp_path / "other", f"{bucket.uri}/folder/x", first).generation != first
    with pytest.raises(module.ObjectNotFound):
        objects.download(f"{bucket.uri}/folder/x", tmp_path / "old", first)
    assert bucket.get("folder/x") == b"other"


# Each failure is a sentence


FAULTS = {  # kind, cause and remedy of the sentence
    401: (module.AccessError, "no valid Google Cloud credentials", "gcloud auth application-default login"),
    403: (module.AccessError, "403", "roles/storage.object"),
    412: (module.ChangedError, "412", "nobody else works there"),
    429: (module.StorageError, "answered with 429", "try again"),
    503: (module.StorageError, "answered with 503", "check the connection"),
    "reset": (module.StorageError, "no complete answer", "check the connection"),
    "stall": (module.StorageError, "no complete answer", "check the connection"),
    "cut": (module.StorageError, "no complete answer", "check the connection"),
}
HAS_NO_BODY = [("cut", remove), ("corrupt", remove), ("corrupt", list_objects)]  # or none with a checksum


def each_action(faults):
    pairs = [(fault, action) for fault in faults for action in ACTIONS if (fault, action) not in HAS_NO_BODY]
    return pytest.mark.parametrize(("fault", "action"), pairs, ids=[f"{fault}-{action.__name__}" for fault, action in pairs])


@each_action(FAULTS)
def test_a_failure_says_what_why_and_what_to_do(fault, action, bucket, recording, impatient, tmp_path):
    kind, cause, remedy = FAULTS[fault]
    uri = recording if action is not list_objects else f"{bucket.uri}/folder"
    bucket.proxy.add(Fault(fault))
    started = time.monotonic()
    with pytest.raises(module.StorageError) as caught:
        action(uri, tmp_path)
    message = str(caught.value)
    assert time.monotonic() - started < 15, "it should end within W2V2NB_STORAGE_TIMEOUT, which is 1 s here"
    assert type(caught.value) is kind
    assert uri in message and cause in message and remedy in message and "\n" not in message
    assert action is not download or not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize("fault", ["corrupt", "cut", "half", "reset", "stall", 503])
def test_a_failed_download_leaves_what_was_there(fault, bucket, recording, impatient, tmp_path):
    (tmp_path / "to").mkdir()
    bucket.proxy.add(Fault(fault))
    (tmp_path / "to" / "a.wav").write_bytes(b"old")
    with pytest.raises(module.StorageError):
        download(recording, tmp_path / "to")
    assert os.listdir(tmp_path / "to") == ["a.wav"] and (tmp_path / "to" / "a.wav").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Bucket is a requester pays bucket but no user project provided."),
        (403, "Your application is authenticating by using local Application Default Credentials. The storage.googleapis.com API "
              "requires a quota project, which is not set by default."),
        (403, "Caller does not have required permission to use project p. Grant the caller the roles/serviceusage."
              "serviceUsageConsumer role"),
    ],
    ids=["requester-pays", "no-quota-project", "not-of-the-project"],
)  # fmt: skip
@pytest.mark.parametrize("action", ACTIONS)
def test_who_pays_has_a_remedy_of_its_own(status, message, action, bucket, recording, tmp_path):
    bucket.proxy.add(Fault(status, message=message))
    with pytest.raises(module.AccessError, match="gcloud auth application-default set-quota-project PROJECT"):
        action(recording, tmp_path)


def test_damage_is_said(bucket, recording, tmp_path):
    bucket.proxy.add(Fault("corrupt", method="GET"))
    with pytest.raises(module.StorageError, match="folder/a b é.wav came damaged .*CRC32C.*; check the connection"):
        download(recording, tmp_path)
    bucket.proxy.clear()
    bucket.proxy.add(Fault("corrupt", method="POST"))
    with pytest.raises(module.StorageError, match="damaged on its way to the bucket.*; check the connection"):
        upload(f"{bucket.uri}/new", tmp_path)
    assert bucket.names() == ["folder/a b é.wav"]


@pytest.mark.parametrize("action", [download, upload, list_objects])
def test_a_missing_bucket_is_not_a_missing_object(action, bucket, tmp_path):
    uri = f"{bucket.uri}-other/folder/a.wav"
    with pytest.raises(module.ObjectNotFound, match="there is no bucket .*gcloud storage buckets list") as caught:
        action(uri, tmp_path)
    assert str(caught.value).startswith(f"{uri}: there is no bucket {bucket.name}-other")


def test_a_missing_object(bucket, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{bucket.uri}/none is not there .*gcloud storage ls"):
        download(f"{bucket.uri}/none", tmp_path)
    assert module.list_objects(f"{bucket.uri}/none") == []
    assert module.find_object(f"{bucket.uri}/none") is None
    remove(f"{bucket.uri}/none", tmp_path)  # nothing happens


def test_no_credentials(bucket, tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom w2v2nb.objects import download\n"
        "try: download('gs://b/x', Path(sys.argv[1]))\nexcept PermissionError as e: print(e)\n"
    )
    environment = {k: v for k, v in bucket.environment.items() if not k.startswith(("STORAGE_", "GOOGLE_", "CLOUDSDK_"))}
    environment |= {"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path), "NO_GCE_CHECK": "true"}
    printed, errors = run_python(code, tmp_path / "x", environment=environment).communicate(timeout=60)
    assert "no valid Google Cloud credentials; run `gcloud auth application-default login`" in printed, errors
    assert len(printed.splitlines()) == 1


# What is survived


@each_action([503, 429, "reset", "lost", "cut", "corrupt"])
def test_what_passes_is_survived(fault, action, bucket, recording, tmp_path, monkeypatch):
    monkeypatch.setenv("W2V2NB_STORAGE_TIMEOUT", "30")
    n = 2 if fault == 503 else 1
    bucket.proxy.add(Fault(fault, n=n))
    action(recording, tmp_path)
    assert len(bucket.proxy.requests) > n
    if action is download:
        assert (tmp_path / "a.wav").read_bytes() == CONTENT
    elif action is upload:
        assert bucket.get("folder/a b é.wav") == CONTENT
    elif action is remove:
        assert bucket.names() == []


def test_a_write_whose_answer_was_lost_is_not_somebody_elses(bucket, tmp_path):
    bucket.proxy.add(Fault("lost", method="POST", n=1))
    (tmp_path / "a").write_bytes(CONTENT)
    assert module.upload(tmp_path / "a", f"{bucket.uri}/a", 0).generation == bucket.generation("a")


@pytest.mark.parametrize("n_bytes", [0, 1, 9 << 20])
def test_content_of_any_size_comes_back(n_bytes, bucket, tmp_path):
    (tmp_path / "a").write_bytes(os.urandom(n_bytes))
    sent = module.upload(tmp_path / "a", f"{bucket.uri}/a")
    came = objects.download(f"{bucket.uri}/a", tmp_path / "b")
    assert sent == came and came.size == n_bytes
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_long_listing_comes_in_pages(bucket):
    bucket.proxy.page_size = 7
    names = [f"long/{i:02}.wav" for i in range(20)] + ["long/deep/er/a.wav"]
    for name in [*names, "longer.wav"]:
        bucket.put(name, b"x")
    assert [found.uri for found in module.list_objects(f"{bucket.uri}/long")] == sorted(f"{bucket.uri}/{name}" for name in names)
    assert module.list_names(f"{bucket.uri}/long") == sorted([f"{i:02}.wav" for i in range(20)] + ["deep"])
    assert len(bucket.proxy.seen("GET", "pageToken")) == 4


# Copies on this machine


@pytest.fixture
def cache(tmp_path):
    return objects.ObjectCache(tmp_path / "copies")


def test_a_copy_is_downloaded_once(bucket, recording, cache):
    found = module.find_object(recording)
    bucket.proxy.clear()
    copies = {objects.keep_object(cache, found) for _ in range(3)}
    assert copies.pop().read_bytes() == CONTENT and not copies
    assert len(bucket.proxy.seen("GET", "alt=media")) == len(bucket.proxy.requests) == 1


def test_a_changed_object_is_downloaded_anew(bucket, recording, cache):
    old = objects.keep_object(cache, module.find_object(recording))
    bucket.put("folder/a b é.wav", b"new")
    new = objects.keep_object(cache, module.find_object(recording))
    assert new.read_bytes() == b"new" and old.read_bytes() == CONTENT


def test_an_object_that_changes_between_listing_and_download_is_refused(bucket, recording, cache):
    found = module.find_object(recording)
    bucket.put("folder/a b é.wav", b"new")
    with pytest.raises(module.StorageError, match="a b é.wav"):
        objects.keep_object(cache, found)


def test_copies_stay_below_their_limit(bucket, tmp_path):
    cache = objects.ObjectCache(tmp_path / "copies", max_bytes=10 * len(CONTENT))
    cache.n_safe = 4
    for i in range(30):
        bucket.put(f"{i:02}.wav", CONTENT)
    kept = [objects.keep_object(cache, found) for found in module.list_objects(bucket.uri)]
    there = [path for path in kept if path.exists()]
    assert sum(path.stat().st_size for path in there) <= 10 * len(CONTENT)
    assert kept[-1] in there and kept[0] not in there, "what was not used for longest goes first"
    assert all(path.read_bytes() == CONTENT for path in there)


def test_copies_of_an_earlier_process_count(tmp_path):
    for i in range(3):
        objects.ObjectCache(tmp_path / "copies").keep(str(i), lambda folder: (folder / "x").write_bytes(CONTENT))
    assert objects.ObjectCache(tmp_path / "copies").n_bytes == 3 * len(CONTENT)


STAGE = (
    "import sys\nfrom w2v2nb import bucket, objects\n"
    "cache = objects.ObjectCache(objects.cache_dir() / 'objects')\n"
    "for found in bucket.list_objects(sys.argv[1]): print(objects.keep_object(cache, found))\n"
)


def test_several_processes_share_the_copies(bucket):
    contents = {f"{i:02}.wav": os.urandom(2000) for i in range(40)}
    for name, content in contents.items():
        bucket.put(name, content)
    bucket.proxy.delay_s = 0.005  # so that they meet
    processes = [run_python(STAGE, bucket.uri, environment=bucket.environment) for _ in range(3)]
    for process in processes:
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert {Path(path).name: Path(path).read_bytes() for path in printed.splitlines()} == contents
    copies = Path(bucket.environment["XDG_CACHE_HOME"]) / "w2v2nb" / "objects"
    assert len(list(copies.iterdir())) == len(contents), "neither a copy twice nor a leftover"


def test_a_process_that_is_killed_while_it_downloads_leaves_a_usable_cache(bucket, recording):
    bucket.proxy.add(Fault("half", path="alt=media", n=1))
    process = run_python(STAGE, bucket.uri, environment=bucket.environment)
    until = time.monotonic() + 30
    while not any(r.status == 200 for r in bucket.proxy.seen("GET", "alt=media")) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)  # half of the body is on the disk
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    printed, errors = run_python(STAGE, bucket.uri, environment=bucket.environment).communicate(timeout=60)
    assert Path(printed.strip()).read_bytes() == CONTENT, errors


def test_many_downloads_are_on_their_way_at_once(bucket, tmp_path):
    for i in range(40):
        bucket.put(f"{i:02}.wav", CONTENT)
    found = module.list_objects(bucket.uri)
    bucket.proxy.delay_s = 0.1
    objects.download_all(bucket.uri, found, tmp_path / "all")
    assert bucket.proxy.most_at_once("GET", "alt=media") >= module.N_THREADS // 2
    assert all((tmp_path / "all" / f"{i:02}.wav").read_bytes() == CONTENT for i in range(40))


def test_the_environment_s_proxy_and_certificates_are_used(bucket, recording, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.invalid")
    monkeypatch.setenv("HTTP_PROXY", bucket.proxy.address)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/certificates.pem")
    module.forget_client()
    assert [found.uri for found in module.list_objects(bucket.uri)] == [recording]
    assert bucket.proxy.seen("GET", "http://storage.invalid/")
    assert module.client()._http.verify == "/certificates.pem"


def test_a_failed_download_in_a_folder_leaves_no_copy(bucket, recording, cache, impatient):
    bucket.put("folder/b.wav", CONTENT)
    bucket.proxy.add(Fault(403, path="b.wav?"))
    listed = module.list_objects(f"{bucket.uri}/folder")
    with pytest.raises(PermissionError, match=re.escape("b.wav")):
        objects.keep_folder(cache, f"{bucket.uri}/folder", listed)
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "../../evil", "a/../../evil", "/evil", "a//evil"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name, cache):
    with pytest.raises(module.StorageError, match="leads out|rename it"):
        objects.download_all("gs://b/folder", [module.Object(f"gs://b/folder/{name}", 1, 1, "")], cache.folder / "to")


def test_a_manifest_of_somebody_else_is_said(bucket, cache):
    bucket.put("folder/manifest.json", json.dumps(["something else"]))
    with pytest.raises(module.StorageError, match="not a manifest of w2v2nb"):
        objects.keep_folder(cache, f"{bucket.uri}/folder", module.list_objects(f"{bucket.uri}/folder"))


# Recordings, fetched ahead of the reader


@pytest.fixture
def recordings(bucket):
    "Twelve of the shipped recordings in a bucket: its folder, and their table."
    from w2v2nb import data, samples

    table = data.read_annotations(f"{samples.split_root()}/train.csv").head(12)
    for uid in table.uid:
        bucket.put_folder(Path(samples.prefix()) / uid, f"recordings/{uid}")
    return f"{bucket.uri}/recordings", table


def read(prefix, table, **options):
    "The waveforms of a table by uid, and the recordings that were set aside."
    from w2v2nb.batch import Batches
    from w2v2nb.data import WaveformDataset
    from w2v2nb.transforms import pipeline

    batches = Batches(WaveformDataset(table, [], pipeline(prefix)), max_items=5, **options)
    try:
        found = {uid: row[:n].numpy() for b in batches for uid, row, n in zip(b.uids, b.waveform, b.lengths, strict=True)}
    finally:
        batches.close()
    return found, batches.failures


@pytest.mark.parametrize("num_workers", [0, 2])
def test_recordings_in_a_bucket_are_those_on_this_machine(num_workers, bucket, recordings):
    from w2v2nb import samples

    prefix, table = recordings
    bucket.proxy.delay_s = 0.1
    found, failures = read(prefix, table, num_workers=num_workers)
    wanted, _ = read(samples.prefix(), table)
    assert failures == [] and sorted(found) == sorted(wanted) == sorted(table.uid)
    assert all((found[uid] == wanted[uid]).all() for uid in wanted)
    n_files = sum(len(list((Path(samples.prefix()) / uid).iterdir())) for uid in table.uid)
    assert len(bucket.proxy.seen("GET", "alt=media")) == n_files, "each file is downloaded once, whoever reads it"
    assert bucket.proxy.most_at_once("GET", "alt=media") >= 6, "while one is on its way, others are too"


def test_a_recording_that_is_missing_or_damaged_is_set_aside(bucket, recordings):
    prefix, table = recordings
    missing, damaged = table.uid.iloc[3], table.uid.iloc[7]
    for name in bucket.names(f"recordings/{missing}/"):
        bucket.delete(name)
    bucket.proxy.add(Fault("corrupt", path=f"{damaged}/waveform"))
    found, failures = read(prefix, table)
    assert sorted(found) == sorted(set(table.uid) - {missing, damaged})
    told = {failure.uid: failure.error for failure in failures}
    assert sorted(told) == sorted([missing, damaged])
    assert "is there; correct the prefix" in told[missing]
    assert f"{prefix}/{damaged}/waveform" in told[damaged] and "CRC32C" in told[damaged]


@pytest.mark.parametrize("fault", [403, 503])
def test_a_bucket_that_does_not_answer_ends_the_reading(fault, bucket, recordings, impatient):
    "It concerns all recordings: setting them aside one by one would leave a table that looks finished."
    prefix, table = recordings
    bucket.proxy.add(Fault(fault, path=f"{table.uid.iloc[5]}/waveform"))
    with pytest.raises(module.StorageError, match=f"{prefix}/{table.uid.iloc[5]}.*{fault}"):
        read(prefix, table)


def test_an_interrupted_reader_does_not_wait_for_a_bucket_that_is_silent(bucket, recordings):
    prefix, table = recordings
    code = (
        "import sys\nfrom w2v2nb import storage\nfrom w2v2nb.workers import prepare_ahead\n"
        "names = iter(prepare_ahead(storage.stage, sys.argv[1:]))\n"
        "print('waiting', flush=True)\nnext(names)\n"
    )
    bucket.proxy.add(Fault("stall", path="waveform"))
    uris = [f"{prefix}/{uid}/waveform.flac" for uid in table.uid]
    process = run_python(code, *uris, environment=bucket.environment | {"W2V2NB_STORAGE_TIMEOUT": "120"})
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
