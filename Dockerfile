# captioner on a CPU, for the user that it is run as; needs no network once it is built.
#
#   docker build -t captioner .
#   docker run --rm --network none -u "$(id -u):$(id -g)" -v "$PWD:/work" captioner caption-eval photos/
#   docker run --rm -p 127.0.0.1:8000:8000 captioner        # the service, at http://127.0.0.1:8000/
FROM python:3.12-slim

# PyTorch's wheels without CUDA: a tenth of the size. Empty takes what the package index has.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt pyproject.toml setup.py README.md LICENSE /src/
COPY captioner /src/captioner
COPY vis /src/vis
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint /src/constraints.txt '/src[serve,heic]' \
    && rm -r /src

# Whoever runs it has no home; measured scales and the like go where anybody can write.
ENV XDG_CACHE_HOME=/tmp/cache PYTHONUNBUFFERED=1
WORKDIR /work
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=3)"]
CMD ["caption-serve", "--host", "0.0.0.0"]
