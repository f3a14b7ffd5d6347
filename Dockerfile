# The container of a Vertex AI job (see nbs/14b_vertex.ipynb), or of any machine with Docker. No data, no credentials: both come with the job.
#   docker build -t REGION-docker.pkg.dev/PROJECT/w2v2nb/w2v2nb:VERSION . && docker push REGION-docker.pkg.dev/PROJECT/w2v2nb/w2v2nb:VERSION
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends ffmpeg && rm -rf /var/lib/apt/lists/*

# torch from PyPI brings its CUDA 13 libraries. The driver comes from the machine: 580 or newer, a GPU from Turing (T4) on.
# The names are those by which NVIDIA's own images ask for it.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/local/nvidia/lib \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1

WORKDIR /opt/w2v2nb

# First what w2v2nb needs, several gigabytes, which changes rarely; then w2v2nb itself.
COPY settings.ini setup.py LICENSE constraints.txt ./
RUN mkdir w2v2nb && touch README.md w2v2nb/__init__.py && pip install --no-cache-dir -c constraints.txt . && rm -rf build *.egg-info
COPY README.md ./
COPY w2v2nb w2v2nb
RUN pip install --no-cache-dir --no-deps --force-reinstall .

RUN useradd --create-home w2v2nb
USER w2v2nb
WORKDIR /home/w2v2nb

ENTRYPOINT ["python", "-m", "w2v2nb"]
