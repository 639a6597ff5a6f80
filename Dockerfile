# docker build -t inscon . && docker run --gpus all -v /data:/data inscon python scripts/train.py --help
# The README's steps on Ubuntu 24.04, whose Python is 3.12. It has not been built by us yet (docs/container.md).
FROM nvidia/cuda:12.8.1-base-ubuntu24.04
# make and python3-venv are the README's, the others the Makefile's APT: what FFCV, and Triton's launcher, are compiled with.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      make python3-venv g++ pkg-config python3-dev libopencv-dev libturbojpeg0-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /inscon
COPY . .
RUN make ffcv
ENV PATH=/inscon/.venv/bin:$PATH
