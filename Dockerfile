# docker build -t lora2-glue .                                                          CPU
# docker build -t lora2-glue --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .  CUDA
# docker run --rm -it -v "$PWD/output:/app/output" lora2-glue bash scripts/quickstart.sh
ARG BASE=python:3.12-slim
FROM ${BASE}
RUN command -v python3 && python3 -m venv --help >/dev/null 2>&1 || \
    (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
WORKDIR /app
COPY . .
RUN bash scripts/setup.sh
ENV PATH=/app/.venv/bin:$PATH
CMD ["lora2-glue", "--help"]
