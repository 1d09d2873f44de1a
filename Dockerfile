# docker build -t lora2-glue .                                                       CPU
# docker build -t lora2-glue --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .  CUDA, whose libraries PyTorch's wheel brings
# docker run --rm -it [--gpus all] -v "$PWD/output:/app/output" lora2-glue bash scripts/quickstart.sh
ARG BASE=python:3.12-slim
FROM ${BASE}
RUN python3 -c 'import venv, ensurepip' || \
    (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
WORKDIR /app
COPY . .
RUN bash scripts/setup.sh
ENV PATH=/app/.venv/bin:$PATH
CMD ["python", "-m", "nlu.run_glue", "--help"]
