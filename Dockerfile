# slowllm on the processor. Not built where it was written, for want of a builder: see docs/install.md.
#
#   docker build -t slowllm .
#   docker run --rm --memory 16g -v ~/.cache/huggingface:/models -v "$PWD:/work" slowllm forward sentences.txt
#
# For other extras: docker build --build-arg EXTRAS=eval,store,swarm,tune .
FROM python:3.11-slim

ARG EXTRAS=store
# torch from PyPI would bring gigabytes of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch's OpenMP is not in the slim image.
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY slowllm slowllm
COPY weights weights
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[$EXTRAS]" && rm -rf /source/*

RUN useradd --create-home slowllm && mkdir /models /work && chown slowllm /models /work
USER slowllm
# Models of the hub are kept outside of the container; nothing is fetched but by `slowllm download`.
ENV HF_HOME=/models
VOLUME /models
WORKDIR /work
ENTRYPOINT ["slowllm"]
CMD ["--help"]
