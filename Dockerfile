# For a rented GPU (docs/gpu.md). The driver comes from the host (docker run --gpus all), CUDA with torch. Not built here.
FROM ubuntu:24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential ca-certificates git make python3-venv rsync tmux \
 && rm -rf /var/lib/apt/lists/*
ENV UV_PYTHON_INSTALL_DIR=/opt/python LC_ALL=C.UTF-8
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9 && /opt/uv/bin/uv python install 3.11
WORKDIR /work
# The lock alone first: a changed notebook does not install everything again.
COPY requirements.lock settings.ini setup.py README.md Makefile ./
COPY grpo_engage/__init__.py grpo_engage/
RUN PIP_NO_CACHE_DIR=1 make install PYTHON="$(/opt/uv/bin/uv python find 3.11)"
COPY . .
# The stamp must be younger than what was copied; .git is there for the commit in the manifests.
RUN touch .venv/.ready && git config --system --add safe.directory /work
CMD ["bash"]
