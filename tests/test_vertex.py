"""Vertex AI without Vertex AI: requests in the client library's own types, a job's environment, trials, the container."""

import configparser
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform_v1
from google.cloud.aiplatform_v1.services.job_service.transports.rest import JobServiceRestTransport
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from w2v2nb import samples, storage, vertex
from w2v2nb.config import Config, ConfigError, configure
from w2v2nb.flags import parse, write_flags
from w2v2nb.folder import RunFolder
from w2v2nb.job import job_folder, report_metric
from w2v2nb.tuning import collect_trials, describe_study

root = Path(__file__).parent.parent
image = "europe-west4-docker.pkg.dev/clinic/w2v2nb/w2v2nb:0.1.0"
where = f"--project clinic --region europe-west4 --image {image}"
inputs = "-i gs://b/wav -d gs://b/split -o gs://b/runs/1"
console = "https://console.cloud.google.com/agent-platform"  # as google-cloud-aiplatform 2.7.0 has it
finetune = f"finetune {inputs} -l gs://b/labels.txt"


def make_request(task, flags):
    config, place = vertex.read_job(f"{flags} {where}".split())
    return (vertex.request_job if task == "submit" else vertex.request_tuning)(config, place)


def read_back(request):
    "The request in the library's own types, which refuse what they don't know."
    is_tuning = "hyperparameterTuningJob" in request
    kind = aiplatform_v1.CreateHyperparameterTuningJobRequest if is_tuning else aiplatform_v1.CreateCustomJobRequest
    return ParseDict(request, kind.pb(kind()), ignore_unknown_fields=False)


def without_zeros(request):
    "Without numbers that are 0, which the library leaves out when it writes."
    if isinstance(request, dict):
        return {name: without_zeros(value) for name, value in request.items() if value not in (0, "0") or value is False}
    return [without_zeros(value) for value in request] if isinstance(request, list) else request


# Requests

REQUESTS = {
    "finetune": ("submit", f"{finetune} -e 10 --layer 12 --accelerator NVIDIA_TESLA_T4 --spot --name first"),
    "two accelerators": ("submit", f"{finetune} --accelerator NVIDIA_L4:2 --machine g2-standard-24 --service_account s@c.iam"),
    "eval-only": ("submit", f"eval-only {inputs} -mp gs://b/model"),
    "extraction": ("submit", f"extraction {inputs} --layer -1,0 -c /gcs/b/checkpoint --trim"),
    "bucket and prefix": ("submit", "extraction -b b -i wav -d gs://b/t.csv -o gs://b/1"),
    "tune a range": ("tune", f"{finetune} --search learning_rate=1e-5:1e-3 --search layer=0:12 --trials 20 --parallel 4"),
    "tune a grid": ("tune", f"{finetune} --search layer=6,weighted --search batch_size=16,4"),
    "tune by loss": ("tune", f"{finetune} --search mixup=0:1 --trials 3 --monitor loss --spot"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_one_of_the_librarys(name):
    request = make_request(*REQUESTS[name])
    known = MessageToDict(read_back(request))
    assert without_zeros(json.loads(json.dumps(request))) == known, "the library should read every field, and as it is written"


@pytest.mark.parametrize("path", [("customJob",), ("customJob", "jobSpec"), ("customJob", "jobSpec", "scheduling")])
def test_the_librarys_types_refuse_a_field_they_do_not_know(path):
    request = make_request(*REQUESTS["finetune"])
    part = request
    for name in path:
        part = part[name]
    part["acceleratorTyp"] = "x"
    with pytest.raises(ParseError, match="acceleratorTyp"):
        read_back(request)


def test_a_spot_job_is_restarted_and_goes_on():
    spec = read_back(make_request(*REQUESTS["finetune"])).custom_job.job_spec
    assert spec.scheduling.strategy == aiplatform_v1.Scheduling.Strategy.SPOT and spec.scheduling.restart_job_on_worker_restart
    assert "--resume=True" in spec.worker_pool_specs[0].container_spec.args
    assert spec.base_output_directory.output_uri_prefix == "gs://b/runs/1"
    mounted = make_request("submit", f"{finetune} -o /gcs/b/runs/1")
    assert read_back(mounted).custom_job.job_spec.base_output_directory.output_uri_prefix == "gs://b/runs/1"


def test_accelerators_are_the_librarys():
    there = {kind.name for kind in aiplatform_v1.AcceleratorType if kind.name.startswith("NVIDIA")}
    assert there - {*vertex.ACCELERATORS} == {f"NVIDIA_TESLA_{old}" for old in ("K80", "P4", "P100", "V100")}
    assert {*vertex.ACCELERATORS} <= there


def test_the_accelerators_left_out_are_those_that_torch_does_not_know():
    arches = torch._C._cuda_getArchFlags()
    if not arches:
        pytest.skip("this PyTorch is one for the CPU")
    assert "sm_75" in arches and not {"sm_37", "sm_60", "sm_61", "sm_70"} & {*arches.split()}


@pytest.mark.parametrize("name", [name for name, (task, _) in REQUESTS.items() if task == "submit"])
def test_the_jobs_arguments_mean_the_configuration_that_was_checked(name, monkeypatch):
    task, flags = REQUESTS[name]
    config, place = vertex.read_job(f"{flags} {where}".split())
    container = vertex.describe_container(config, place)
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", f"{config.exp_dir}/checkpoints/")
    assert not any(argument.endswith("=None") for argument in container["args"])
    values = parse(container["args"])
    in_job = configure(values.pop("words")[0], **values)
    assert in_job == config.model_copy(update={"resume": True, "device": "cuda" if place.accelerator else None})


@pytest.mark.parametrize("name", Config.model_fields)
def test_every_field_survives_its_flag(name):
    values = {"mode": "extraction", "layer": "-1,0", "pooling_mode": "mean,max", "tune": "top:2", "pos_weight": "2,3.5"}
    values |= {"lib": False, "folds": 3, "search": "dropout=0,0.5; layer=1,2", "scale": "clinical", "log": "tensorboard"}
    default = Config.model_fields[name].default
    config = Config(**{"mode": "finetune", name: values.get(name, "3" if default is None else default)})
    values = parse(write_flags(config))
    assert Config(mode=values.pop("words")[0], **values) == config


REFUSED = {
    f"submit extraction {inputs} -d t.csv {where}": "data_split_root t.csv is on this machine",
    f"submit extraction {inputs} -c ./checkpoint {where}": "checkpoint ./checkpoint is on this machine",
    f"submit extraction {inputs} -c {samples.checkpoint()} {where}": "is on this machine",
    f"submit extraction -i wav -d t.csv -o out {where}": "exp_dir out is on this machine",
    f"submit extraction {inputs} -i s3://b/wav {where}": "local or begins with gs://",
    f"submit extraction {inputs} --overwrite {where}": "would begin anew whenever the job is restarted",
    f"submit extraction {inputs} --accelerator T4 {where}": "did you mean NVIDIA_TESLA_T4?",
    f"submit extraction {inputs} --accelerator NVIDIA_L4:0 {where}": "should be TYPE or TYPE:COUNT",
    f"submit extraction {inputs} --accelerator NVIDIA_L4:2 {where}": "extraction uses one",
    f"submit extraction {inputs}": "a job needs --project, the Google Cloud project; a job needs --region",
    f"submit extraction {inputs} --regoin x {where}": "--regoin is not a flag",
    f"submit extraction {inputs} --bach_size 3 {where}": "did you mean --batch_size?",
    f"submit extraction {inputs} {where} --parallel x": "--parallel",
    f"submit {inputs} {where}": "is not a mode",
    f"tune extraction {inputs} {where}": "only finetune has something to tune",
    f"tune {finetune} {where}": "give --search",
    f"tune {finetune} {where} --search dropuot=0,1": "did you mean dropout?",
    f"tune {finetune} {where} --search dropout=0,0.5 --folds 5": "leave out folds",
    f"tune {finetune} {where} --search dropout=0:0.5": "is a range",
    "launch": "vertex takes submit MODE",
    "results": "vertex takes submit MODE",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_run_is_refused(line, capsys):
    with pytest.raises(ConfigError) as found:
        vertex.main([*line.split(), "--dry_run"])
    assert REFUSED[line] in str(found.value)
    assert capsys.readouterr().out == ""


def test_help_names_every_flag(capsys):
    assert vertex.main([]) == vertex.main(["submit", "--help"]) == 0
    printed = capsys.readouterr().out
    for field in fields(vertex.Place):
        assert f"--{field.name} " in printed
    assert f"[{vertex.Place().machine}]" in printed and f"[{vertex.Place().parallel}]" in printed


# Sending

BLOCK = "import sys; sys.modules['google'] = None; from w2v2nb.vertex import main; main(sys.argv[1:])"


def run_without_google(arguments):
    return subprocess.run([sys.executable, "-c", BLOCK, *arguments.split()], capture_output=True, text=True, timeout=120)


def test_a_request_is_printed_without_the_cloud_and_its_library():
    arguments = f"submit {finetune} {where}"
    done = run_without_google(f"{arguments} --dry_run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == make_request("submit", finetune)
    done = run_without_google(arguments)
    assert done.returncode and "pip install 'w2v2nb[vertex]'" in done.stderr.splitlines()[-1]


class Service(BaseHTTPRequestHandler):
    "As much of Vertex AI's REST interface as takes a job."

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.taken.append((self.path.partition("?")[0], body))
        name = f"projects/42/locations/europe-west4/{self.path.partition('?')[0].rpartition('/')[2]}/123"
        refused = {"error": {"code": 403, "message": "Permission aiplatform.customJobs.create denied"}}
        status, answer = (200, {"name": name}) if self.server.grants else (403, refused)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.taken, server.grants = [], True
    host = f"http://127.0.0.1:{server.server_port}"
    transport = JobServiceRestTransport(host=host, credentials=AnonymousCredentials(), url_scheme="http")
    server.client = aiplatform_v1.JobServiceClient(transport=transport)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name, resource", [("finetune", "customJobs"), ("tune a range", "hyperparameterTuningJobs")])
def test_a_job_is_sent_as_it_is_printed(name, resource, service):
    request = make_request(*REQUESTS[name])
    job = vertex.submit(request, service.client)
    ((path, body),) = service.taken
    assert path == f"/v1/projects/clinic/locations/europe-west4/{resource}"
    kind = aiplatform_v1.CustomJob if resource == "customJobs" else aiplatform_v1.HyperparameterTuningJob
    sent = MessageToDict(ParseDict(body, kind.pb(kind()), ignore_unknown_fields=False))
    assert sent == without_zeros(request)["customJob" if resource == "customJobs" else "hyperparameterTuningJob"]
    assert vertex.console_uri(job) == f"{console}/locations/europe-west4/training/123?project=42"


def test_a_refused_job_is_one_sentence(service):
    service.grants = False
    with pytest.raises(OSError, match="did not take the job: 403.*customJobs.create denied.*roles/aiplatform.user"):
        vertex.submit(make_request(*REQUESTS["finetune"]), service.client)


def test_missing_credentials_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(OSError, match="no valid Google Cloud credentials.*gcloud auth application-default login"):
        vertex.submit(make_request(*REQUESTS["finetune"]))


# Tuning


def test_a_study_says_what_varies_and_what_is_best():
    search = "learning_rate=1e-5:1e-3; mixup=0:1; layer=0:12; batch_size=16,4; loss=BCE,focal; freeze=True,False"
    config = configure("finetune", **dict(prefix="a", data_split_root="b", label_txt="l", exp_dir="c"), search=search, trials=9)
    study, n_trials = describe_study(config)
    spec = ParseDict(study, aiplatform_v1.StudySpec.pb(aiplatform_v1.StudySpec()), ignore_unknown_fields=False)
    kinds = {p.parameter_id: p.WhichOneof("parameter_value_spec") for p in spec.parameters}
    assert kinds == {
        "learning_rate": "double_value_spec", "mixup": "double_value_spec", "layer": "integer_value_spec",
        "batch_size": "discrete_value_spec", "loss": "categorical_value_spec", "freeze": "categorical_value_spec",
    }  # fmt: skip
    scales = {p.parameter_id: p.scale_type for p in spec.parameters[:3]}
    linear, log = (aiplatform_v1.StudySpec.ParameterSpec.ScaleType[f"UNIT_{kind}_SCALE"] for kind in ("LINEAR", "LOG"))
    assert scales == {"learning_rate": log, "mixup": linear, "layer": linear}
    assert list(spec.parameters[3].discrete_value_spec.values) == [4, 16], "in increasing order"
    assert spec.metrics[0].metric_id == "metric" and spec.metrics[0].goal == aiplatform_v1.StudySpec.MetricSpec.GoalType.MAXIMIZE
    assert n_trials == 9


def test_a_trial_is_a_run_that_validates(monkeypatch):
    job = make_request("tune", f"{finetune} --search batch_size=16,4 --search layer=6,12 --search freeze=True,False")
    job = job["hyperparameterTuningJob"]
    assert job["maxTrialCount"] == 8 and job["studySpec"]["algorithm"] == "GRID_SEARCH"
    arguments = job["trialJobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://b/runs/1/7/checkpoints/")
    values = parse([*arguments, "--batch_size=16.0", "--layer=6", "--freeze=False"])  # as Vertex AI adds them
    trial = configure(values.pop("words")[0], **values)
    assert (trial.batch_size, trial.layer, trial.freeze) == (16, 6, False)
    assert trial.exp_dir == "gs://b/runs/1/7" and not trial.search
    assert "monitor" in trial.model_fields_set, "so that a run without validation is refused"


# what cloudml-hypertune 0.1.0.dev6 writes for report_hyperparameter_tuning_metric("metric", 0.8125, 3) in trial 7
HYPERTUNE = '{"checkpoint_path": "", "global_step": "3", "metric": "0.8125", "timestamp": 0.0, "trial": "7"}'


def test_a_report_has_the_form_of_googles_package(monkeypatch, tmp_path):
    path = tmp_path / "hypertune" / "output.metrics"  # its folder need not be there
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(path))
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "7")
    history = [{"epoch": epoch, "metric": 0.8125, "validation_loss": 0.5} for epoch in range(1, 151)]
    report_metric(history[:3])
    assert re.sub(r'"timestamp": [\d.]+', '"timestamp": 0.0', path.read_text().splitlines()[-1]) == HYPERTUNE
    report_metric(history)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [int(line["global_step"]) for line in lines] == list(range(51, 151))


def write_trial(folder, metric, monitor="auc", **parameters):
    trial = RunFolder(folder)
    parameters |= {"monitor": monitor, "exp_dir": str(folder)}
    trial.write(name="s", mode="finetune", state="finished", seconds=1, parameters=parameters)
    storage.write_text(trial / "history.csv", f"epoch,metric,validation_loss\n1,0.1,0.9\n2,{metric},{1 - metric}\n")
    storage.write_text(trial / "model" / "weights", "large")


@pytest.mark.parametrize("monitor", ["auc", "loss"])
def test_trials_are_sorted_by_what_they_watched(monitor, tmp_path):
    for number, metric in enumerate([0.6, 0.9, 0.7], 1):
        write_trial(tmp_path / str(number), metric, monitor, learning_rate=number / 1000, epochs=2)
    (tmp_path / "notes").mkdir()
    table = collect_trials(tmp_path)
    assert table["trial"].tolist() == ["2", "3", "1"] and table["best_epoch"].tolist() == [2, 2, 2]
    assert table["learning_rate"].tolist() == [0.002, 0.003, 0.001] and "epochs" not in table and "exp_dir" not in table


def test_trials_in_a_bucket_are_collected_without_their_models(bucket, tmp_path, capsys):
    for number, metric in enumerate([0.6, 0.9], 1):
        write_trial(tmp_path / str(number), metric, learning_rate=number / 1000)
    for file in (path for path in tmp_path.rglob("*/*") if path.is_file()):
        bucket.put(f"study/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
    assert vertex.main(["results", f"{bucket.uri}/study/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trial,state,best_epoch,metric,validation_loss,learning_rate,seconds,error"
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "1"]
    read = [request.path for request in bucket.proxy.seen("GET", "/download/")]
    assert len(read) == 4 and not any("s_model" in path for path in read), "a record and a history of each"


@pytest.mark.parametrize("monitor, name", [("auc", "metric"), ("loss", "validation_loss")])
def test_a_run_in_a_trial_reports_every_epoch(monitor, name, monkeypatch, tmp_path):
    from w2v2nb.run import start

    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(tmp_path / "output.metrics"))
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", str(tmp_path / "7" / "checkpoints"))
    inputs = dict(prefix=samples.prefix(), data_split_root=samples.split_root(), label_txt=samples.label_txt())
    inputs |= dict(checkpoint=samples.checkpoint(), device="cpu", cache_gb=0, val_share=0.25)
    folder = start(configure("finetune", **inputs, epochs=3, monitor=monitor))
    lines = [json.loads(line) for line in (tmp_path / "output.metrics").read_text().splitlines()]
    rows = (folder / "history.csv").read_text().splitlines()
    values = [float(row.split(",")[rows[0].split(",").index(name)]) for row in rows[1:]]
    assert [float(line[name]) for line in lines] == pytest.approx(values) and len(values) == 3
    assert collect_trials(tmp_path)["metric"].notna().all()


# In a job


@pytest.mark.parametrize(
    "environment, folder",
    [
        ({"AIP_CHECKPOINT_DIR": "gs://b/1/checkpoints/", "AIP_MODEL_DIR": "gs://b/other/model/"}, "gs://b/1"),
        ({"AIP_MODEL_DIR": "gs://b/1/7/model"}, "gs://b/1/7"),
        ({"AIP_CHECKPOINT_DIR": "/gcs/b/1/checkpoints/"}, "gs://b/1"),
        ({}, None),
    ],
)
def test_a_jobs_folder(environment, folder, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert job_folder() == folder


def test_a_given_exp_dir_counts_more_than_the_jobs(monkeypatch):
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://b/1/checkpoints/")
    given = dict(prefix="a", data_split_root="b")
    assert configure("extraction", **given, exp_dir="mine").exp_dir == "mine"
    assert configure("extraction", **given).exp_dir == configure("extraction", **given, exp_dir="None").exp_dir == "gs://b/1"


def test_a_job_runs_in_its_bucket_and_leaves_what_vertex_looks_for(bucket, monkeypatch, capsys):
    from w2v2nb.run import start

    for variable, name in {"MODEL_DIR": "model", "CHECKPOINT_DIR": "checkpoints", "TENSORBOARD_LOG_DIR": "logs"}.items():
        monkeypatch.setenv(f"AIP_{variable}", f"{bucket.uri}/runs/1/{name}/")
    inputs = dict(prefix=samples.prefix(), data_split_root=samples.split_root(), label_txt=samples.label_txt())
    inputs |= dict(checkpoint=samples.checkpoint(), device="cpu", log="tensorboard", dataset="s", resume=True)
    for _ in range(2):  # resume begins what is not there, and the job that was sent again has nothing to do
        folder = start(configure("finetune", **inputs))
        vertex.finish_job(folder)
    printed = capsys.readouterr().out
    assert "nothing left to do" in printed and printed.count(f"copied to {bucket.uri}/runs/1/model") == 2
    names = [name.removeprefix("runs/1/") for name in bucket.names()]
    assert {"run.json", "s_metrics.csv", "s_model/model.safetensors", "model/manifest.json"} <= {*names}
    assert any(re.match(r"logs/.*tfevents", name) for name in names)
    assert bucket.get("runs/1/model/model.safetensors") == bucket.get("runs/1/s_model/model.safetensors")


# The container


def dockerfile():
    "The instructions, as (word, rest)."
    text = re.sub(r"\\\n", " ", (root / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def copied():
    return [path for word, rest in dockerfile() if word == "COPY" for path in rest.split()[:-1]]


def test_the_container_is_what_a_job_needs():
    said = dict(dockerfile())
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    version = re.fullmatch(r"python:(3\.\d+)-slim", said["FROM"])[1]
    assert version == "3.11" and settings["DEFAULT"]["min_python"] <= version <= settings["DEFAULT"]["max_python"]
    assert json.loads(said["ENTRYPOINT"]) == ["python", "-m", "w2v2nb"]
    runs = [rest for word, rest in dockerfile() if word == "RUN"]
    assert any("ffmpeg" in run for run in runs) and any("-c constraints.txt" in run for run in runs)
    assert said["USER"] not in ("root", "0"), "the last USER is who the job runs as"
    words = [word for word, _ in dockerfile()]
    assert words.index("USER") < words.index("ENTRYPOINT") and "ADD" not in words and "ARG" not in words


def test_the_container_gets_the_package_and_nothing_else(tmp_path):
    assert all((root / path).exists() for path in copied())
    assert {*copied()} <= {"settings.ini", "setup.py", "LICENSE", "constraints.txt", "README.md", "w2v2nb"}
    ignored = [line for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert ignored[0] == "*" and {*copied()} == {line[1:] for line in ignored if line.startswith("!")}
    for path in copied():  # what the container is built from is enough to build it
        copy = shutil.copytree if (root / path).is_dir() else shutil.copy
        copy(root / path, tmp_path / path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    environment = os.environ | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert fnmatch.filter(os.listdir(tmp_path / "dist"), "w2v2nb-*.whl")
