# The DICOM gateway in a container. docker build -f tools/gateway.Dockerfile -t medctkit-gateway .
# How to run it stands in docs/deploy.md. No check of this repository builds it: it is parsed and linted only.
FROM python:3.13-slim

ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/medctkit
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tools/setup_env.py tools/setup_env.py
# PyTorch first and for CPUs: the plain build brings several GB of CUDA.
RUN python -c "import sys; from tools.setup_env import install_torch; install_torch(sys.executable)"
COPY medctkit medctkit
RUN pip install -c constraints.txt ".[deploy]" \
    && useradd --create-home --uid 1000 gateway \
    && install --directory --owner gateway --mode 700 /queue

USER 1000
WORKDIR /home/gateway
# Slices and answers on their way: what has to outlive the container.
VOLUME /queue
EXPOSE 11112
# All addresses of the container; which of the host's may reach it is said when it is run.
ENTRYPOINT ["medctkit", "gateway", "--host", "0.0.0.0", "/queue"]
CMD ["--help"]
