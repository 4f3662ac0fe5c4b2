# macpo with its native extension, for CPUs or for NVIDIA GPUs:
#   docker build --target cpu -t macpo:cpu --build-arg TORCH_FLAGS="pip flags that choose torch's CPU wheels" .
#   docker build --target cuda -t macpo:cuda .
#   docker run --rm -v "$PWD:/work" macpo:cpu run mine.yaml
#   docker run --rm -v "$PWD:/work" --gpus all --ipc host macpo:cuda run mine.yaml
# The files that it writes belong to user 1000; `--user "$(id -u)"` makes them yours. EXTRAS=served,eval adds extras.
# `.ci/image` tries every step outside Docker where none runs.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN MACPO_NATIVE=1 pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS cpu
ARG TORCH_FLAGS=""
ARG EXTRAS=""
WORKDIR /install
COPY constraints.txt .
# torch alone and first, for which flags may name another place; nothing that follows brings another one.
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_FLAGS} "$(grep '^torch==' constraints.txt)"
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c constraints.txt "$(echo /wheels/macpo-*.whl)${EXTRAS:+[${EXTRAS}]}"
# Any user may write to the home, where caches of models and of compiled kernels lie, and to the working folder.
RUN useradd --uid 1000 --create-home macpo && mkdir /work && chmod 1777 /home/macpo /work
ENV HOME=/home/macpo USER=macpo
USER macpo
WORKDIR /work
ENTRYPOINT ["macpo"]
CMD ["--help"]

# The same with torch's CUDA libraries, and the C compiler with which Triton makes its launchers.
FROM cpu AS cuda
USER root
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER macpo
